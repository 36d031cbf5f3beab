"""The ranks of one training run: equal processes, each with its part of the batch and its part of the work.

Every rank holds all weights. Gradients are averaged over the ranks, each rank updates its own rows of a
tensor with its own rows of the optimizer's state, and the updated rows go to all. What cannot be computed
alike everywhere (the clock, an exam) rank 0 decides. All collectives are called by all ranks in one order.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

Wait = Callable[[], Tensor]  # waits for a transfer that was begun, and gives its result


@dataclass(frozen=True)
class Ranks:
    """This process's number among `world`, and their process group (None: torch's default group).

    For values that live on a card the group needs gloo beside NCCL: "cpu:gloo,cuda:nccl".
    """

    rank: int = 0
    world: int = 1
    group: dist.ProcessGroup | None = None

    @property
    def first(self) -> bool:
        """True on the rank that decides, logs and writes."""
        return self.rank == 0

    def part(self, rows: int) -> slice:
        """This rank's rows of `rows`: equal parts of ceil(rows / world), the last ones shorter or empty."""
        size = -(-rows // self.world)
        return slice(min(self.rank * size, rows), min((self.rank + 1) * size, rows))

    def average(self, tensor: Tensor) -> Wait:
        """Begin averaging over all ranks, in place."""
        if self.world == 1:
            return lambda: tensor
        work = dist.all_reduce(tensor, group=self.group, async_op=True)

        def wait() -> Tensor:
            work.wait()
            return tensor.div_(self.world)

        return wait

    def average_gradients(self, tensors: Sequence[Tensor]) -> None:
        """Average the gradients of `tensors` over all ranks, in place and in one transfer per dtype.

        The same ones must have a gradient on every rank.
        """
        if self.world == 1:
            return
        gradients = [tensor.grad for tensor in tensors if tensor.grad is not None]
        for dtype in dict.fromkeys(gradient.dtype for gradient in gradients):
            alike = [gradient for gradient in gradients if gradient.dtype == dtype]
            bucket = self.average(torch.cat([gradient.flatten() for gradient in alike]))()
            for gradient, mean in zip(alike, bucket.split([g.numel() for g in alike]), strict=True):
                gradient.copy_(mean.view_as(gradient))

    def average_part(self, whole: Tensor) -> Wait:
        """Begin averaging (world * rows, ...); each rank gets the average of its own (rows, ...) alone."""
        if self.world == 1:
            return lambda: whole
        part = torch.empty_like(whole[: whole.size(0) // self.world])
        work = _reduce_scatter(part, whole, self.group)

        def wait() -> Tensor:
            work.wait()
            return part.div_(self.world)

        return wait

    def spread(self, whole: Tensor) -> Wait:
        """Begin filling (world * rows, ...) in place, on all ranks, with each rank's own rows of it."""
        if self.world == 1:
            return lambda: whole
        own = whole[self.part(whole.size(0))]
        work = _all_gather(whole, own, self.group)

        def wait() -> Tensor:
            work.wait()
            return whole

        return wait

    def collect(self, part: Tensor, rows: int) -> Tensor | None:
        """The (rows, ...) of which each rank holds its part, on the CPU of rank 0; None on the others."""
        if self.world == 1:
            return part
        size = -(-rows // self.world)
        padded = part.new_zeros(size, *part.shape[1:])
        padded[: len(part)] = part
        whole = part.new_empty(size * self.world, *part.shape[1:]) if self.first else None
        pieces = None if whole is None else list(whole.chunk(self.world))
        dist.gather(padded, pieces, group=self.group, group_dst=0)
        return None if whole is None else whole[:rows].cpu()

    def on_any(self, flag: Tensor) -> bool:
        """True if `flag` (one number) is not 0 on some rank."""
        if self.world > 1:
            dist.all_reduce(flag, dist.ReduceOp.MAX, group=self.group)
        return bool(flag.item())

    def agree(self, value: Any) -> Any:
        """Rank 0's value, plain JSON, on every rank; it comes when rank 0 has come to this place."""
        if self.world == 1:
            return value
        content = torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8)
        size = torch.tensor(len(content))
        dist.broadcast(size, group=self.group, group_src=0)
        content = content if self.first else content.new_empty(int(size))
        dist.broadcast(content, group=self.group, group_src=0)
        return json.loads(bytes(content.tolist()))


ALONE = Ranks()


# Each under the name that this torch has for it; torch 2.13 deprecates the earlier ones.


def _reduce_scatter(part: Tensor, whole: Tensor, group: dist.ProcessGroup | None) -> dist.Work:
    if hasattr(dist, "reduce_scatter_single"):
        return dist.reduce_scatter_single(part, whole, group=group, async_op=True)
    return dist.reduce_scatter_tensor(part, whole, group=group, async_op=True)


def _all_gather(whole: Tensor, part: Tensor, group: dist.ProcessGroup | None) -> dist.Work:
    if hasattr(dist, "all_gather_single"):
        return dist.all_gather_single(whole, part, group=group, async_op=True)
    return dist.all_gather_into_tensor(whole, part, group=group, async_op=True)
