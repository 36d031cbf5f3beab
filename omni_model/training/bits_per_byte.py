"""How well a model predicts text, in a unit that no tokenizer can change: bits per byte.

    bpb = sum of -ln p(token) / (ln 2 * sum of the bytes that those tokens spell)

over the predicted tokens that spell at least one byte. Special tokens spell none and count in neither sum. A
tokenizer with longer tokens has a higher loss per token, and fewer of them; per byte both effects cancel.

Legend: B rows, T tokens a row, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import Tensor

from omni_model.model.gpt import GPT
from omni_model.training.ranks import ALONE, Ranks


@torch.no_grad()
def bits_per_byte(gpt: GPT, batches: Iterable[Tensor], num_bytes: Tensor, ranks: Ranks = ALONE) -> float:
    """Bits per byte of rows (B, T + 1) of ids on the GPT's device, of which each rank gives its own.

    num_bytes (V,) are the bytes that each id spells, 0 for special tokens.

    Raises:
        ValueError: no token of any rank spells a byte.
    """
    num_bytes = num_bytes.to(gpt.cos.device)
    sums = torch.zeros(2, dtype=torch.float64, device=gpt.cos.device)  # nats, bytes
    for ids in batches:
        targets = ids[:, 1:]
        nats = gpt(ids[:, :-1], targets, loss_reduction="none")
        spelled = num_bytes[targets.flatten()]
        sums += torch.stack([(nats.double() * (spelled > 0)).sum(), spelled.sum().double()])
    nats_mean, bytes_mean = ranks.average(sums)().tolist()  # of the ranks; their number cancels
    if bytes_mean == 0:
        raise ValueError("Not one token of these rows spells a byte, so there is nothing to count.")
    return float(nats_mean / (math.log(2) * bytes_mean))
