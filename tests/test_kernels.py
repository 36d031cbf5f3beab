"""The kernels for cards, without one: run by Triton's interpreter, and compiled for cards that are not here.

`python -m tests.test_kernels interpret` and `... compile SM` do the work and print what they found, since how
Triton is to run must be settled before it is imported.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from omni_model.model.attention import attend, band
from omni_model.model.probe import difference

ROOT = Path(__file__).resolve().parent.parent
needs_triton = pytest.mark.skipif(find_spec("triton") is None, reason="Triton is not installed")

# (B, T, H, G, D, window, dtype): lengths that are no multiple of a tile, windows at every kind of border.
ATTENTION = [
    (1, 110, 4, 2, 32, 37, "float32"),
    (1, 70, 1, 1, 64, 0, "float32"),
    (2, 75, 2, 1, 48, 74, "float32"),  # a head dim between two powers of two
    (1, 100, 1, 1, 128, 99, "float32"),
    (1, 129, 2, 1, 64, 10**6, "bfloat16"),
    (1, 257, 2, 1, 64, 64, "bfloat16"),
    (1, 260, 1, 1, 128, 100, "bfloat16"),
    (2, 40, 2, 2, 16, 1, "float16"),
    (1, 1, 2, 2, 16, 5, "float32"),
]
# (rows, V, stride, cap, dtype)
SOFTCAP = [
    (6, 300, 300, 15.0, "float32"),
    (5, 5000, 5056, 15.0, "float32"),  # more than one block; padding behind every row
    (5, 4096, 4096, 50.0, "bfloat16"),
    (5, 130, 130, 15.0, "float16"),
]
TOLERANCE = {"float32": 1e-5, "float16": 5e-3, "bfloat16": 3e-2}
SHARED_BYTES = 99 * 1024  # what one block may have on sm_86, sm_89 and sm_120


def worker(*arguments: str, **environment: str) -> dict[str, Any]:
    done = subprocess.run(
        [sys.executable, "-m", "tests.test_kernels", *arguments],
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1"} | environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found: dict[str, Any] = json.loads(done.stdout)
    return found


@pytest.fixture(scope="module")
def interpreted() -> dict[str, Any]:
    return worker("interpret", TRITON_INTERPRET="1")


@needs_triton
@pytest.mark.parametrize("case", ATTENTION, ids=str)
def test_triton_attention_and_its_gradients_are_the_plain_ones(
    interpreted: dict[str, Any], case: tuple[Any, ...]
) -> None:
    errors = interpreted[str(case)]
    assert max(errors.values()) < TOLERANCE[case[-1]], errors


@needs_triton
def test_triton_attention_inside_a_compiled_function(interpreted: dict[str, Any]) -> None:
    assert interpreted["compiled"] < 1e-5


@needs_triton
def test_triton_attention_refuses_what_it_cannot_do(interpreted: dict[str, Any]) -> None:
    parts = ["D from 16 to 128", "divide", "fp32", "0 or more"]
    for sentence, part in zip(interpreted["refused"], parts, strict=True):
        assert part in sentence


@needs_triton
@pytest.mark.parametrize("case", SOFTCAP, ids=str)
def test_triton_softcap_loss_and_gradient_are_the_plain_ones(
    interpreted: dict[str, Any], case: tuple[Any, ...]
) -> None:
    errors = interpreted[str(case)]
    assert errors["loss"] < 1e-6
    assert errors["grad"] < {"float32": 1e-6, "float16": 1e-3, "bfloat16": 4e-3}[case[-1]]
    assert errors["ignored"] == 0
    assert errors["padding"] == 0


@needs_triton
def test_the_kernels_fit_the_shared_memory_of_small_cards(tmp_path: Path) -> None:
    found = worker("compile", "120", TRITON_CACHE_DIR=str(tmp_path))
    assert len(found) == 4
    assert all(0 < shared <= SHARED_BYTES for shared in found.values()), found


@pytest.mark.parametrize(
    ("tokens", "window"), [(256, 0), (384, 100), (384, 128), (512, 127), (512, 129), (640, 300), (256, 256)]
)
def test_flex_lists_the_blocks_that_are_seen(tokens: int, window: int) -> None:
    from omni_model.model.flex_attention import BLOCK, block_mask

    mask = block_mask(tokens, window, torch.device("cpu"))
    place = torch.arange(tokens).unsqueeze(0)
    seen = band(place, place, window)[0, 0]
    blocks = seen.unflatten(0, (-1, BLOCK)).unflatten(2, (-1, BLOCK)).transpose(1, 2).flatten(2)
    whole = torch.zeros(blocks.shape[:2], dtype=torch.bool)
    for row, count in enumerate(mask.full_kv_num_blocks[0, 0]):
        whole[row, mask.full_kv_indices[0, 0, row, :count].long()] = True
    assert torch.equal(mask.to_dense()[0, 0].bool(), blocks.any(2))
    assert torch.equal(whole, blocks.all(2))
    zero = torch.tensor(0)
    assert torch.equal(mask.mask_mod(zero, zero, place[0][:, None], place[0][None, :]), seen)


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
def test_flex_attention_is_the_plain_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """Forward and unfused: on a processor FlexAttention has no backward, and compiling it takes minutes."""
    from omni_model.model import flex_attention

    monkeypatch.setattr(flex_attention, "_compiled", lambda: flex_attention.flex_attention)
    made = torch.Generator().manual_seed(0)
    for tokens, window in ((300, 100), (300, 1000)):
        q, k, v = (torch.randn(2, tokens, heads, 32, generator=made) for heads in (4, 2, 2))
        with torch.no_grad():
            y = flex_attention.banded_attention(q, k, v, window)
        torch.testing.assert_close(y, attend(q, k, v, window), rtol=1e-5, atol=1e-5)


# -- the workers --------------------------------------------------------------------------------------------


def repair_the_interpreter() -> None:
    """Its dot takes bf16 numbers for the integers that hold them."""
    import triton.language as tl
    from triton.runtime.interpreter import InterpreterBuilder

    dot = InterpreterBuilder.create_dot

    def create_dot(self: Any, a: Any, b: Any, *others: Any) -> Any:
        a, b = (self.cast_impl(x, tl.float32) if x.dtype.scalar == tl.bfloat16 else x for x in (a, b))
        return dot(self, a, b, *others)

    InterpreterBuilder.create_dot = create_dot


def inputs(case: tuple[Any, ...]) -> tuple[Tensor, ...]:
    """q, k, v as views of one tensor, and dy."""
    batch, tokens, heads, kv_heads, dim, _, dtype = case
    made = torch.Generator().manual_seed(tokens)
    many = torch.randn(batch, tokens, 2 * heads + 2 * kv_heads, dim, generator=made)
    return many.to(getattr(torch, dtype)).split([heads, kv_heads, kv_heads, heads], 2)


def passes(kernel: Any, q: Tensor, k: Tensor, v: Tensor, dy: Tensor, window: int) -> list[Tensor]:
    q, k, v = (x.detach().requires_grad_() for x in (q, k, v))
    y = kernel(q, k, v, window)
    return [y.detach(), *torch.autograd.grad(y, (q, k, v), dy)]


def attention_errors(kernel: Any, case: tuple[Any, ...]) -> dict[str, float]:
    arguments = inputs(case)
    truth = passes(attend, *(x.float() for x in arguments), case[5])
    found = passes(kernel, *arguments, case[5])
    single = case[5] == 0 or case[1] == 1  # with one key, q and k change nothing: 0 is nothing to divide by
    errors = {}
    for name, one, other in zip(("y", "dq", "dk", "dv"), truth, found, strict=True):
        absolute = single and name in ("dq", "dk")
        errors[name] = other.abs().max().item() if absolute else difference(one, other.float())
    return errors


def softcap_errors(
    kernel: Any, case: tuple[Any, ...], device: str | torch.device = "cpu"
) -> dict[str, float]:
    rows, vocabulary, stride, cap, dtype = case
    made = torch.Generator().manual_seed(rows)
    memory = (torch.randn(rows, stride, generator=made) * 10).to(device, getattr(torch, dtype))
    z = memory[:, :vocabulary]
    z[0, :8] *= 1000  # far beyond the cap: tanh is 1, its derivative 0
    targets = torch.randint(vocabulary, (rows,), generator=made).to(device)
    targets[0], targets[1] = 3, -1
    wide = z.double().requires_grad_()
    logits = cap * torch.tanh(wide / cap)
    loss = torch.nn.functional.cross_entropy(logits, targets, ignore_index=-1, reduction="sum")
    loss.backward()
    padding = memory[:, vocabulary:].clone()
    found = kernel(z, targets, cap)
    return {
        "loss": abs(found.item() - loss.item()) / loss.item(),
        "grad": (z.double() - wide.grad).abs().max().item() / wide.grad.abs().max().item(),
        "ignored": z[1].abs().max().item(),
        "padding": (memory[:, vocabulary:] != padding).sum().item(),
    }


def refusals(kernel: Any) -> list[str]:
    q = torch.randn(1, 8, 3, 16)
    bad = [(q[..., :8], q[..., :8], 1), (q, q[:, :, :2], 1), (q.double(), q.double(), 1), (q, q, -1)]
    sentences = []
    for queries, keys, window in bad:
        with pytest.raises(ValueError) as raised:  # noqa: PT011 the sentences are looked at by the test
            kernel(queries, keys, keys, window)
        sentences.append(str(raised.value))
    return sentences


def interpret() -> dict[str, Any]:
    repair_the_interpreter()
    from omni_model.model.triton_attention import banded_attention
    from omni_model.model.triton_softcap import chunk_loss_and_grad

    torch.set_num_threads(1)
    found: dict[str, Any] = {str(case): attention_errors(banded_attention, case) for case in ATTENTION}
    found |= {str(case): softcap_errors(chunk_loss_and_grad, case) for case in SOFTCAP}
    compiled = torch.compile(banded_attention, backend="aot_eager")
    found["compiled"] = max(attention_errors(compiled, (1, 40, 2, 1, 16, 7, "float32")).values())
    found["refused"] = refusals(banded_attention)
    return found


def compile_for(card: int) -> dict[str, int]:
    """Shared memory in bytes of each kernel, compiled for a card that need not be here."""
    import triton
    from triton.backends.compiler import GPUTarget

    from omni_model.model import triton_attention, triton_softcap

    class Card:
        def get_current_target(self) -> GPUTarget:
            return GPUTarget("cuda", card, 32)

        def get_current_device(self) -> int:
            return 0

        def get_current_stream(self, device: int) -> int:
            return 0

    triton.runtime.driver.set_active(Card())
    x = torch.empty(1, 256, 2, 128, dtype=torch.bfloat16)
    lse, view = torch.empty(1, 2, 256), triton_attention._view(x)
    sizes, tiles = triton_attention._sizes(x, x, 100), triton_attention._tiles(x)
    kernels = [
        (triton_attention._forward_kernel, (view, view, view, view, lse)),
        (triton_attention._dq_kernel, (view, view, view, view, view, lse, lse, view)),
        (triton_attention._dkv_kernel, (view, view, view, view, lse, lse, view, view)),
    ]
    found = {}
    for (kernel, tensors), tile in zip(kernels, tiles, strict=True):
        constants = triton_attention._constants(x, tile)
        found[kernel.__name__] = kernel.warmup(*tensors, *sizes, **constants, grid=(1, 1)).metadata.shared
    z = torch.empty(8, 32768, dtype=torch.bfloat16)
    losses, targets = torch.empty(8), torch.zeros(8, dtype=torch.long)
    arguments = (z, targets, losses, z.stride(0), z.size(1), 15.0, triton_softcap.BLOCK)
    softcap = triton_softcap._kernel.warmup(*arguments, num_warps=8, grid=(8,))
    return found | {"softcap": softcap.metadata.shared}


if __name__ == "__main__":
    print(json.dumps(interpret() if sys.argv[1] == "interpret" else compile_for(int(sys.argv[2]))))
