"""On a card: every attention kernel and the softcap kernel against the truth, and the choice between them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from omni_model.model.attention import attend
from omni_model.model.backends import CANDIDATES, KERNELS, TOLERANCE, choose, examine, probe
from omni_model.model.probe import errors
from tests.test_kernels import SOFTCAP, inputs, passes, softcap_errors

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA card is at hand"),
]
CARD = torch.device("cuda", 0)
MUST_WORK = "triton"  # the others depend on the card, on what is installed, and sdpa on who adds first


@pytest.fixture(scope="module")
def verdicts_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("verdicts") / "attention.json"


@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("name", CANDIDATES["cuda"])
def test_a_kernel_that_is_believed_is_right(
    name: str, dtype: torch.dtype, head_dim: int, verdicts_file: Path
) -> None:
    verdict = probe(name, CARD, dtype, head_dim, verdicts_file)
    if not verdict.works and name != MUST_WORK:
        pytest.skip(f"{name}: {verdict.sentence}")
    assert verdict.works, verdict.sentence
    tolerance = TOLERANCE[str(dtype).removeprefix("torch.")]
    assert max(errors(KERNELS[name], CARD, dtype, head_dim).values()) < tolerance
    assert torch.cuda.is_available()
    torch.cuda.synchronize()


@pytest.mark.parametrize("name", ["flash", "flex", "triton", "fa3"])
@pytest.mark.parametrize(
    ("tokens", "window"), [(1, 5), (128, 0), (1000, 1), (1024, 512), (2048, 512), (2047, 2048)]
)
def test_windows_and_lengths_of_training(name: str, tokens: int, window: int, verdicts_file: Path) -> None:
    """Against plain attention in fp32 on the card, whose own errors are far below those of bf16."""
    verdict = probe(name, CARD, torch.bfloat16, 128, verdicts_file)
    if not verdict.works:
        pytest.skip(f"{name}: {verdict.sentence}")
    arguments = [x.to(CARD) for x in inputs((2, tokens, 6, 6, 128, window, "bfloat16"))]
    truth = passes(attend, *(x.float() for x in arguments), window)
    found = passes(KERNELS[name], *arguments, window)
    for one, other in zip(truth, found, strict=True):
        size = one.norm(dim=-1).square().mean().sqrt().clamp(min=1e-2)  # a single key has no dq and dk
        assert (other.float() - one).norm(dim=-1).max() < 0.1 * size


def test_triton_attention_gives_the_same_bits_again(verdicts_file: Path) -> None:
    arguments = [x.to(CARD) for x in inputs((4, 2000, 6, 3, 128, 512, "bfloat16"))]
    first, again = (passes(KERNELS["triton"], *arguments, 512) for _ in range(2))
    assert all(torch.equal(one, other) for one, other in zip(first, again, strict=True))


@pytest.mark.parametrize("case", SOFTCAP, ids=str)
def test_the_softcap_kernel(case: tuple[int, int, int, float, str]) -> None:
    from omni_model.model.triton_softcap import chunk_loss_and_grad

    found = softcap_errors(chunk_loss_and_grad, case, CARD)
    assert found["loss"] < 1e-5
    assert found["grad"] < {"float32": 1e-5, "float16": 1e-3, "bfloat16": 4e-3}[case[-1]]
    assert found["ignored"] == found["padding"] == 0


def test_the_softcap_kernel_at_the_size_of_a_step_gives_the_same_bits_again() -> None:
    from omni_model.model.triton_softcap import chunk_loss_and_grad

    z = torch.randn(4096, 32768, device=CARD).bfloat16() * 10
    targets = torch.randint(32768, (4096,), device=CARD)
    first, again = z.clone(), z.clone()
    losses = [chunk_loss_and_grad(x, targets, 15.0) for x in (first, again)]
    assert losses[0] == losses[1]
    assert torch.equal(first, again)
    logits = 15 * torch.tanh(z.float() / 15)
    torch.testing.assert_close(losses[0], torch.nn.functional.cross_entropy(logits, targets, reduction="sum"))


def test_the_choice_is_the_fastest_that_works(verdicts_file: Path) -> None:
    verdicts = examine(CARD, torch.bfloat16, 128, verdicts_file)
    chosen = choose(CARD, torch.bfloat16, 128, verdicts_file)
    assert [verdict.kernel for verdict in verdicts] == list(CANDIDATES["cuda"])
    times = {verdict.kernel: verdict.ms for verdict in verdicts if verdict.works and verdict.ms}
    assert times[chosen] <= 1.05 * min(times.values())
    print({verdict.kernel: verdict.sentence for verdict in verdicts})
