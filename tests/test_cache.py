"""The cache and what continues from it: rings, moments to go back to, single-token steps, refusals."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from omni_model.model.decode import Decoder
from omni_model.model.gpt import GPT, GPTConfig
from omni_model.model.lora import add_lora, lora_parameters
from tests.test_model import assert_close, batch, small_gpt, sound


def long_ids(tokens: int) -> Tensor:
    return (torch.arange(2 * tokens) ** 2 * 7 + 3).reshape(2, tokens) % 100


@torch.no_grad()
def test_a_ring_that_has_come_round_many_times_equals_one_pass() -> None:
    """Windows of 128 and 512 in a row of 900: short rings come round seven times, the long one once."""
    gpt, ids = small_gpt(), long_ids(900)
    cache, whole = gpt.new_cache(2, 900), gpt(ids)
    splits = [200, 1, 1, 130, 299, 69, 128, 1, 71]
    parts = [gpt(part, cache=cache) for part in ids.split(splits, dim=1)]
    assert_close(torch.cat(parts, dim=1), whole)
    assert [keys.size(1) for keys in cache.keys] == [129, 129, 129, 513, 513]


def test_rings_of_the_usual_pattern_take_44_percent() -> None:
    with torch.device("meta"):
        gpt = GPT(GPTConfig())
        full = GPT(GPTConfig(window_pattern="L"))
        ratio = gpt.new_cache(1, 2048).num_bytes / full.new_cache(1, 2048).num_bytes
    assert ratio == (3 * 513 + 2048) / (4 * 2048)


@torch.no_grad()
@pytest.mark.parametrize("lengths", [[280, 280], [280, 90]], ids=["together", "apart"])
@pytest.mark.parametrize("adapted", [False, True])
def test_single_token_steps_equal_forward(lengths: list[int], adapted: bool) -> None:
    gpt, ids = small_gpt(), long_ids(300)
    if adapted:
        for number, parameter in enumerate(lora_parameters(add_lora(gpt, 2, 4.0, seed=0)).values()):
            parameter.copy_(
                0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(number))
            )
    decoder, counts = Decoder(gpt), torch.tensor(lengths)
    stepped, passed = gpt.new_cache(2, 400), gpt.new_cache(2, 400)
    for cache in (stepped, passed):
        gpt(ids[:, :280], text_lengths=counts, cache=cache, logits="last")
    for tokens in ids.unbind(1)[100:190]:  # beyond the short window
        assert_close(decoder.step(tokens, stepped), gpt(tokens.unsqueeze(1), cache=passed)[:, 0])
    assert torch.equal(stepped.positions, counts + 90)
    assert_close(stepped.prev_embedding, passed.prev_embedding)


@torch.no_grad()
def test_steps_follow_audio_and_narrow_weights_stay_close() -> None:
    gpt, (ids, _) = small_gpt(), batch(40)
    exact, narrow = gpt.new_cache(2, 100), gpt.new_cache(2, 100)
    for cache in (exact, narrow):
        gpt(ids[:, :3], cache=cache)
        gpt(ids[:, :0], audio_features=sound(9, count=2), cache=cache, logits="last")
    whole = gpt.new_cache(2, 100)
    gpt(ids[:, :3], cache=whole)
    expected = gpt(ids[:, 3:8], audio_features=sound(9, count=2), cache=whole)
    decoder, half = Decoder(gpt), Decoder(gpt, torch.bfloat16)
    for place, tokens in enumerate(ids[:, 3:8].unbind(1)):
        logits = decoder.step(tokens, exact)
        assert_close(logits, expected[:, place])
        assert 0 < (half.step(tokens, narrow) - logits).abs().max() < 0.5


@torch.no_grad()
def test_going_back_equals_never_having_gone_on() -> None:
    gpt, ids = small_gpt(), long_ids(700)
    cache = gpt.new_cache(2, 700)
    gpt(ids[:, :200], cache=cache)
    early = cache.snapshot()
    first = gpt(ids[:, 200:500], cache=cache)
    late = cache.snapshot()
    gpt(ids[:, 500:], cache=cache)
    cache.restore(late)
    after_late = gpt(ids[:, 500:600], cache=cache)
    for _ in range(2):
        cache.restore(early)
        assert_close(gpt(ids[:, 200:500], cache=cache), first)
    assert_close(gpt(ids[:, 500:600], cache=cache), after_late)
    with pytest.raises(ValueError, match="went back to before it"):
        cache.restore(late)
    with pytest.raises(ValueError, match="not of this cache"):
        gpt.new_cache(2, 700).restore(early)


def other_cache() -> Any:
    return small_gpt(n_kv_head=4).new_cache(2, 50)


BAD_CALLS: dict[str, tuple[Callable[[GPT], Any], str]] = {
    "an id above": (lambda g: g(torch.full((2, 3), 100)), r"ids \(2, 3\) holds 100; it must lie in 0 .. 99"),
    "an id below": (lambda g: g(torch.tensor([[1, -1]])), r"ids \(1, 2\) holds -1"),
    "ids of floats": (lambda g: g(torch.ones(2, 3)), r"ids \(2, 3\) torch.float32 must be integers"),
    "no rows": (lambda g: g(torch.ones(0, 3, dtype=torch.long)), r"ids \(0, 3\) must have a row"),
    "no tokens": (
        lambda g: g(torch.ones(2, 0, dtype=torch.long)),
        r"ids \(2, 0\) must have a row, with tokens",
    ),
    "a target above": (lambda g: g(*(torch.full((1, 2), n) for n in (1, 100))), "targets .* holds 100"),
    "a long row": (lambda g: g(torch.ones(1, 5121, dtype=torch.long)), "reach position 5121; .* has 5120"),
    "nan": (lambda g: g(batch(3)[0], audio_features=torch.full((2, 4, 32), torch.nan)), "sample 0, row 0"),
    "lengths of another batch": (
        lambda g: g(batch(3)[0], text_lengths=torch.tensor([1])),
        r"text_lengths \(1,\) must be \(2,\)",
    ),
    "too many real rows": (
        lambda g: g(batch(3)[0], audio_features=sound(4, count=2), audio_lengths=torch.tensor([4, 5])),
        "audio_lengths .* holds 5; it must lie in 0 .. 4",
    ),
    "a cache of another model": (lambda g: g(batch(3)[0], cache=other_cache()), "cache is of another model"),
    "a cache of another batch": (
        lambda g: g(batch(3)[0], cache=g.new_cache(3, 50)),
        "cache has 3 rows; needs 2",
    ),
    "a step on another cache": (
        lambda g: Decoder(g).step(torch.ones(2, dtype=torch.long), other_cache()),
        "cache is of another model",
    ),
    "a step with a wrong token": (
        lambda g: Decoder(g).step(torch.tensor([1, 100]), g.new_cache(2, 50)),
        r"tokens \(2,\) must lie in 0 .. 99",
    ),
    "a cache of nothing": (lambda g: g.new_cache(2, 0), "at least 1, not 2 and 0"),
}


@pytest.mark.parametrize("name", BAD_CALLS)
def test_what_does_not_fit_is_refused_by_name(name: str) -> None:
    call, sentence = BAD_CALLS[name]
    with pytest.raises(ValueError, match=sentence):
        call(small_gpt())


@torch.no_grad()
def test_a_refused_pass_changes_nothing() -> None:
    gpt, ids = small_gpt(), long_ids(40)
    cache = gpt.new_cache(2, 40)
    gpt(ids[:, :30], cache=cache)
    before = [
        tensor.clone() for tensor in (*cache.keys, *cache.values, cache.prev_embedding, cache.positions)
    ]
    decoder, too_many = Decoder(gpt), ids[:, :11]
    with pytest.raises(ValueError, match="cache has 40 positions per row; this pass needs 41"):
        gpt(too_many, cache=cache)
    with pytest.raises(ValueError, match="ids"):
        gpt(ids[:, :5] + 100, cache=cache)
    features = sound(3, count=2)
    features[1, 2, 5] = torch.inf
    with pytest.raises(ValueError, match="not finite at sample 1, row 2"):
        gpt(ids[:, :5], audio_features=features, cache=cache)
    with pytest.raises(ValueError, match="tokens"):
        decoder.step(ids[:, 0] + 100, cache)
    after = (*cache.keys, *cache.values, cache.prev_embedding, cache.positions)
    assert all(torch.equal(was, now) for was, now in zip(before, after, strict=True))
    for tokens in ids[:, 30:].unbind(1):
        decoder.step(tokens, cache)
    with pytest.raises(ValueError, match="room for 40 positions per row; this step needs 41"):
        decoder.step(ids[:, 0], cache)


@torch.no_grad()
def test_narrow_copies_follow_their_weights() -> None:
    gpt, (ids, _) = GPT(small_gpt().config, torch.bfloat16), batch(20)
    gpt.load_state_dict(small_gpt().state_dict())
    gpt(ids)
    for parameter in gpt.transformer["h"].parameters():
        parameter.mul_(0.5)
    fresh = GPT(gpt.config, torch.bfloat16)
    fresh.load_state_dict(gpt.state_dict())
    assert torch.equal(gpt(ids), fresh(ids))
