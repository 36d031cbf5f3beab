"""The networks against the original's numbers and against themselves: alone, batched, cached, adapted."""

from __future__ import annotations

import dataclasses
import json
import math
import zlib
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from omni_model.model.attention import attend
from omni_model.model.banded import banded_attention
from omni_model.model.gpt import GPT, GPTConfig, window_sizes
from omni_model.model.lora import add_lora, load_adapter, lora_parameters, merged, save_adapter
from omni_model.model.omni import Descriptions, OmniModel, Sounds
from omni_model.model.projector import Projector
from omni_model.model.softcap_loss import mean_loss, softcap_logits, token_losses
from omni_model.training.optim import MuonAdamW, parameter_groups

GOLDEN = Path(__file__).parent / "golden" / "gpt.json"
TOLERANCE = 1e-5


def golden() -> dict[str, Any]:
    return json.loads(GOLDEN.read_text())


def formula_weights(name: str, shape: torch.Size) -> Tensor:
    """Weights both sides can make without a file: a hash of the index, uniform, scaled by role."""
    index = torch.arange(math.prod(shape), dtype=torch.float64)
    noise = torch.sin(index * 12.9898 + zlib.crc32(name.encode()) % 1000 * 78.233) * 43758.5453
    noise = noise - noise.floor()
    scale = 1.0 if name.endswith("wte.weight") else 0.3
    values = (2 * noise - 1) * scale if len(shape) > 1 else 0.5 + 0.3 * noise
    return values.reshape(shape).float()


@torch.no_grad()
def with_formula_weights(gpt: GPT) -> GPT:
    for name, parameter in gpt.named_parameters():
        parameter.copy_(formula_weights(name, parameter.shape))
    return gpt


def small_gpt(**changes: Any) -> GPT:
    """Non-zero everywhere, grouped heads, padded vocabulary, windows shorter than the sequences below."""
    shape = {"sequence_len": 512, "vocab_size": 100, "n_layer": 5, "n_head": 4, "n_kv_head": 2, "n_embd": 32}
    return with_formula_weights(GPT(GPTConfig(**(shape | changes))))


def batch(tokens: int = 300) -> tuple[Tensor, Tensor]:
    ids = (torch.arange(2 * 300) ** 2 * 7 + 3).reshape(2, 300) % 100
    targets = (ids * 3 + 1) % 100
    targets[:, ::5] = -1
    return ids[:, :tokens], targets[:, :tokens]


def sound(rows: int, seed: int = 0, count: int = 1) -> Tensor:
    return torch.randn(count, rows, 32, generator=torch.Generator().manual_seed(seed))


def assert_close(a: Tensor, b: Tensor, tolerance: float = TOLERANCE) -> None:
    torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


def moments(tensor: Tensor) -> list[float]:
    return [tensor.double().sum().item(), tensor.double().square().sum().item()]


# -- the original -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("depth", "count"),
    [(4, 36700242), (6, 73531538), (8, 125829354), (12, 286261730), (20, 896533746), (24, 1384122122)],
)
def test_parameter_counts_are_the_originals(depth: int, count: int) -> None:
    heads = math.ceil(64 * depth / 128)
    with torch.device("meta"):
        gpt = GPT(GPTConfig(n_layer=depth, n_head=heads, n_kv_head=heads, n_embd=128 * heads))
    assert gpt.num_params() == count


def test_initial_weights_are_the_originals() -> None:
    expected = golden()
    gpt = GPT(GPTConfig(**expected["config"]))
    assert set(gpt.state_dict()) == set(expected["init"])
    for name, value in gpt.state_dict().items():
        assert moments(value) == pytest.approx(expected["init"][name], rel=1e-6, abs=1e-6), name


def test_logits_loss_and_gradients_are_the_originals() -> None:
    expected = golden()
    gpt, (ids, targets) = with_formula_weights(GPT(GPTConfig(**expected["config"]))), batch()
    logits = gpt(ids)
    assert_close(logits[:, expected["positions"], :5], torch.tensor(expected["logits"]))
    assert logits.double().square().sum().item() == pytest.approx(expected["logits_square_sum"], rel=1e-6)
    loss = gpt(ids, targets)
    loss.backward()
    assert loss.item() == pytest.approx(expected["loss"], rel=1e-6)
    assert_close(gpt(ids, targets, loss_reduction="none")[1:7], torch.tensor(expected["losses"]))
    for name, parameter in gpt.named_parameters():
        assert parameter.grad is not None
        assert parameter.grad.norm().item() == pytest.approx(expected["gradient_norms"][name], rel=1e-5), name


def test_three_optimizer_steps_are_the_originals() -> None:
    expected = golden()
    gpt, (ids, targets) = with_formula_weights(GPT(GPTConfig(**expected["config"]))), batch()
    groups = parameter_groups(gpt, unembedding_lr=0.004, embedding_lr=0.2, weight_decay=0.1)
    optimizer = MuonAdamW(groups)
    for before in expected["losses_of_steps"]:
        loss = gpt(ids, targets)
        assert loss.item() == pytest.approx(before, rel=1e-5)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    for name, parameter in gpt.named_parameters():
        assert moments(parameter) == pytest.approx(expected["after"][name], rel=1e-4, abs=1e-3), name


def test_windows() -> None:
    assert window_sizes(GPTConfig()) == [512, 512, 512, 2048] * 3
    assert window_sizes(GPTConfig(sequence_len=512, n_layer=2, window_pattern="S")) == [128, 512]
    assert window_sizes(GPTConfig(sequence_len=3000, n_layer=1)) == [3000]
    assert window_sizes(GPTConfig(sequence_len=3000, n_layer=2))[0] == 768


def test_flops_per_token() -> None:
    gpt = small_gpt()
    matrices = 5 * (2 * 32 * 32 + 2 * 16 * 32 + 8 * 32 * 32) + 3 * 2 * 12 + 128 * 32 + 24
    assert gpt.flops_per_token() == 6 * matrices + 12 * 32 * (3 * 128 + 2 * 512)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"n_layer": 0}, "n_layer must be a positive integer, not 0."),
        ({"n_head": 5}, "n_embd 768 must be a multiple of n_head 5."),
        ({"n_kv_head": 4}, "n_head 6 must be a multiple of n_kv_head 4."),
        ({"window_pattern": "SXL"}, "window_pattern 'SXL' must be S and L."),
        ({"n_embd": 18}, "n_embd 18 must be at least 24"),
        ({"softcap": 0.0}, "softcap 0.0 must lie between 0 and 50."),
        ({"audio_value_embedding": "mean"}, "audio_value_embedding 'mean' is not zero or token0."),
    ],
)
def test_a_bad_configuration_says_what_is_wrong(change: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ValueError, match="^[^;]*$") as caught:
        GPTConfig(**change)
    assert sentence in str(caught.value)


def test_building_a_gpt_leaves_the_global_generator_alone() -> None:
    torch.manual_seed(3)
    before = torch.get_rng_state()
    add_lora(GPT(GPTConfig(n_layer=1, n_head=1, n_kv_head=1, n_embd=32)), 2, 4, seed=0)
    Projector(4, 8, 2, 8)
    assert torch.equal(before, torch.get_rng_state())


# -- attention and loss -----------------------------------------------------------------------------


@pytest.mark.parametrize("window", [0, 3, 9, 10, 11])
def test_attend_is_softmax_over_the_window(window: int) -> None:
    make = torch.Generator().manual_seed(1)
    q = torch.randn(2, 11, 4, 8, generator=make)
    k, v = torch.randn(2, 2, 11, 2, 8, generator=make)
    expected = torch.empty_like(q)
    for place in range(11):
        seen = slice(max(0, place - window), place + 1)
        keys, values = (t[:, seen].repeat_interleave(2, dim=2) for t in (k, v))
        weights = torch.einsum("bhd,bshd->bhs", q[:, place], keys).div(8**0.5).softmax(-1)
        expected[:, place] = torch.einsum("bhs,bshd->bhd", weights, values)
    assert_close(attend(q, k, v, window), expected)


@pytest.mark.parametrize("window", [0, 5, 63, 64, 100, 198, 199])
def test_banded_attention_is_the_plain_form_with_its_gradients(window: int) -> None:
    make = torch.Generator().manual_seed(1)
    shapes = ((2, 200, 4, 8), (2, 200, 2, 8), (2, 200, 2, 8))
    inputs = [torch.randn(shape, generator=make, requires_grad=True) for shape in shapes]
    grad = torch.randn(shapes[0], generator=make)
    results = []
    for kernel in (attend, banded_attention):
        y = kernel(*inputs, window)
        results.append([y, *torch.autograd.grad(y, inputs, grad)])
    for plain, banded in zip(*results, strict=True):
        assert_close(banded, plain)


def test_chunked_loss_is_the_plain_one_with_its_gradients() -> None:
    make = torch.Generator().manual_seed(2)
    x, weight = torch.randn(300, 16, generator=make), torch.randn(50000, 16, generator=make)
    targets = torch.randint(50000, (300,), generator=make)
    targets[::7] = -1
    results = []
    for chunked in (True, False):
        a, w = x.clone().requires_grad_(), weight.clone().requires_grad_()
        logits = softcap_logits(a, w, 15.0)
        loss = torch.nn.functional.cross_entropy(logits, targets, ignore_index=-1)
        loss = mean_loss(a, w, targets, 15.0) if chunked else loss
        (loss * 3).backward()
        results.append((loss.detach(), a.grad, w.grad))
    for chunk, plain in zip(*results, strict=True):
        assert (chunk - plain).norm() <= 5e-6 * plain.norm()
    w = weight.clone().requires_grad_()
    twice = mean_loss(x, w, targets, 15.0)
    twice.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="differentiated already"):
        twice.backward()
    losses = token_losses(x, weight, targets, 15.0)
    assert losses[targets == -1].abs().sum() == 0
    assert_close(losses.sum() / (targets != -1).sum(), results[0][0])
    assert torch.isnan(mean_loss(x, weight, torch.full_like(targets, -1), 15.0))


@pytest.mark.slow
def test_compiled_blocks_give_the_same_loss_and_gradients() -> None:
    """The windows differ and so do value embeddings, so every kind of block is compiled."""
    (ids, targets), models = batch(160), [small_gpt(n_layer=3), small_gpt(n_layer=3)]
    models[1].compile_blocks()
    losses = [gpt(ids, targets) for gpt in models]
    for loss in losses:
        loss.backward()
    assert_close(losses[1], losses[0])
    for plain, compiled in zip(*(gpt.parameters() for gpt in models), strict=True):
        assert (compiled.grad - plain.grad).norm() <= 1e-5 * plain.grad.norm() + 1e-9


# -- audio ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("policy", ["zero", "token0"])
def test_a_batch_with_audio_equals_each_sample_alone(policy: str) -> None:
    gpt, (ids, targets) = small_gpt(audio_value_embedding=policy), batch(200)
    ids, targets = ids.repeat(2, 1)[:3], targets.repeat(2, 1)[:3]
    audio, lengths = sound(150, count=3), torch.tensor([150, 0, 37])
    audio[1], audio[2, 37:] = torch.nan, torch.nan  # padding may hold anything
    logits = gpt(ids, audio_features=audio, audio_lengths=lengths)
    last = gpt(ids, audio_features=audio, audio_lengths=lengths, logits="last")
    losses = gpt(ids, targets, audio_features=audio, audio_lengths=lengths, loss_reduction="none")
    for row, length in enumerate(lengths.tolist()):
        own = {"audio_features": audio[row : row + 1, :length]} if length else {}
        alone = gpt(ids[row : row + 1], **own)
        assert alone.shape == (1, 200, 100)
        assert_close(logits[row : row + 1], alone)
        assert_close(last[row : row + 1], alone[:, -1:])
        own_losses = gpt(ids[row : row + 1], targets[row : row + 1], loss_reduction="none", **own)
        assert_close(losses.view(3, -1)[row], own_losses)


def test_audio_reaches_the_text_but_smear_does_not_cross() -> None:
    gpt, (ids, _) = small_gpt(), batch(20)
    one, two = (gpt(ids, audio_features=sound(9, seed, 2)) for seed in (0, 1))
    assert (one - two).abs().max() > 0.01
    with torch.no_grad():
        gpt.smear_lambda.zero_()
    unsmeared = gpt(ids[:, :1], audio_features=sound(9, 0, 2))
    assert_close(one[:, :1], unsmeared)  # the first text token has no neighbour


@pytest.mark.parametrize("policy", ["zero", "token0"])
def test_audio_inside_the_text_is_what_a_cache_reads_piece_by_piece(policy: str) -> None:
    gpt, (ids, targets) = small_gpt(audio_value_embedding=policy), batch(60)
    ids, targets, audio = ids[:1], targets[:1], sound(30)
    places = torch.tensor([[9] * 12 + [25] * 11 + [60] * 7])  # after 9 tokens, after 25, and behind the last
    whole = gpt(ids, audio_features=audio, audio_places=places)
    cache = gpt.new_cache(1, 200)
    read = [
        gpt(ids[:, :9], cache=cache),
        gpt(ids[:, 9:25], audio_features=audio[:, :12], cache=cache),
        gpt(ids[:, 25:], audio_features=audio[:, 12:23], cache=cache),
    ]
    assert_close(whole, torch.cat(read, dim=1))
    behind = gpt(ids[:, :0], audio_features=audio[:, 23:], cache=cache, logits="last")
    assert_close(gpt(ids, audio_features=audio, audio_places=places, logits="last"), behind)
    scored = gpt(ids, targets, audio_features=audio, audio_places=places, logits="scored")
    assert_close(scored, whole[targets >= 0])
    follow = gpt(ids[:, 5:9], cache=cache)
    other = gpt.new_cache(1, 200)
    gpt(ids, audio_features=audio, audio_places=places, cache=other)
    assert_close(gpt(ids[:, 5:9], cache=other), follow)  # behind audio there is no neighbour either


def test_clips_anywhere_in_a_batch_are_heard_as_alone() -> None:
    gpt, (ids, _) = small_gpt(), batch(40)
    ids = ids.repeat(2, 1)[:3]
    omni = OmniModel(gpt, Projector(6, 32, 4, 16))
    frames, lengths = torch.randn(4, 20, 6), torch.tensor([20, 7, 13, 4])
    sounds = Sounds(frames, lengths, torch.tensor([2, 0, 2, 0]), torch.tensor([30, 0, 0, 12]))
    described = Descriptions(ids[:1, :5], torch.tensor([5]), torch.tensor([1]), torch.tensor([3]))
    text_lengths = torch.tensor([40, 25, 33])
    together = omni(ids, sounds=sounds, descriptions=described, text_lengths=text_lengths)
    for row, count in enumerate(text_lengths.tolist()):
        mine = sounds.rows == row
        own = Sounds(
            frames[mine], lengths[mine], torch.zeros(int(mine.sum()), dtype=torch.long), sounds.places[mine]
        )
        heard = {"sounds": own} if mine.any() else {}
        words = dataclasses.replace(described, rows=torch.tensor([0]))
        alone = omni(ids[row : row + 1, :count], descriptions=words if row == 1 else None, **heard)
        assert_close(together[row : row + 1, :count], alone)
    in_front = omni(ids, sounds=Sounds.in_front(frames[:3], lengths[:3]))
    moved = Sounds(frames[:3], lengths[:3], torch.tensor([1, 0, 2]), torch.zeros(3, dtype=torch.long))
    assert_close(in_front, omni(ids, sounds=dataclasses.replace(moved, rows=torch.arange(3))))
    assert (in_front - omni(ids, sounds=moved)).abs().amax(dim=(1, 2)).tolist()[:2] > [1e-3, 1e-3]


@pytest.mark.parametrize(
    ("places", "message"), [([[3, 2]], "ascend"), ([[0, 21]], "ascend"), ([[0]], "one for each audio row")]
)
def test_places_that_cannot_be_are_refused(places: list[list[int]], message: str) -> None:
    gpt, (ids, _) = small_gpt(), batch(20)
    with pytest.raises(ValueError, match=message):
        gpt(ids[:1], audio_features=sound(2), audio_places=torch.tensor(places))


def test_layers_side_by_side_are_weighed() -> None:
    one, three = Projector(5, 32, 4, 16), Projector(15, 32, 4, 16, num_layers=3)
    frames, lengths = torch.randn(2, 9, 3, 5), torch.tensor([9, 6])
    assert_close(three(frames.flatten(2), lengths)[0], one(frames.mean(dim=2), lengths)[0])
    with torch.no_grad():
        three.layer_logits.copy_(torch.tensor([0.0, 60.0, 0.0]))
    assert_close(three(frames.flatten(2), lengths)[0], one(frames[:, :, 1], lengths)[0])
    assert three.layer_weights.tolist() == pytest.approx([0, 1, 0])
    with pytest.raises(ValueError, match="cannot hold 2 layers"):
        Projector(15, 32, 4, 16, num_layers=2)


def test_value_embedding_policies_differ_only_with_audio() -> None:
    zero, token0, (ids, _) = small_gpt(), small_gpt(audio_value_embedding="token0"), batch(20)
    assert torch.equal(zero(ids), token0(ids))
    audio = sound(5, count=2)
    assert (zero(ids, audio_features=audio) - token0(ids, audio_features=audio)).abs().max() > 1e-3


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"audio_lengths": torch.tensor([1, 1])}, "without audio_features"),
        ({"audio_features": torch.zeros(2, 3, 31)}, r"must be \(2, rows, 32\)"),
        ({"logits": "first"}, "logits must be 'all' or 'last'"),
        ({"targets": torch.zeros(2, 4)}, "shape of ids"),
    ],
)
def test_forward_refuses_what_does_not_fit(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        small_gpt()(batch(5)[0], **arguments)


# -- cache ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("splits", [[300], [200, 100], [1, 128, 1, 170], [150] + [1] * 20])
def test_any_split_of_the_text_equals_one_pass(splits: list[int]) -> None:
    gpt, (ids, _) = small_gpt(), batch(sum(splits))
    cache = gpt.new_cache(2, 310)
    parts = [gpt(part, cache=cache) for part in ids.split(splits, dim=1)]
    assert_close(torch.cat(parts, dim=1), gpt(ids))


@pytest.mark.parametrize("chunks", [[40], [13, 27], [39, 1]])
def test_any_split_of_audio_and_text_equals_one_pass(chunks: list[int]) -> None:
    gpt, (ids, _) = small_gpt(), batch(30)
    audio, nothing = sound(40, count=2), ids[:, :0]
    whole = gpt(ids, audio_features=audio)
    cache = gpt.new_cache(2, 100)
    for part in audio.split(chunks, dim=1)[:-1]:
        assert gpt(nothing, audio_features=part, cache=cache).shape == (2, 0, 100)
    last = audio[:, sum(chunks[:-1]) :]
    first = gpt(ids[:, :1], audio_features=last, cache=cache)
    rest = gpt(ids[:, 1:], cache=cache)
    assert_close(torch.cat([first, rest], dim=1), whole)
    at_the_boundary = gpt.new_cache(2, 100)
    gpt(nothing, audio_features=audio, cache=at_the_boundary, logits="last")
    assert_close(gpt(ids, cache=at_the_boundary), whole)


def test_audio_may_follow_text_and_rows_may_stand_apart() -> None:
    """Text, audio, text of unequal lengths equals each row alone, and so does what follows."""
    gpt, (ids, _) = small_gpt(), batch(30)
    audio, texts, clips = sound(12, count=2), torch.tensor([5, 9]), torch.tensor([12, 0])

    def listen(rows: slice) -> list[Tensor]:
        cache = gpt.new_cache(ids[rows].size(0), 80)
        one = rows.stop - rows.start == 1
        words, frames = (texts[rows].max(), clips[rows].max()) if one else (12, 12)
        first = gpt(ids[rows, :words], text_lengths=texts[rows], cache=cache, logits="last")
        heard = {"audio_features": audio[rows, :frames], "audio_lengths": clips[rows]} if frames else {}
        second = gpt(ids[rows, 12:20], cache=cache, logits="last", **heard)
        assert torch.equal(cache.positions, texts[rows] + clips[rows] + 8)
        twin = cache.select(torch.zeros(3, dtype=torch.long))
        third = gpt(ids[rows, 20:21], cache=cache)
        assert_close(gpt(ids[rows.start, 20:21].expand(3, 1), cache=twin)[:1], third[:1])
        return [first, second, third]

    together = listen(slice(0, 2))
    for row in (0, 1):
        for both, alone in zip(together, listen(slice(row, row + 1)), strict=True):
            assert_close(both[row : row + 1], alone)


def test_unequal_rows_keep_their_windows_while_decoding() -> None:
    gpt, (ids, _) = small_gpt(), batch(300)
    lengths, cache = torch.tensor([290, 170]), gpt.new_cache(2, 310)
    gpt(ids[:, :290], text_lengths=lengths, cache=cache, logits="last")
    for step in range(5):
        following = torch.stack([ids[row, int(lengths[row]) + step] for row in (0, 1)]).unsqueeze(1)
        logits = gpt(following, cache=cache)
        for row in (0, 1):
            alone = gpt(ids[row : row + 1, : int(lengths[row]) + step + 1], logits="last")
            assert_close(logits[row : row + 1], alone)


def test_a_full_cache_says_so() -> None:
    gpt, (ids, _) = small_gpt(), batch(30)
    with pytest.raises(ValueError, match="cache has 20 positions per row; this pass needs 30"):
        gpt(ids, cache=gpt.new_cache(2, 20))


# -- projector, omni, LoRA --------------------------------------------------------------------------


def test_projector_batch_equals_each_alone_and_marks_both_ends() -> None:
    projector, frames = Projector(6, 32, stack=4, hidden=16), torch.randn(4, 13, 6)
    lengths = torch.tensor([13, 4, 0, 5])
    frames[1, 4:], frames[2], frames[3, 5:] = torch.nan, torch.nan, torch.nan
    rows, counts = projector(frames, lengths)
    assert rows.shape == (4, 6, 32)
    assert counts.tolist() == [6, 3, 0, 4]
    for sample, count, length in zip(range(4), counts.tolist(), lengths.tolist(), strict=True):
        assert rows[sample, count:].abs().sum() == 0
        if length:
            alone, _ = projector(frames[sample : sample + 1, :length], lengths[sample : sample + 1])
            assert_close(rows[sample : sample + 1, :count], alone)
            assert torch.equal(rows[sample, count - 1], projector.end_marker)


def test_the_marker_in_front_tells_of_the_whole_clip() -> None:
    projector = Projector(6, 32, 4, 16)
    frames = torch.randn(1, 12, 6)
    told = projector(frames, torch.tensor([12]))[0][0, 0]
    shuffled = projector(frames[:, torch.randperm(12)], torch.tensor([12]))[0][0, 0]
    assert_close(told, shuffled)  # mean and spread know no order
    assert (told - projector(2 * frames, torch.tensor([12]))[0][0, 0]).abs().max() < 1e-4  # nor level: normed
    assert (told - projector(frames + 1, torch.tensor([12]))[0][0, 0]).abs().max() > 1e-3


def test_omni_model_trains_its_projector_through_a_frozen_gpt() -> None:
    gpt = small_gpt().requires_grad_(False)
    omni, (ids, targets) = OmniModel(gpt, Projector(6, 32, 4, 16)), batch(20)
    frames, lengths = torch.randn(2, 9, 6), torch.tensor([9, 0])
    omni(ids, targets, sounds=Sounds.in_front(frames, lengths)).backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in omni.projector.parameters())
    assert all(p.grad is None for p in gpt.parameters())
    assert_close(omni(ids, sounds=Sounds.in_front(frames, lengths))[1:], omni(ids[1:]))


def test_lora_starts_as_the_base_merges_and_opens_in_plain_peft(tmp_path: Path) -> None:
    from peft import PeftModel

    (ids, targets), audio = batch(40), {"audio_features": sound(7, count=2)}
    base, adapted = small_gpt(), add_lora(small_gpt(), rank=4, alpha=8.0, seed=5)
    assert torch.equal(base(ids, **audio), adapted(ids, **audio))
    wrapped = {name.rsplit(".lora_", 1)[0].rsplit(".", 1)[1] for name in lora_parameters(adapted)}
    assert wrapped == {"c_q", "c_k", "c_v", "c_proj", "c_fc"}
    trained = {name for name, p in adapted.named_parameters() if p.requires_grad}
    assert trained == set(lora_parameters(adapted))
    optimizer = torch.optim.AdamW(lora_parameters(adapted).values(), lr=1e-2)
    for _ in range(3):
        adapted(ids, targets, **audio).backward()
        optimizer.step()
    expected = adapted(ids, **audio)
    assert (expected - base(ids, **audio)).abs().max() > 0.01
    assert_close(merged(adapted)(ids, **audio), expected)
    save_adapter(adapted, tmp_path / "a")
    reloaded = load_adapter(small_gpt(), tmp_path / "a")
    assert torch.equal(reloaded(ids, **audio), expected)
    save_adapter(reloaded, tmp_path / "b")
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
    assert_close(PeftModel.from_pretrained(small_gpt(), str(tmp_path / "a"))(ids, **audio), expected)
    with pytest.raises(ValueError, match="already"):
        add_lora(adapted, 4, 8.0, seed=0)


def test_bf16_compute_is_close_to_fp32() -> None:
    (ids, _), narrow = batch(50), GPT(small_gpt().config, torch.bfloat16)
    with_formula_weights(narrow)
    assert narrow.transformer["wte"].weight.dtype == torch.bfloat16
    assert narrow.lm_head.weight.dtype == torch.float32
    assert (narrow(ids) - small_gpt()(ids)).abs().mean() < 0.1
