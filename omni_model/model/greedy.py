"""Writing on by the likeliest token each time: the plainest way to see what a GPT has learned.

Talking with a model, sampling and tools are `omni_model.serving`'s.
"""

from collections.abc import Sequence

import torch

from omni_model.model.gpt import GPT


@torch.no_grad()
def continue_greedily(gpt: GPT, ids: Sequence[int], max_tokens: int, stop: Sequence[int] = ()) -> list[int]:
    """The likeliest token after `ids`, the likeliest after that, and so on, up to one of `stop`."""
    cache = gpt.new_cache(1, len(ids) + max_tokens)
    written: list[int] = []
    new = list(ids)
    while len(written) < max_tokens:
        logits = gpt(torch.tensor([new], device=gpt.cos.device), cache=cache, logits="last")
        new = [int(logits[0, -1].argmax())]
        if new[0] in stop:
            break
        written += new
    return written
