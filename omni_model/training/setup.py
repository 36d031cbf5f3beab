"""What every training of a whole language model begins with: ranks, device, kernels, optimizer, input, pace.

A stage makes its GPT on the CPU, in the dtype it computes in, from weights that are drawn or read there; so
the same weights begin on every machine. `prepare` brings it to this process's device and equips it.

Legend: B rows, T tokens a row is trained on (a row has one more).
"""

from __future__ import annotations

import statistics
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from omni_model import hardware
from omni_model.config import BadInput, LearningRates
from omni_model.model.backends import equip
from omni_model.model.fp8 import use_fp8
from omni_model.model.gpt import GPT
from omni_model.storage import Workspace
from omni_model.training.loop import MetricsSink
from omni_model.training.loss_scale import LossScale
from omni_model.training.optim import MuonAdamW, parameter_groups
from omni_model.training.ranks import Ranks

PROJECT = "nanochat"  # wandb's, of all that learns from text alone
WIDE = 256  # channels from which the faster way of multiplying pays on a CPU (flows/LOG.md)


def join_ranks() -> Ranks:
    """The processes that share this training; every one calls this before it asks for its device."""
    return Ranks(*hardware.join_ranks())


def settled_dtype(named: str) -> torch.dtype:
    """The dtype that a recipe names; "auto" is left only where no plan settled it, and asks this machine."""
    dtype: torch.dtype = getattr(torch, hardware.training_dtype() if named == "auto" else named)
    return dtype


def rows_per_step(batch_tokens: int, sequence_len: int, ranks: Ranks) -> int:
    """Rows of all ranks together in one step.

    Raises:
        BadInput: they are no whole number, or no equal one for every rank.
    """
    if sequence_len == 0:
        raise BadInput("gpt.sequence_len is 0; set it, or derive the recipe from its depth first")
    if batch_tokens == 0 or batch_tokens % (sequence_len * ranks.world):
        raise BadInput(
            f"batch_tokens {batch_tokens} must be a multiple of {sequence_len} tokens a row x {ranks.world} "
            f"ranks = {sequence_len * ranks.world}, so that every rank has as many whole rows"
        )
    return batch_tokens // sequence_len


@dataclass(frozen=True)
class Ready:
    """A GPT on this process's device, and what moves its weights."""

    gpt: GPT
    optimizer: MuonAdamW
    loss_scale: LossScale | None
    ranks: Ranks
    device: torch.device


def prepare(
    gpt: GPT,
    rates: LearningRates,
    *,
    ranks: Ranks,
    work: Workspace,
    batch_scale: float = 1.0,
    weight_decay: float = 0.0,
    fp8: bool = False,
) -> Ready:
    """Bring a GPT from the CPU to the device and make its optimizer; on a card choose kernels and compile.

    `rates` are multiplied by `batch_scale` (training.schedule.batch_scale); `weight_decay` is Muon's. Every
    rank calls this. Nothing may move the GPT afterwards.

    Raises:
        BadInput: `fp8` for a GPT without a matrix that fits.
    """
    device = bring(gpt, ranks=ranks, work=work)
    if fp8:
        try:
            use_fp8(gpt)
        except ValueError as error:
            raise BadInput(f"pretrain.fp8 is not possible: {error}") from None
    groups = parameter_groups(
        gpt,
        matrix_lr=rates.matrix,
        embedding_lr=rates.embedding,
        unembedding_lr=rates.unembedding,
        scalar_lr=rates.scalar,
        batch_scale=batch_scale,
        weight_decay=weight_decay,
    )
    narrow = gpt.compute_dtype == torch.bfloat16
    polar = torch.bfloat16 if narrow else torch.float32
    optimizer = MuonAdamW(groups, ranks=ranks, polar_dtype=polar)
    if device.type == "cuda":
        gpt.compile_blocks()
    loss_scale = LossScale() if gpt.compute_dtype == torch.float16 else None
    return Ready(gpt, optimizer, loss_scale, ranks, device)


def bring(gpt: GPT, *, ranks: Ranks, work: Workspace) -> torch.device:
    """Bring a GPT from the CPU to this process's device, with kernels that suit it; every rank calls this."""
    device = hardware.device()
    gpt.to(device)
    if device.type == "cuda":
        _equip(gpt, ranks, work)
    elif gpt.config.n_embd >= WIDE:
        hardware.speed_up_products(work.partial / "products.json")
    return device


def _equip(gpt: GPT, ranks: Ranks, work: Workspace) -> None:
    """Kernels by the verdicts that the store keeps for all stages; the first rank finds what is missing."""
    verdicts = work.directory.parent.parent / ".kernels" / "attention.json"
    if ranks.first:
        equip(gpt, verdicts)
    ranks.agree(None)
    if not ranks.first:
        equip(gpt, verdicts)


class RowFeed:
    """Carries a step's rows of token ids to the device without making the CPU wait for it.

    A card copies from page-locked memory while Python goes on. There are two such buffers in turn, and an
    event for each that says when the card has read it, so that no buffer is overwritten too early.
    """

    def __init__(self, device: torch.device, rows: int, row_tokens: int) -> None:
        self.device, self._turn = device, 0
        self._buffers: list[tuple[Tensor, torch.cuda.Event]] = []
        if device.type == "cuda":
            shape = (rows, row_tokens)
            self._buffers = [
                (torch.empty(shape, dtype=torch.int32, pin_memory=True), torch.cuda.Event()) for _ in range(2)
            ]

    def carry(self, rows: np.ndarray) -> Tensor:
        """Rows (B, T + 1) of int32 -> the same as int64 on the device."""
        if not self._buffers:
            return torch.from_numpy(rows).to(self.device, torch.int64)
        buffer, read = self._buffers[self._turn]
        self._turn = 1 - self._turn
        read.synchronize()  # at once, unless the card is two steps behind
        buffer.copy_(torch.from_numpy(rows))
        there = buffer.to(self.device, non_blocking=True)
        read.record()
        return there.long()


class Pace:
    """A metrics sink that adds tokens per second, and on a known card the share of its peak (MFU).

    Paces are those of training alone: the loop's clock stands still in evaluations and checkpoints.
    """

    def __init__(self, metrics: MetricsSink, *, step_tokens: int, gpt: GPT, ranks: Ranks) -> None:
        self._metrics, self._step_tokens = metrics, step_tokens
        self.card = hardware.card_name()
        peak = hardware.peak_flops(self.card)
        self._full_rate = None if peak is None else peak * ranks.world / gpt.flops_per_token()  # tokens/s
        self._rates: list[float] = []

    def log(self, step: int, total: int, **values: float) -> None:
        """Hand a line on; one with the mean seconds of its steps, `step_s`, gets what follows from that."""
        if "step_s" in values:
            self._rates.append(self._step_tokens / values["step_s"])
            values |= self._told(self._rates[-1])
        self._metrics.log(step, total, **values)

    def summary(self) -> dict[str, float | str]:
        """`card`, and the medians of `tokens_per_s` and `mfu`: medians, for the first steps may compile."""
        if not self._rates:  # nothing was left to do
            return {"card": self.card}
        return {"card": self.card, **self._told(statistics.median(self._rates))}

    def _told(self, rate: float) -> dict[str, float]:
        mfu = {} if self._full_rate is None else {"mfu": round(rate / self._full_rate, 4)}
        return {"tokens_per_s": round(rate, 1), **mfu}
