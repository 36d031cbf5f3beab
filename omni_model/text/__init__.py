"""Text: the grammar of sounds, tokenizers, conversations, the written corpus, and packing into rows."""
