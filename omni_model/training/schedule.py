"""How learning rate, momentum and decay move over the steps, and what follows from the one dial: depth.

All functions are pure. Steps count from 0; `steps` is the length of the whole run. Values are nanochat's.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from omni_model.model.gpt import GPT, GPTConfig

HEAD_DIM = 128
REFERENCE_DEPTH = 12
REFERENCE_BATCH_TOKENS = 2**19  # at which learning rates and decay were tuned, on the reference depth
REFERENCE_WEIGHT_DECAY = 0.28


def lr_multiplier(
    step: int,
    steps: int,
    warmup_steps: int = 40,
    warmdown_fraction: float = 0.65,
    final_fraction: float = 0.05,
) -> float:
    """Linear up over warmup_steps, 1, then linear down to final_fraction over the last warmdown_fraction."""
    warmdown = round(warmdown_fraction * steps)
    if step < warmup_steps:
        return (step + 1) / warmup_steps
    if step <= steps - warmdown:
        return 1.0
    left = (steps - step) / warmdown
    return left + (1 - left) * final_fraction


def muon_momentum(step: int, steps: int, warmup_steps: int = 400, warmdown_fraction: float = 0.65) -> float:
    """.85 -> .97 over warmup_steps, then .97, then .97 -> .90 over the warm-down.

    The warm-up is asked first, as in nanochat: a run whose warm-down starts within it jumps when it ends.
    """
    warmdown = round(warmdown_fraction * steps)
    if step < warmup_steps:
        return 0.85 + (0.97 - 0.85) * step / warmup_steps
    if warmdown and step >= steps - warmdown:
        return 0.97 - (0.97 - 0.90) * (step - (steps - warmdown)) / warmdown
    return 0.97


def muon_weight_decay(step: int, steps: int, initial: float) -> float:
    """From `initial` to 0 along half a cosine."""
    return initial * 0.5 * (1 + math.cos(math.pi * step / steps))


def cosine(step: int, steps: int, warmup_steps: int = 0, final_fraction: float = 0.0) -> float:
    """Linear up over warmup_steps, then half a cosine from 1 to final_fraction at `steps`."""
    if step < warmup_steps:
        return (step + 1) / warmup_steps
    progress = min(1.0, (step - warmup_steps) / max(1, steps - warmup_steps))
    return final_fraction + (1 - final_fraction) * 0.5 * (1 + math.cos(math.pi * progress))


@dataclass(frozen=True)
class Scaling:
    """What depth decides: width, heads, training length, batch, and what is corrected for that batch."""

    depth: int
    vocab_size: int
    sequence_len: int
    width: int
    heads: int
    scaling_params: int
    train_tokens: int
    batch_tokens: int
    steps: int
    batch_scale: float  # multiplies learning rates
    weight_decay: float  # Muon's, at the start

    @classmethod
    def from_depth(
        cls, depth: int, ratio: float = 12.0, *, vocab_size: int = 32768, sequence_len: int = 2048
    ) -> Scaling:
        """Derive everything from depth and the tokens : parameters ratio (nanochat: 12; Chinchilla: 20)."""
        # 1. Width: 64 channels per layer, in whole heads of 128, a shape that matrix units like.
        heads = math.ceil(64 * depth / HEAD_DIM)
        # 2. Length: tokens proportional to the parameters that scale (blocks and head).
        params = _scaling_params(depth, vocab_size, sequence_len)
        reference = _scaling_params(REFERENCE_DEPTH, vocab_size, sequence_len)
        train_tokens, reference_tokens = int(ratio * params), ratio * reference
        # 3. Batch: the optimal one grows with length^0.383 ("Power Lines", arXiv 2505.13738); a power of 2.
        optimum = REFERENCE_BATCH_TOKENS * (train_tokens / reference_tokens) ** 0.383
        batch_tokens = 2 ** round(math.log2(optimum))
        # 4. Learning rate: with the square root of the batch, the rule for Adam.
        batch_scale = (batch_tokens / REFERENCE_BATCH_TOKENS) ** 0.5
        # 5. Weight decay: its time scale, in epochs, stays as batch and length change (arXiv 2405.13698).
        weight_decay = REFERENCE_WEIGHT_DECAY * batch_scale * reference_tokens / train_tokens
        return cls(
            depth=depth,
            vocab_size=vocab_size,
            sequence_len=sequence_len,
            width=heads * HEAD_DIM,
            heads=heads,
            scaling_params=params,
            train_tokens=train_tokens,
            batch_tokens=batch_tokens,
            steps=train_tokens // batch_tokens,
            batch_scale=batch_scale,
            weight_decay=weight_decay,
        )

    def config(self) -> GPTConfig:
        """The GPT of this depth."""
        return _config(self.depth, self.vocab_size, self.sequence_len)


def _config(depth: int, vocab_size: int, sequence_len: int) -> GPTConfig:
    heads = math.ceil(64 * depth / HEAD_DIM)
    return GPTConfig(
        sequence_len=sequence_len,
        vocab_size=vocab_size,
        n_layer=depth,
        n_head=heads,
        n_kv_head=heads,
        n_embd=heads * HEAD_DIM,
    )


def _scaling_params(depth: int, vocab_size: int, sequence_len: int) -> int:
    """Counted on the meta device: the real module, without its memory."""
    with torch.device("meta"):
        return GPT(_config(depth, vocab_size, sequence_len)).num_scaling_params()
