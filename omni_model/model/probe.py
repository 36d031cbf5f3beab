"""Try one attention kernel: `python -m omni_model.model.probe NAME DEVICE DTYPE HEAD_DIM SECONDS REPORT`.

Runs in a process of its own because a bad kernel may take its process with it; `backends.probe` asks and
reads the answer, a JSON file. The case is made to be hard: grouped heads, inputs that are views of one
tensor, a length that is no multiple of any block, windows below and at that length. A window of 3 shows a
kernel that counts keys wrongly by one, which in a window of hundreds would be near to rounding.

Legend: B batch, T tokens, H query heads, G key/value heads, D head dim.
"""

from __future__ import annotations

import json
import signal
import statistics
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from omni_model.model.attention import Kernel, attend
from omni_model.model.backends import KERNELS

BATCH, TOKENS, HEADS, KV_HEADS = 2, 333, 4, 2
WINDOWS = (3, 100, TOKENS)
NAMES = ("y", "dq", "dk", "dv")


def errors(kernel: Kernel, device: torch.device, dtype: torch.dtype, head_dim: int) -> dict[str, float]:
    """Largest difference of y, dq, dk and dv from plain SDPA in fp32 on the processor, over WINDOWS.

    The difference of a row (one token and head) is relative to that row's length or to the average row's,
    whichever is larger. ValueError when a result has another shape or is not finite.
    """
    made = torch.Generator().manual_seed(0)
    shape = (BATCH, TOKENS, 2 * HEADS + 2 * KV_HEADS, head_dim)
    q, k, v, dy = torch.randn(shape, generator=made).to(dtype).split([HEADS, KV_HEADS, KV_HEADS, HEADS], 2)
    worst = dict.fromkeys(NAMES, 0.0)
    for window in WINDOWS:
        with sdpa_kernel(SDPBackend.MATH):
            truth = _pass(attend, q.float(), k.float(), v.float(), dy.float(), window)
        found = _pass(kernel, *(x.to(device) for x in (q, k, v, dy)), window)
        for name, one, other in zip(NAMES, truth, found, strict=True):
            worst[name] = max(worst[name], difference(one, other.cpu().float()))
    return worst


def repeats(kernel: Kernel, device: torch.device, dtype: torch.dtype, shape: tuple[int, ...]) -> bool:
    """Whether gradients are the same bits each time: atomic additions leave their order to chance."""
    arguments = [torch.randn(shape, device=device, dtype=dtype) for _ in NAMES]
    first, *others = (_pass(kernel, *arguments, shape[1] // 4) for _ in range(3))
    return all(torch.equal(one, x) for other in others for one, x in zip(first, other, strict=True))


def milliseconds(kernel: Kernel, device: torch.device, dtype: torch.dtype, shape: tuple[int, ...]) -> float:
    """Median time on a card of forward and backward, with a short and a full window."""
    q, k, v, dy = (torch.randn(shape, device=device, dtype=dtype) for _ in NAMES)

    def one_round() -> float:
        began = time.perf_counter()
        for window in (shape[1] // 4, shape[1]):
            _pass(kernel, q, k, v, dy, window)
        torch.cuda.synchronize(device)
        return 1000 * (time.perf_counter() - began)

    one_round()
    return statistics.median(one_round() for _ in range(7))


def _pass(kernel: Kernel, q: Tensor, k: Tensor, v: Tensor, dy: Tensor, window: int) -> tuple[Tensor, ...]:
    inputs = tuple(x.detach().requires_grad_() for x in (q, k, v))
    y = kernel(*inputs, window)
    return y.detach(), *torch.autograd.grad(y, inputs, dy)


def difference(truth: Tensor, found: Tensor) -> float:
    """Largest relative difference of a row; see `errors`."""
    if found.shape != truth.shape or not found.isfinite().all():
        raise ValueError(
            f"returns {tuple(found.shape)} for {tuple(truth.shape)}, or numbers that are not finite"
        )
    size = truth.norm(dim=-1)
    return ((found - truth).norm(dim=-1) / size.clamp(min=size.square().mean().sqrt())).max().item()


def main(argv: Sequence[str], kernels: Mapping[str, Kernel] = KERNELS) -> int:
    """Write REPORT: what `errors`, `repeats`, `milliseconds` found, or {"failure": sentence}. Exit code."""
    name, device_name, dtype_name, head_dim, seconds, report = argv
    signal.alarm(int(float(seconds)) + 5)  # a hanging kernel ends even when the process that asked is gone
    device, dtype = torch.device(device_name), getattr(torch, dtype_name)
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True, warn_only=True)  # as every stage has it
    kernel, on_card = kernels[name], device.type == "cuda"
    shape = (4, 2048, 6, int(head_dim)) if on_card else (1, TOKENS, HEADS, int(head_dim))
    found: dict[str, Any]
    try:
        found = {"errors": errors(kernel, device, dtype, int(head_dim))}
        found["repeats"] = repeats(kernel, device, dtype, shape)
        found["ms"] = milliseconds(kernel, device, dtype, shape) if on_card else None
    except Exception as error:
        found = {"failure": f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:200]}"}
    Path(report).write_text(json.dumps(found))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
