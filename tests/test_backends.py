"""Attention kernels on trial: which are believed, and that a bad one harms nobody."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from omni_model.model import backends
from omni_model.model.attention import attend
from omni_model.model.backends import (
    CANDIDATES,
    KERNELS,
    TOLERANCE,
    Verdict,
    examine,
    fastest,
    probe,
)
from omni_model.model.probe import errors, repeats

ROOT = Path(__file__).resolve().parent.parent
CPU = torch.device("cpu")


class WrongBackward(torch.autograd.Function):
    """The right y, and a gradient for v that is a hundredth off."""

    @staticmethod
    def forward(ctx: Any, v: Tensor) -> Tensor:
        return v.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad * 1.01


def exits(q: Tensor, k: Tensor, v: Tensor, window: int) -> Tensor:
    print("kernel image is not for this card", file=sys.stderr)
    sys.exit(1)


def vanishes(q: Tensor, k: Tensor, v: Tensor, window: int) -> Tensor:
    os._exit(0)


def crashes(q: Tensor, k: Tensor, v: Tensor, window: int) -> Tensor:
    os.kill(os.getpid(), signal.SIGSEGV)
    return q


def hangs(q: Tensor, k: Tensor, v: Tensor, window: int) -> Tensor:
    time.sleep(600)
    return q


def sees_one_more(q: Tensor, k: Tensor, v: Tensor, window: int) -> Tensor:
    return attend(q, k, v, window + 1)


def wrong_backward(q: Tensor, k: Tensor, v: Tensor, window: int) -> Tensor:
    return attend(q, k, WrongBackward.apply(v), window)


def not_finite(q: Tensor, k: Tensor, v: Tensor, window: int) -> Tensor:
    return attend(q, k, v, window) / 0


FAKES = {kernel.__name__: kernel for kernel in (exits, vanishes, crashes, hangs, wrong_backward)}
CHILD = (
    f"import sys; sys.path.insert(0, {str(ROOT)!r}); from tests.test_backends import FAKES;"
    " from omni_model.model.probe import main; sys.exit(main(sys.argv[1:], FAKES))"
)


@pytest.fixture(scope="module")
def verdicts(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Verdict]:
    folder = tmp_path_factory.mktemp("verdicts")

    def ask(name: str) -> Verdict:
        limit_s = 6.0 if name == "hangs" else 120.0
        command = (sys.executable, "-c", CHILD)
        cache_file = folder / name / "verdicts.json"
        return probe(name, CPU, torch.float32, 16, cache_file, command=command, limit_s=limit_s)

    with ThreadPoolExecutor(2) as pool:
        return dict(zip(FAKES, pool.map(ask, FAKES), strict=True))


@pytest.mark.parametrize(
    ("name", "sentence"),
    [
        ("exits", "ended its process with code 1 before it answered: kernel image is not for this card"),
        ("vanishes", "ended its process with code 0 before it answered"),
        ("crashes", "died of SIGSEGV before it answered"),
        ("hangs", "did not answer within 6 s"),
        ("wrong_backward", "returns a wrong dv: off by 0.01 of its size"),
    ],
)
def test_a_bad_kernel_is_refused_in_one_sentence(
    verdicts: dict[str, Verdict], name: str, sentence: str
) -> None:
    assert not verdicts[name].works
    assert verdicts[name].sentence.startswith(sentence)


def forgets(q: Tensor, k: Tensor, v: Tensor, window: int) -> Tensor:
    return attend(q, k, v + 1e-7 * torch.randn_like(v), window)


def test_a_kernel_that_adds_in_any_order_is_found_out() -> None:
    assert repeats(attend, CPU, torch.float32, (1, 64, 2, 16))
    assert not repeats(forgets, CPU, torch.float32, (1, 64, 2, 16))


def test_the_strict_switch_is_set_for_one_backward_step_only() -> None:
    seen = []

    class Step(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            return x * 2

        @staticmethod
        def backward(ctx: Any, grad: Tensor) -> Tensor:
            strict = not torch.is_deterministic_algorithms_warn_only_enabled()
            seen.append((torch.are_deterministic_algorithms_enabled(), strict))
            return grad * 2

    x = torch.ones(3, requires_grad=True)
    inner = Step.apply(x)
    backends._in_fixed_order(Step.apply(inner)).sum().backward()
    assert seen == [(True, True), (False, True)]
    assert not torch.are_deterministic_algorithms_enabled()
    assert torch.equal(x.grad, torch.full((3,), 4.0))


def test_what_is_not_finite_is_not_compared() -> None:
    with pytest.raises(ValueError, match="numbers that are not finite"):
        errors(not_finite, CPU, torch.float32, 16)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_one_key_too_many_is_told_from_rounding(dtype: str) -> None:
    right, wrong = (
        max(errors(kernel, CPU, getattr(torch, dtype), 64).values()) for kernel in (attend, sees_one_more)
    )
    assert 2 * right < TOLERANCE[dtype] < wrong / 10


def ends_with(code: int) -> tuple[str, ...]:
    return sys.executable, "-c", f"raise SystemExit({code})"


def test_a_verdict_is_found_once_per_dtype_head_dim_torch_and_code(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache_file = tmp_path / "new" / "verdicts.json"
    codes = iter(range(10, 30))

    def ask(dtype: torch.dtype = torch.float32, head_dim: int = 16) -> str:
        return probe("x", CPU, dtype, head_dim, cache_file, command=ends_with(next(codes))).sentence

    first = ask()
    assert "code 10" in first
    assert ask() == first
    assert "code 12" in ask(dtype=torch.bfloat16)
    assert "code 13" in ask(head_dim=32)
    monkeypatch.setattr(backends, "_code_digest", lambda: "edited")
    assert "code 14" in ask()
    monkeypatch.setattr(torch, "__version__", "9.9.9")
    assert "code 15" in ask()
    monkeypatch.undo()
    assert ask() == first
    assert len(json.loads(cache_file.read_text())) == 5
    cache_file.write_text("{ half a file")
    assert "code 17" in ask()


def test_a_card_that_others_fill_says_nothing_about_a_kernel(tmp_path: Path) -> None:
    cache_file = tmp_path / "verdicts.json"
    report = "import json, sys; json.dump({'failure': 'OutOfMemoryError: full'}, open(sys.argv[-1], 'w'))"
    verdict = probe("x", CPU, torch.float32, 16, cache_file, command=(sys.executable, "-c", report))
    assert verdict.sentence == "OutOfMemoryError: full"
    assert not cache_file.exists()


def test_a_package_that_is_not_there_is_said_without_a_child(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(backends.NEEDS, "fa3", "no_such_package")
    verdict = probe("fa3", CPU, torch.bfloat16, 64, tmp_path / "v.json", command=ends_with(1))
    assert verdict.sentence == "needs the package no_such_package, which is not installed"
    assert not (tmp_path / "v.json").exists()  # it may be installed tomorrow


def verdict(kernel: str, ms: float | None, works: bool = True) -> Verdict:
    return Verdict(kernel, works, 0.0, ms, "")


@pytest.mark.parametrize(
    ("device", "found", "name"),
    [
        ("cuda", [verdict("flash", 2.0), verdict("triton", 1.0), verdict("sdpa", 3.0)], "triton"),
        ("cuda", [verdict("flash", 1.04), verdict("triton", 1.0)], "flash"),
        ("cuda", [verdict("flash", 0.1, works=False), verdict("sdpa", 3.0)], "sdpa"),
        ("cuda", [verdict("flash", 0.1, works=False)], "sdpa"),
        ("cpu", [verdict("first", 9.0), verdict("second", 1.0)], "first"),
        ("mps", [], "sdpa"),
    ],
)
def test_the_fastest_that_works_is_chosen_on_a_card_and_the_first_elsewhere(
    device: str, found: list[Verdict], name: str
) -> None:
    assert fastest(device, found) == name


def chosen(device: torch.device, cache_file: Path) -> str:
    return fastest(device.type, examine(device, torch.float32, 32, cache_file))


def test_the_choice_on_a_processor(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache_file = tmp_path / "verdicts.json"
    assert chosen(CPU, cache_file) == "banded"
    (kept,) = json.loads(cache_file.read_text()).values()
    assert kept["max_error"] < 1e-5
    assert kept["ms"] is None  # nothing is timed on a processor
    monkeypatch.setattr(subprocess, "run", None)  # from here on the file has to be enough
    assert chosen(CPU, cache_file) == "banded"
    assert [verdict.kernel for verdict in examine(CPU, torch.float32, 32, cache_file)] == ["banded"]
    assert chosen(torch.device("meta"), cache_file) == "sdpa"


def test_every_candidate_is_a_kernel_and_the_plain_one_is_among_them() -> None:
    for names in CANDIDATES.values():
        assert set(names) <= set(KERNELS)
        assert names[-1] == "sdpa"
