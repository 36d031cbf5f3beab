"""How many rows a device takes at once.

A step reads more rows than fit a card's memory, so it goes through them in equal parts, its microbatches,
whose gradients add up to those of the whole. The more rows at once, the better a card is used. How many fit
is found once, by trying; what was found is kept, so that a training that was killed goes on as it began.
"""

from __future__ import annotations

import contextlib
import gc
import json
import math
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from omni_model.artifacts import write_atomically
from omni_model.config import BadInput, Runtime
from omni_model.storage import Workspace
from omni_model.training.setup import Ready

KEPT = "microbatch.json"
CPU_TOKENS = 4096  # at once on a CPU: from 1024 to here all are alike, and twice as many are slower


def microbatch_rows(ready: Ready, rows: int, *, work: Workspace, runtime: Runtime) -> int:
    """Rows at once, a divisor of `rows`, which are this rank's of a step; every rank calls this.

    What `runtime.microbatch_rows` says, else what was found in an earlier attempt, else the most that a card
    can take; on a CPU the largest power of two within CPU_TOKENS.

    Raises:
        BadInput: runtime.microbatch_rows is no divisor, or not even one row fits the card.
    """
    if asked := runtime.microbatch_rows:
        if rows % asked:
            raise BadInput(
                f"runtime.microbatch_rows {asked} does not divide a rank's {rows} rows of a step; set a "
                "divisor, or 0 to have it found"
            )
        return asked
    candidates = powers_of_two(rows)
    if ready.device.type != "cuda":
        within = [each for each in candidates if each * ready.gpt.config.sequence_len <= CPU_TOKENS]
        return max(within, default=1)
    found: int = ready.ranks.agree(_kept_or_found(ready, rows, candidates, work) if ready.ranks.first else 0)
    return found


def _kept_or_found(ready: Ready, rows: int, candidates: list[int], work: Workspace) -> int:
    kept = work.partial / KEPT
    if kept.exists():  # perhaps by another number of ranks: a divisor of what fits fits too
        return math.gcd(int(json.loads(kept.read_text())), rows)
    found = largest(candidates, lambda count: try_step(ready, count))
    kept.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(kept, json.dumps(found))
    return found


def powers_of_two(rows: int) -> list[int]:
    """The powers of two that divide `rows`, largest first."""
    return [2**power for power in reversed(range(rows.bit_length())) if rows % 2**power == 0]


def largest(candidates: list[int], attempt: Callable[[int], None]) -> int:
    """The first candidate whose attempt does not run out of memory.

    Raises:
        BadInput: there is none.
    """
    for count in candidates:
        try:
            attempt(count)
        except torch.OutOfMemoryError:
            pass  # what the attempt held is freed once its traceback is gone
        else:
            return count
        gc.collect()
        torch.cuda.empty_cache()
    raise BadInput(
        "not even one row fits the card's memory beside weights and optimizer state; "
        "set gpt.sequence_len or the depth lower, or use a larger card"
    )


def try_step(ready: Ready, rows: int) -> None:
    """Forward and backward as in training, twice: the second time beside the gradients of the first.

    The optimizer's state, which does not exist yet, is stood in for. Nothing is compiled here: compiled code
    needs less memory, and compiling for every size that is tried would take minutes.

    Raises:
        torch.OutOfMemoryError: it is too much.
    """
    gpt, parameters = ready.gpt, list(ready.gpt.parameters())
    ids = torch.arange(rows * gpt.config.sequence_len, device=ready.device) % gpt.config.vocab_size
    ids = ids.view(rows, -1)
    try:
        with _state_of(ready), torch.compiler.set_stance("force_eager"):
            for _ in range(2):
                gpt(ids, ids).backward()
    finally:
        for parameter in parameters:
            parameter.grad = None


@contextlib.contextmanager
def _state_of(ready: Ready) -> Iterator[None]:
    """Hold as much memory as the optimizer's state will: AdamW keeps two numbers a weight, Muon one."""
    held: list[Tensor] = []
    for group in ready.optimizer.param_groups:
        numbers = 2 if group["kind"] == "adamw" else 1
        for parameter in group["params"]:
            size = numbers * parameter.numel() * parameter.element_size() // ready.ranks.world
            held.append(torch.empty(size, dtype=torch.uint8, device=ready.device))
    yield
    del held
