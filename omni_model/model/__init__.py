"""The networks: GPT, attention and its cache, projector, LoRA, and the omni model that joins them."""
