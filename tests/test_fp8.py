"""fp8: the emulated product against sums written out, the layer against exact gradients, a GPT learning."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor

from omni_model.model.fp8 import (
    GRADIENT,
    INPUT,
    Float8Linear,
    Float8Weight,
    Quantised,
    fits_fp8,
    has_fp8_units,
    multiply,
    quantise,
    use_fp8,
)
from omni_model.model.gpt import GPT, GPTConfig
from omni_model.model.layers import Linear
from omni_model.training.optim import MuonAdamW, parameter_groups

E4M3_STEP, E5M2_STEP = 2.0**-4, 2.0**-3  # largest relative error of rounding to 3 and to 2 bits of mantissa


def random(*shape: int, seed: int = 0, spread: float = 1.0) -> Tensor:
    return spread * torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def relative(approximate: Tensor, exact: Tensor) -> float:
    truth = exact.detach().double()
    return float((approximate.detach().double() - truth).norm() / truth.norm())


def small_gpt(width: int = 128, dtype: torch.dtype = torch.float32) -> GPT:
    shape = {"n_layer": 2, "n_head": 2, "n_kv_head": 2, "n_embd": width}
    return GPT(GPTConfig(sequence_len=64, vocab_size=256, **shape), dtype)


# ---- numbers -----------------------------------------------------------------------------------------------


def test_quantising_puts_the_largest_entry_at_the_end_of_the_range() -> None:
    x8, scale = quantise(torch.tensor([[0.5, -7.0], [1.0, 3.5]]), INPUT)
    assert x8.float().tolist() == [[32.0, -448.0], [64.0, 224.0]]
    assert scale.dtype == torch.float32
    assert scale.item() == pytest.approx(7 / 448, rel=1e-7)
    assert quantise(torch.tensor([-3.0]), GRADIENT).data.float().item() == -57344.0


def test_quantising_rounds_to_the_bits_of_the_format() -> None:
    for dtype, step in ((INPUT, E4M3_STEP), (GRADIENT, E5M2_STEP)):
        x = random(400, 30)
        x8, scale = quantise(x, dtype)
        large = x.abs() > 0.01  # smaller ones may fall among the subnormal numbers
        error = ((x8.float() * scale - x).abs() / x.abs())[large].max()
        assert step / 2 < error <= step * 1.001


def test_zeros_and_tiny_tensors_have_a_finite_scale() -> None:
    for tiny in (torch.zeros(4, 4), torch.full((4, 4), 1e-30)):
        x8, scale = quantise(tiny, INPUT)
        assert torch.isfinite(scale)
        assert (x8.float() * scale).abs().max() < 1e-12


def written_out(a: Quantised, b: Quantised) -> Tensor:
    """a (R, S) times b (C, S) transposed, entry by entry in fp64."""
    entries = [
        [sum(x * y for x, y in zip(row, column, strict=True)) for column in b.data.double().tolist()]
        for row in a.data.double().tolist()
    ]
    return torch.tensor(entries, dtype=torch.float64) * a.scale.double() * b.scale.double()


@pytest.mark.parametrize("formats", [(INPUT, INPUT), (GRADIENT, INPUT)])
def test_emulated_product_is_the_sum_written_out(formats: tuple[torch.dtype, torch.dtype]) -> None:
    a, b = quantise(random(16, 32), formats[0]), quantise(random(48, 32, seed=1), formats[1])
    exact = written_out(a, b)
    assert relative(multiply(a, b, torch.float32, native=False), exact) < 1e-6
    assert relative(multiply(a, b, torch.bfloat16, native=False), exact) < 2**-8


@pytest.mark.parametrize("formats", [(INPUT, INPUT), (GRADIENT, INPUT)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_emulated_product_is_torchs_own(formats: tuple[torch.dtype, torch.dtype], dtype: torch.dtype) -> None:
    a, b = quantise(random(64, 128), formats[0]), quantise(random(96, 128, seed=1), formats[1])
    try:
        truth = multiply(a, b, dtype, native=True)
    except (NotImplementedError, RuntimeError):
        pytest.skip("this torch has no fp8 product on a CPU")
    torch.testing.assert_close(multiply(a, b, dtype, native=False), truth)


# ---- the layer ---------------------------------------------------------------------------------------------


def layer(width_in: int = 128, width_out: int = 192) -> Float8Linear:
    linear = Float8Linear(width_in, width_out)
    with torch.no_grad():
        linear.weight.copy_(random(width_out, width_in, seed=2, spread=0.1))
    return linear


def test_layer_makes_its_three_products_from_the_quantised_tensors() -> None:
    linear, x, grad = layer(), random(5, 16, 128).requires_grad_(), random(5, 16, 192, seed=3, spread=1e-5)
    y = linear(x)
    y.backward(grad)
    x8, weight8, grad8 = (
        Quantised(*quantise(tensor, dtype)).data.double() * quantise(tensor, dtype).scale
        for tensor, dtype in (
            (x.flatten(0, 1), INPUT),
            (linear.weight, INPUT),
            (grad.flatten(0, 1), GRADIENT),
        )
    )
    assert relative(y.flatten(0, 1), x8 @ weight8.T) < 1e-6
    assert relative(x.grad.flatten(0, 1), grad8 @ weight8) < 1e-6
    assert relative(linear.weight.grad, grad8.T @ x8) < 1e-6


def test_layer_is_near_the_exact_one_but_not_equal() -> None:
    linear, x, grad = layer(), random(64, 128).requires_grad_(), random(64, 192, seed=3)
    y = linear(x)
    y.backward(grad)
    exact_x = x.detach().clone().requires_grad_()
    weight = linear.weight.detach().clone().requires_grad_()
    exact = exact_x @ weight.T
    exact.backward(grad)
    for fp8, truth, steps in (
        (y, exact, 2 * E4M3_STEP),
        (x.grad, exact_x.grad, E4M3_STEP + E5M2_STEP),
        (linear.weight.grad, weight.grad, E4M3_STEP + E5M2_STEP),
    ):
        assert 0.005 < relative(fp8, truth) < steps / 2  # errors of both factors, averaged over the entries


def test_layer_reads_any_number_of_rows() -> None:
    linear, x = layer(), random(37, 128)
    grads = []
    for rows in (x, torch.cat([x, torch.zeros(11, 128)])):
        linear.weight.grad = None
        y = linear(rows)
        y[:37].square().sum().backward()
        grads.append(linear.weight.grad)
    assert torch.equal(linear(x), linear(torch.cat([x, torch.zeros(11, 128)]))[:37])
    torch.testing.assert_close(grads[0], grads[1])


def test_layer_keeps_nanochats_dtypes() -> None:
    linear, x = layer(), random(16, 128).bfloat16().requires_grad_()
    y = linear(x)
    y.sum().backward()
    assert y.dtype == x.grad.dtype == torch.bfloat16
    assert linear.weight.grad.dtype == torch.float32
    assert torch.equal(linear.weight.grad, linear.weight.grad.bfloat16().float())  # made in dy's dtype


def test_frozen_weight_gets_no_gradient_and_x_still_does() -> None:
    linear, x = layer().requires_grad_(False), random(16, 128).requires_grad_()
    linear(x).sum().backward()
    assert linear.weight.grad is None
    assert x.grad is not None


def test_without_gradients_the_layer_is_the_plain_one() -> None:
    linear, x = layer(), random(16, 128)
    with torch.no_grad():
        assert torch.equal(linear(x), x @ linear.weight.T)
    assert not torch.equal(linear(x), x @ linear.weight.T)


def test_weight_is_quantised_once_per_update() -> None:
    linear, x = layer(), random(16, 128)
    before = linear(x)
    first = linear.weight8
    linear(x)
    linear.refresh(x.dtype)
    assert linear.weight8 is first
    with torch.no_grad():
        linear.weight.mul_(2)
    assert torch.equal(linear(x), 2 * before)
    assert linear.weight8 is not first


def test_products_of_a_head_come_in_chunks() -> None:
    """What a chunked loss needs: the same numbers as the layer's when the chunk is everything."""
    linear, x, grad = layer(), random(20, 128).requires_grad_(), random(20, 192, seed=3)
    weight8 = Float8Weight.of(linear.weight)
    y, kept = weight8.forward(x)
    grad_x, grad_weight = weight8.backward(grad, kept)
    linear(x).backward(grad)
    assert torch.equal(y, linear(x))
    assert torch.equal(grad_x, x.grad)
    assert torch.equal(grad_weight, linear.weight.grad)
    assert weight8.backward(grad, kept, wants_x=False, wants_weight=False) == (None, None)


def test_a_compiled_layer_computes_the_same() -> None:
    linear, x, results = layer(), random(16, 128), []
    linear.refresh(x.dtype)
    for run in (linear, torch.compile(linear, backend="aot_eager", fullgraph=True)):
        read = x.clone().requires_grad_()
        y = run(read)
        y.square().sum().backward()
        results.append((y.detach(), read.grad, linear.weight.grad.clone()))
        linear.weight.grad = None
    for eager, compiled in zip(*results, strict=True):
        torch.testing.assert_close(compiled, eager)


# ---- the GPT -----------------------------------------------------------------------------------------------


def test_use_fp8_changes_the_wide_matrices_and_no_name() -> None:
    gpt = small_gpt()
    parameters, values = dict(gpt.named_parameters()), {k: v.clone() for k, v in gpt.state_dict().items()}
    names = use_fp8(gpt)
    assert "transformer.h.0.attn.c_q" in names
    assert "lm_head" in names
    assert not [name for name in names if "gate" in name]
    assert {name for name, module in gpt.named_modules() if isinstance(module, Float8Linear)} == set(names)
    assert list(gpt.state_dict()) == list(values)
    assert all(torch.equal(tensor, values[name]) for name, tensor in gpt.state_dict().items())
    assert all(parameter is parameters[name] for name, parameter in gpt.named_parameters())
    gpt.load_state_dict(values)


def test_use_fp8_needs_no_memory() -> None:
    with torch.device("meta"):
        gpt = small_gpt()
    use_fp8(gpt)
    assert all(parameter.is_meta for parameter in gpt.parameters())
    gpt.to_empty(device="cpu").init_weights()
    ids = torch.zeros(1, 8, dtype=torch.long)
    torch.testing.assert_close(gpt.eval()(ids), small_gpt()(ids), atol=0.05, rtol=0.1)


def test_rule_of_what_fits() -> None:
    assert fits_fp8(Linear(128, 144))
    assert not fits_fp8(Linear(112, 256))
    assert not fits_fp8(Linear(256, 112))
    assert not fits_fp8(Linear(136, 256))


def test_refusals_say_what_is_needed() -> None:
    with pytest.raises(ValueError, match=r"whole 16s, not 24 x 160"):
        Float8Linear(24, 160)
    with pytest.raises(ValueError, match=r"n_embd 64\) can run in fp8: .* multiples of 16 and at least 128"):
        use_fp8(small_gpt(width=64))


def test_the_heads_products_run_in_fp8_too() -> None:
    """With a vocabulary that is no whole number of blocks, and tokens that are not scored."""
    plain = GPT(GPTConfig(sequence_len=64, vocab_size=250, n_layer=1, n_head=1, n_kv_head=1, n_embd=128))
    with torch.no_grad():
        plain.lm_head.weight.mul_(100)
    gpt = copy.deepcopy(plain)
    use_fp8(gpt)
    ids = torch.arange(100).view(2, 50)
    targets = torch.where(ids % 5 == 0, -1, ids + 1)
    losses = [each(ids, targets) for each in (gpt, plain)]
    for loss in losses:
        loss.backward()
    assert losses[0].item() == pytest.approx(losses[1].item(), rel=0.02)
    assert losses[0].item() != losses[1].item()
    grads = [each.lm_head.weight.grad for each in (gpt, plain)]
    assert 0.005 < relative(*grads) < 0.15
    assert not grads[0][250:].any()
    with torch.no_grad():
        assert torch.equal(gpt(ids, targets), plain(ids, targets))


def losses_of_training(gpt: GPT, steps: int = 25) -> list[float]:
    optimizer = MuonAdamW(parameter_groups(gpt))
    row = torch.arange(65) % 7 * 31 % 256
    ids, targets = row[:-1].repeat(4, 1), row[1:].repeat(4, 1)
    losses = []
    for _ in range(steps):
        loss = gpt(ids, targets)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def test_a_gpt_learns_in_fp8_as_in_fp32() -> None:
    exact, gpt = losses_of_training(small_gpt()), small_gpt()
    use_fp8(gpt)
    rounded = losses_of_training(gpt)
    assert rounded != exact
    assert rounded[-1] < 0.2 * rounded[0]
    assert rounded[:5] == pytest.approx(exact[:5], abs=0.1)
    assert sum(rounded) == pytest.approx(sum(exact), rel=0.1)


def test_an_optimizer_step_reaches_the_quantised_weights() -> None:
    gpt = small_gpt()
    use_fp8(gpt)
    losses_of_training(gpt, steps=2)
    gpt(torch.zeros(1, 8, dtype=torch.long))
    for module in gpt.modules():
        if isinstance(module, Float8Linear):
            weight8 = module.weight8
            assert relative(weight8.data.float() * weight8.scale, module.weight) < E4M3_STEP


# ---- a card ------------------------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA card")
def test_a_cards_products_are_the_emulated_ones() -> None:
    device = torch.device("cuda")
    if not has_fp8_units(device):
        pytest.skip("this card has no fp8 units")
    x, grad = (random(*shape, seed=shape[1]).to(device).bfloat16() for shape in ((1000, 512), (1000, 1024)))
    weight = random(1024, 512, seed=2, spread=0.1).to(device)
    card = Float8Weight.of(weight)
    assert card.native
    emulated = card._replace(native=False)
    (y, kept), (truth, _) = card.forward(x), emulated.forward(x)
    assert relative(y, truth) < 0.01  # fast sums keep fewer bits; bf16 results round to 2^-9
    for got, expected in zip(card.backward(grad, kept), emulated.backward(grad, kept), strict=True):
        assert relative(got, expected) < 0.004
    assert relative(y, x.float() @ weight.T) < E4M3_STEP
