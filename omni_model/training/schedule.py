"""How learning rate, momentum and decay move over the steps of a training run.

All functions are pure. Steps count from 0; `steps` is the length of the whole run. Values are nanochat's;
what follows from depth is in `omni_model/config/depth.py`.
"""

from __future__ import annotations

import math

REFERENCE_BATCH_TOKENS = 2**19  # at which the learning rates were tuned


def batch_scale(batch_tokens: int) -> float:
    """What learning rates are multiplied by for another batch: its square root, the rule for Adam."""
    return (batch_tokens / REFERENCE_BATCH_TOKENS) ** 0.5


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
