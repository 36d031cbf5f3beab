"""The attention kernels a machine may have, and which of them to trust.

A kernel that imports may still end the process, hang, leave the card unusable or return wrong numbers on a
card that its authors never saw. So none is believed: each makes a small forward and backward pass on the
device in a process of its own (`omni_model.model.probe`), and the results are compared with
`attention.attend`. The fastest that is right, and gives the same bits every time, is taken. A verdict is kept
in a file, because asking costs seconds.

These kernels serve passes over whole sequences; what continues a cache is in `kv_cache`.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import signal
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from omni_model.artifacts import write_atomically
from omni_model.hardware import compute_dtype
from omni_model.model.attention import Kernel, attend
from omni_model.model.gpt import GPT

# Largest difference, as a share of the size of what it should be, that rounding alone explains.
TOLERANCE = {"float32": 1e-4, "float16": 1e-2, "bfloat16": 5e-2}
PLAIN = "sdpa"  # what all others are compared with: it needs no probe to be right
TIE = 1.05  # times closer than this decide nothing
JUDGED = ("attention", "backends", "banded", "flex_attention", "probe", "triton_attention")  # our modules
PROBE = (sys.executable, "-m", "omni_model.model.probe")
TIME_LIMIT_S = 300.0  # compiling a kernel takes most of it


def flash3(q: Tensor, k: Tensor, v: Tensor, window: int) -> Tensor:
    """FlashAttention 3 (Hopper only), where its wheel is installed."""
    from flash_attn_interface import flash_attn_func

    y = flash_attn_func(q, k, v, causal=True, window_size=(window, 0), deterministic=True)
    return y[0] if isinstance(y, tuple) else y


def flash(q: Tensor, k: Tensor, v: Tensor, window: int) -> Tensor:
    """FlashAttention 2 inside torch, which has a window since 2.11. bf16 and fp16."""
    from torch.nn.attention.varlen import varlen_attn

    batch, tokens, heads, _ = q.shape
    k, v = (x.repeat_interleave(heads // x.size(2), dim=2) if x.size(2) != heads else x for x in (k, v))
    starts = torch.arange(0, (batch + 1) * tokens, tokens, dtype=torch.int32, device=q.device)
    rows = (x.flatten(0, 1) for x in (q, k, v))
    y = varlen_attn(*rows, starts, starts, tokens, tokens, window_size=(min(window, tokens), 0))
    return _in_fixed_order(y).unflatten(0, (batch, tokens))


def _in_fixed_order(y: Tensor) -> Tensor:
    """y, whose backward step will add in a fixed order: torch's kernel takes that from a global switch.

    A compiled graph cannot be told so; there the global setting decides.
    """
    if y.grad_fn is None or torch.compiler.is_compiling():
        return y
    before: list[tuple[bool, bool]] = []

    def set_strict(_: tuple[Tensor, ...]) -> None:
        enabled = torch.are_deterministic_algorithms_enabled()
        before.append((enabled, torch.is_deterministic_algorithms_warn_only_enabled()))
        torch.use_deterministic_algorithms(True)

    def restore(_: tuple[Tensor, ...], __: tuple[Tensor, ...]) -> None:
        enabled, warn_only = before.pop()
        torch.use_deterministic_algorithms(enabled, warn_only=warn_only)

    y.grad_fn.register_prehook(set_strict)
    y.grad_fn.register_hook(restore)
    return y


def flex(q: Tensor, k: Tensor, v: Tensor, window: int) -> Tensor:
    """A kernel that torch generates."""
    from omni_model.model.flex_attention import banded_attention

    return banded_attention(q, k, v, window)


def triton(q: Tensor, k: Tensor, v: Tensor, window: int) -> Tensor:
    """Our own kernels."""
    from omni_model.model.triton_attention import banded_attention

    return banded_attention(q, k, v, window)


def banded(q: Tensor, k: Tensor, v: Tensor, window: int) -> Tensor:
    """Our own blocks of matrix products, for processors."""
    from omni_model.model.banded import banded_attention

    return banded_attention(q, k, v, window)


KERNELS: dict[str, Kernel] = {
    "fa3": flash3,
    "flash": flash,
    "flex": flex,
    "triton": triton,
    "banded": banded,
    PLAIN: attend,
}
# Best first, by what is known of them; the order decides between equals and where nothing is timed.
CANDIDATES = {"cuda": ("fa3", "flash", "flex", "triton", PLAIN), "cpu": ("banded", PLAIN)}
NEEDS = {"fa3": "flash_attn_interface", "flex": "triton", "triton": "triton"}  # packages that may be absent


@dataclass(frozen=True)
class Verdict:
    """What a probe found: `max_error` is relative (see TOLERANCE), `ms` the time of two passes on a card."""

    kernel: str
    works: bool
    max_error: float | None
    ms: float | None
    sentence: str


def equip(gpt: GPT, verdicts_file: Path) -> str:
    """Give a GPT that is on its device the kernels that are best there; the attention kernel's name.

    Where our own Triton attention works, Triton works, and so the loss is made by our Triton kernel too.
    """
    device, dtype, head_dim = gpt.cos.device, gpt.compute_dtype, gpt.config.head_dim
    verdicts = examine(device, dtype, head_dim, verdicts_file)
    chosen = fastest(device.type, verdicts)
    gpt.kernel = KERNELS[chosen]
    if any(verdict.kernel == "triton" and verdict.works for verdict in verdicts):
        from omni_model.model.triton_softcap import chunk_loss_and_grad

        gpt.loss_kernel = chunk_loss_and_grad
    return chosen


def examine(device: torch.device, dtype: torch.dtype, head_dim: int, verdicts_file: Path) -> list[Verdict]:
    """The verdict on every candidate that `fastest` has to know."""
    verdicts = []
    for name in CANDIDATES.get(device.type, ()):
        if device.type != "cuda" and (name == PLAIN or any(verdict.works for verdict in verdicts)):
            break
        verdicts.append(probe(name, device, dtype, head_dim, verdicts_file))
    return verdicts


def fastest(device_type: str, verdicts: Sequence[Verdict]) -> str:
    """The fastest kernel that works, from verdicts in the order of CANDIDATES; `sdpa` when no other does.

    On a processor the first that works is taken and time decides nothing: results are to be the same bytes
    on every machine.
    """
    working = [verdict for verdict in verdicts if verdict.works]
    if device_type == "cuda":
        best = min((verdict.ms or math.inf for verdict in working), default=math.inf)
        working = [verdict for verdict in working if (verdict.ms or math.inf) <= best * TIE]
    return working[0].kernel if working else PLAIN


def probe(
    name: str,
    device: torch.device,
    dtype: torch.dtype,
    head_dim: int,
    cache_file: Path,
    *,
    command: Sequence[str] = PROBE,
    limit_s: float = TIME_LIMIT_S,
) -> Verdict:
    """Whether a kernel can be trusted on this device, found in a child process or read from `cache_file`.

    A verdict holds for one card, dtype, head dim, version of torch and state of our own code.
    """
    package = NEEDS.get(name)
    if package and find_spec(package) is None:
        return Verdict(name, False, None, None, f"needs the package {package}, which is not installed")
    kind = str(dtype).removeprefix("torch.")
    versions = f"torch {torch.__version__}|code {_code_digest()}"
    key = "|".join((_card(device), kind, f"head_dim {head_dim}", versions, name))
    if known := _read(cache_file).get(key):
        return Verdict(**known)
    verdict = _ask_child([*command, name, str(device), kind, str(head_dim)], name, kind, limit_s)
    if verdict.sentence.startswith("OutOfMemoryError"):
        return verdict  # somebody else fills the card now: that says nothing about the kernel
    cache_file.parent.mkdir(parents=True, exist_ok=True)
    kept = _read(cache_file) | {key: dataclasses.asdict(verdict)}
    write_atomically(cache_file, json.dumps(kept, indent=1, sort_keys=True))
    return verdict


def _card(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def _code_digest() -> str:
    folder = Path(__file__).parent
    return hashlib.sha256(b"".join((folder / f"{name}.py").read_bytes() for name in JUDGED)).hexdigest()[:12]


def _read(cache_file: Path) -> dict[str, Any]:
    """Known verdicts; none when the file is missing or unreadable, since they can be found again."""
    try:
        kept = json.loads(cache_file.read_text())
    except (OSError, ValueError):
        return {}
    return kept if isinstance(kept, dict) else {}


def _ask_child(command: list[str], name: str, dtype: str, limit_s: float) -> Verdict:
    def failed(sentence: str, error: float | None = None) -> Verdict:
        return Verdict(name, False, error, None, sentence)

    with tempfile.TemporaryDirectory() as folder, tempfile.TemporaryFile("w+") as output:
        report = Path(folder) / "report.json"
        try:  # output to a file: a grandchild that holds a pipe open could not be waited for
            code = subprocess.run(
                [*command, str(limit_s), str(report)],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                timeout=limit_s,
            ).returncode
        except subprocess.TimeoutExpired:
            return failed(f"did not answer within {limit_s:g} s")
        if code != 0 or not report.exists():
            output.seek(0)
            said = [line.strip() for line in output.read().splitlines() if line.strip()]
            return failed(f"{_ending(code)} before it answered{f': {said[-1][:200]}' if said else ''}")
        found = json.loads(report.read_text())
    if "failure" in found:
        return failed(found["failure"])
    worst, error = max(found["errors"].items(), key=lambda item: item[1])
    if error > TOLERANCE[dtype]:
        return failed(f"returns a wrong {worst}: off by {error:.2g} of its size", error)
    if not found["repeats"]:
        return failed("gives other gradients the second time", error)
    time = "" if found["ms"] is None else f", {found['ms']:.3g} ms"
    return Verdict(name, True, error, found["ms"], f"right to {error:.1g}{time}")


def _ending(code: int) -> str:
    return f"died of {signal.Signals(-code).name}" if code < 0 else f"ended its process with code {code}"


def survey(verdicts_file: Path) -> list[dict[str, Any]]:
    """For `omni doctor`: each device with the dtype it would compute in, the choice and the verdicts."""
    cards = [torch.device("cuda", index) for index in range(torch.cuda.device_count())]
    rows = []
    for device in cards or [torch.device("cpu")]:
        dtype = compute_dtype(device)
        verdicts = examine(device, dtype, 128, verdicts_file)
        rows.append(
            {
                "device": _card(device),
                "dtype": str(dtype).removeprefix("torch."),
                "head_dim": 128,
                "chosen": fastest(device.type, verdicts),
                "verdicts": [dataclasses.asdict(verdict) for verdict in verdicts],
            }
        )
    return rows


if __name__ == "__main__":
    print(json.dumps(survey(Path(sys.argv[1]))))
