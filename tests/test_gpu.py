"""On a card: every kernel against the truth and the choice between them, recorded steps, a training step."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from omni_model.model.attention import attend
from omni_model.model.backends import CANDIDATES, KERNELS, TOLERANCE, equip, examine, fastest, probe
from omni_model.model.decode import Decoder
from omni_model.model.gpt import GPT, GPTConfig
from omni_model.model.probe import errors
from omni_model.training.optim import MuonAdamW, parameter_groups
from tests.test_cache import long_ids
from tests.test_kernels import SOFTCAP, inputs, passes, softcap_errors
from tests.test_model import small_gpt

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
    chosen = fastest("cuda", verdicts)
    assert [verdict.kernel for verdict in verdicts] == list(CANDIDATES["cuda"])
    times = {verdict.kernel: verdict.ms for verdict in verdicts if verdict.works and verdict.ms}
    assert times[chosen] <= 1.05 * min(times.values())
    print({verdict.kernel: verdict.sentence for verdict in verdicts})


@torch.no_grad()
def test_recorded_steps_equal_forward_wherever_the_cache_went() -> None:
    """Through a CUDA graph: rows apart, back to a moment, and after a pass that moved the cache."""
    gpt, ids = small_gpt().to(CARD), long_ids(300).to(CARD)
    decoder, stepped, passed = Decoder(gpt), gpt.new_cache(2, 330), gpt.new_cache(2, 330)
    caches, moments = (stepped, passed), []
    for cache in caches:
        gpt(ids[:, :280], text_lengths=torch.tensor([280, 90], device=CARD), cache=cache, logits="last")
    for number, tokens in enumerate(ids.unbind(1)[100:140]):
        if number == 10:
            moments = [cache.snapshot() for cache in caches]
        if number == 20:
            for cache, moment in zip(caches, moments, strict=True):
                cache.restore(moment)
        if number == 30:
            for cache in caches:
                gpt(ids[:, 5:9], cache=cache)
        expected = gpt(tokens.unsqueeze(1), cache=passed)[:, 0]
        torch.testing.assert_close(decoder.step(tokens, stepped), expected, rtol=1e-3, atol=1e-3)
    assert torch.equal(stepped.positions, passed.positions)


def test_a_training_step_on_the_card_is_that_of_the_processor(verdicts_file: Path) -> None:
    """In bf16 with the kernels chosen for the card, blocks compiled: the loss of three steps within bf16."""
    ids = long_ids(400)[:, :300] % 100
    losses = []
    for device, dtype in ((torch.device("cpu"), torch.float32), (CARD, torch.bfloat16)):
        gpt = GPT(
            GPTConfig(sequence_len=512, vocab_size=100, n_layer=4, n_head=2, n_kv_head=1, n_embd=128), dtype
        )
        gpt.to(device)
        if device == CARD:
            equip(gpt, verdicts_file)
            gpt.compile_blocks()
        optimizer = MuonAdamW(parameter_groups(gpt), polar_dtype=dtype)
        for _ in range(3):
            loss = gpt(ids[:, :-1].to(device), ids[:, 1:].to(device))
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
    assert losses[3:] == pytest.approx(losses[:3], rel=0.02)
