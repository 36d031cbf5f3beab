"""The engine against whole passes without a cache, and against itself: split, batched, branched, rewound."""

from __future__ import annotations

import itertools
import random
import time
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from omni_model.model.gpt import GPT, GPTConfig
from omni_model.serving.calculator import MAX_MAGNITUDE, calculate
from omni_model.serving.conversation import Conversation
from omni_model.serving.engine import Engine, Reply
from omni_model.serving.sampling import Sampling, choose
from omni_model.serving.segments import Audio, Piece, Segment, Text, cut
from omni_model.text.conversation import render_prompt
from omni_model.text.tokenizer import ByteTokenizer
from tests.test_model import small_gpt

TOKENIZER = ByteTokenizer()
VOCABULARY = TOKENIZER.vocab_size
GREEDY, WARM = Sampling(temperature=0.0), Sampling(temperature=1.0, top_k=40, seed=7)
END = TOKENIZER.special("<|assistant_end|>")


@pytest.fixture(scope="module")
def engine() -> Engine:
    """Windows of 128 in all layers but two, weights without a zero."""
    return Engine(small_gpt(vocab_size=VOCABULARY), TOKENIZER)


def words(count: int, seed: int = 0) -> list[int]:
    """Random bytes, none of them a special token."""
    return [random.Random(f"{seed}/{place}").randrange(0xF8) for place in range(count)]


def clip(rows: int, seed: int = 0) -> Tensor:
    return torch.randn(rows, 32, generator=torch.Generator().manual_seed(seed))


def assert_close(a: Tensor, b: Tensor) -> None:
    torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


@torch.no_grad()
def whole_pass(gpt: GPT, audio: Tensor | None, ids: Sequence[int]) -> Tensor:
    """Logits (V,) behind a clip and a text, by one forward pass that knows no cache."""
    features = None if audio is None else audio.unsqueeze(0)
    return gpt(torch.tensor([list(ids)]), audio_features=features, logits="last")[0, 0]


def alone(engine: Engine, segments: Sequence[Segment]) -> Tensor:
    """Logits (V,) behind the segments, read by a row of its own."""
    return engine.extend(engine.new_cache(1, 1000), segments)[0]


# -- reading ----------------------------------------------------------------------------------------


def test_extend_is_a_whole_pass_however_it_is_cut(engine: Engine) -> None:
    """Inside the clip, inside the text, at the boundary; by max_chunk, by segments and by calls."""
    audio, ids = clip(150), words(300)
    truth = whole_pass(engine.gpt, audio, ids)
    for max_chunk in (2048, 449, 151, 150, 149, 64, 7):
        chunked = Engine(engine.gpt, TOKENIZER, max_chunk=max_chunk)
        assert_close(alone(chunked, [Audio(audio), Text(ids)]), truth)
    assert_close(
        alone(engine, [Audio(audio[:70]), Audio(audio[70:]), Text(ids[:1]), Text([]), Text(ids[1:])]), truth
    )
    cache = engine.new_cache(1, 450)
    for segment in (Audio(audio[:149]), Audio(audio[149:]), Text(ids[:1]), Text(ids[1:200]), Text(ids[200:])):
        logits = engine.extend(cache, [segment])
    assert_close(logits[0], truth)


def test_sound_between_texts_is_the_same_in_every_split(engine: Engine) -> None:
    first, second, ids = clip(90, 1), clip(40, 2), words(400)
    segments = [Text(ids[:150]), Audio(first), Text(ids[150:151]), Audio(second), Text(ids[151:])]
    truth = alone(engine, segments)
    for max_chunk in (5, 100, 151):
        assert_close(alone(Engine(engine.gpt, TOKENIZER, max_chunk=max_chunk), segments), truth)
    cache = engine.new_cache(1, 530)
    for segment in segments:
        logits = engine.extend(cache, [segment])
    assert_close(logits[0], truth)
    moved = [Text(ids[:151]), Audio(first), Audio(second), Text(ids[151:])]
    assert (alone(engine, moved) - truth).abs().max() > 1e-3


def test_a_batch_of_unequal_rows_is_each_row_alone(engine: Engine) -> None:
    """The longest row fills its cache to the last position while others have nothing left to read."""
    rows = [
        [Text(words(3, 1))],
        [Audio(clip(60, 1)), Text(words(140, 2)), Audio(clip(200, 2))],
        [Text(words(500, 3))],
        [Text(words(10, 4)), Audio(clip(33, 3)), Text(words(5, 5)), Audio(clip(2, 4)), Text(words(130, 6))],
    ]
    truth = torch.stack([alone(engine, row) for row in rows])
    for max_chunk in (2048, 64):
        chunked = Engine(engine.gpt, TOKENIZER, max_chunk=max_chunk)
        cache = chunked.new_cache(4, 500)
        assert_close(chunked.extend(cache, rows), truth)
        assert cache.positions.tolist() == [3, 400, 500, 180]
    more = [
        [Text(words(20, 8))],
        [Text(words(90, 9))],
        [Text(words(7, 10))],
        [Audio(clip(9, 5)), Text(words(4))],
    ]
    cache = engine.new_cache(4, 520)
    engine.extend(cache, rows)
    followed = engine.extend(cache, more)
    assert_close(followed, torch.stack([alone(engine, [*a, *b]) for a, b in zip(rows, more, strict=True)]))


def test_no_pass_reads_more_than_max_chunk() -> None:
    """A row's pieces hold everything in order, and as many positions each as fit."""
    text, nothing = torch.arange(25), Piece(torch.empty(0, 2), torch.empty(0, dtype=torch.long))
    tensors = [text[:4], torch.arange(14.0).reshape(7, 2), text[4:]]
    for max_chunk, lengths in (
        (9, [4, 7, 9, 9, 3]),
        (10, [4, 7, 10, 10, 1]),
        (28, [4, 28]),
        (5, [4, 5, 2, *[5] * 4, 1]),
    ):
        pieces = cut(tensors, max_chunk, nothing)
        assert [len(piece) for piece in pieces] == lengths
        assert torch.equal(torch.cat([piece.ids for piece in pieces]), text)
        assert torch.equal(torch.cat([piece.audio for piece in pieces]), tensors[1])


def test_one_list_of_segments_is_read_by_every_row(engine: Engine) -> None:
    segments = [Audio(clip(5)), Text(words(9))]
    logits = engine.extend(engine.new_cache(3, 20), segments)
    assert_close(logits, alone(engine, segments).expand(3, -1))


# -- speaking ---------------------------------------------------------------------------------------


def test_greedy_decoding_is_the_argmax_of_whole_passes(engine: Engine) -> None:
    """Past three windows of the ring, with sound in front, two rows at different places."""
    audio, prompts = clip(30), [words(370, 1), words(300, 2)]
    rows = [[Audio(audio), Text(prompts[0])], [Text(prompts[1])]]
    cache = engine.new_cache(2, 430)
    logits = engine.extend(cache, rows)
    steps = list(engine.decode(cache, logits, GREEDY, max_tokens=30, stop=()))
    for row, heard in enumerate((audio, None)):
        said = [step.tokens[row] for step in steps]
        for place in (0, 1, 2, 15, 29):
            truth = whole_pass(engine.gpt, heard, [*prompts[row], *said[:place]])
            assert said[place] == int(truth.argmax())
    assert cache.positions.tolist() == [429, 329]  # all but the last token


def test_far_beyond_the_windows_the_cache_still_tells_the_truth(engine: Engine) -> None:
    cache, ids = engine.new_cache(1, 700), words(690)
    engine.extend(cache, [Text(ids[:40])])
    for place in range(40, 690, 65):
        logits = engine.extend(cache, [Text(ids[place : place + 65])])
        assert_close(logits[0], whole_pass(engine.gpt, None, ids[: place + 65]))


def test_rows_that_stop_leave_the_others_undisturbed(engine: Engine) -> None:
    rows = [[Text(words(10 + 20 * row, row))] for row in range(4)]

    def decode(stop: Sequence[int]) -> list[tuple[int | None, ...]]:
        cache = engine.new_cache(4, 120)
        steps = engine.decode(cache, engine.extend(cache, rows), WARM, max_tokens=40, stop=stop)
        return list(zip(*(step.tokens for step in steps), strict=True))

    endless = decode(())
    stop = [endless[0][5], endless[1][9], endless[2][9]]
    ended = decode(stop)
    lengths = [
        min((said.index(token) + 1 for token in stop if token in said), default=40) for said in endless
    ]
    assert len(set(lengths)) > 2
    steps = len(ended[0])
    assert steps == max(lengths)
    for said, all_said, length in zip(ended, endless, lengths, strict=True):
        assert said == (*all_said[:length], *[None] * (steps - length))


def test_a_seed_repeats_its_text_in_any_batch(engine: Engine) -> None:
    prompts = [[Text(words(20, seed))] for seed in range(3)]
    together = engine.generate(prompts, samples=2, sampling=WARM, max_tokens=12)
    assert together == engine.generate(prompts, samples=2, sampling=WARM, max_tokens=12)
    singly = [engine.generate([prompt], samples=2, sampling=WARM, max_tokens=12) for prompt in prompts]
    assert together == list(itertools.chain(*singly))
    assert together[0].ids != together[1].ids
    other = Sampling(temperature=1.0, top_k=40, seed=8)
    assert together != engine.generate(prompts, samples=2, sampling=other, max_tokens=12)


def test_draws_follow_the_distribution() -> None:
    logits = torch.tensor([[2.0, 0.0, 1.0, -30.0]])
    points = (torch.arange(10_000, dtype=torch.float64) + 0.5) / 10_000
    many = logits.expand(10_000, -1)

    def shares(sampling: Sampling) -> Tensor:
        return torch.bincount(choose(many, points, sampling), minlength=4) / 10_000

    for temperature in (0.3, 1.0, 4.0):
        truth = (logits[0] / temperature).softmax(0)
        torch.testing.assert_close(shares(Sampling(temperature)), truth, rtol=0, atol=1e-3)
    truth = torch.tensor([2.0, -torch.inf, 1.0, -torch.inf]).softmax(0)
    torch.testing.assert_close(shares(Sampling(1.0, top_k=2)), truth, rtol=0, atol=1e-3)
    for frozen in (Sampling(0.0), Sampling(5.0, top_k=1), Sampling(5e-324)):
        assert shares(frozen).tolist() == [1, 0, 0, 0]
    ends = torch.tensor([0.0, 1.0])  # single precision may round a point just below 1 up to it
    assert choose(torch.tensor([[-torch.inf, 0.0, 0.0]]).expand(2, -1), ends, Sampling(1.0)).tolist() == [
        1,
        2,
    ]


# -- a GPT that says what it is told ------------------------------------------------------------------


def parrot(*texts: Sequence[int]) -> Engine:
    """An engine whose GPT knows of each token the one that follows it in the texts, and nothing else.

    Blocks add nothing, embeddings are orthogonal, and the head row of a token is the embedding of its
    predecessor: a real model, so whatever decodes it is tested too.
    """
    gpt = GPT(
        GPTConfig(sequence_len=128, vocab_size=VOCABULARY, n_layer=1, n_head=2, n_kv_head=1, n_embd=320)
    )
    with torch.no_grad():
        gpt.transformer["wte"].weight.copy_(torch.eye(320))
        gpt.lm_head.weight.zero_()
        for text in texts:
            for before, after in itertools.pairwise(text):
                gpt.lm_head.weight[after, before] = 1.0
    return Engine(gpt, TOKENIZER)


def spelled(text: str) -> list[int]:
    """Ids of a text in which {python} and its like stand for the special tokens."""
    parts = text.replace("}", "{").split("{")
    return [
        token
        for number, part in enumerate(parts)
        for token in (TOKENIZER.encode(part) if number % 2 == 0 else [TOKENIZER.special(f"<|{part}|>")])
    ]


def say(engine: Engine, *prompts: str, max_tokens: int = 40) -> list[Reply]:
    return engine.generate(
        [[Text(spelled(prompt))] for prompt in prompts], sampling=GREEDY, max_tokens=max_tokens
    )


def test_the_calculator_answers_inside_the_text() -> None:
    engine = parrot(spelled("?{python_start}12*3{python_end}"), spelled("{output_end}.{assistant_end}"))
    (reply,) = say(engine, "?")
    forced = spelled("{output_start}36{output_end}")
    assert reply.ids == spelled("{python_start}12*3{python_end}{output_start}36{output_end}.")
    assert [token for token, was_forced in zip(reply.ids, reply.forced, strict=True) if was_forced] == forced
    assert reply.forced == [False] * 6 + [True] * 4 + [False]
    assert reply.stopped
    assert reply.text == "<|python_start|>12*3<|python_end|><|output_start|>36<|output_end|>."


def test_what_has_no_value_is_answered_by_nothing() -> None:
    for expression in ("1/0", "ab", ""):
        engine = parrot(spelled("?{python_start}" + expression + "{python_end}!{assistant_end}"))
        (reply,) = say(engine, "?")
        assert reply.ids == spelled("{python_start}" + expression + "{python_end}!")
        assert not any(reply.forced)
    engine = parrot(spelled("?5{python_end}!{assistant_end}"))  # an end without a start
    assert say(engine, "?")[0].ids == spelled("5{python_end}!")
    engine = parrot(spelled("?{python_start}(1{python_end}+2){python_end}"))  # nor do two halves make a whole
    assert not any(say(engine, "?")[0].forced)
    engine = parrot(spelled("?{python_start}7{python_start}"))  # a second start begins anew
    assert say(engine, "?", max_tokens=3)[0].ids == spelled("{python_start}7{python_start}")


def test_rows_use_the_tool_and_stop_each_in_its_own_time() -> None:
    engine = parrot(
        spelled("?{python_start}9-4{python_end}"),
        spelled("{output_end};{assistant_end}"),
        spelled("abcdefghijklmnopq{bos}"),
        spelled("x{assistant_end}"),
        spelled("yzy"),
    )
    prompts = ("?", "a", "x", "y")
    together = say(engine, *prompts)
    assert together == [say(engine, prompt)[0] for prompt in prompts]
    assert [reply.stopped for reply in together] == [True, True, True, False]
    assert together[0].ids == spelled("{python_start}9-4{python_end}{output_start}5{output_end};")
    assert [reply.text for reply in together[1:]] == ["bcdefghijklmnopq", "", "zy" * 20]
    cache = engine.new_cache(4, 60)
    logits = engine.extend(cache, [[Text(spelled(prompt))] for prompt in prompts])
    steps = list(engine.decode(cache, logits, GREEDY, max_tokens=40))
    assert steps[0].tokens == [*spelled("{python_start}b{assistant_end}z")]
    assert {step.tokens[2] for step in steps[1:]} == {None}
    assert cache.positions.tolist() == [1, 1, 1, 1]  # nothing was fed before the first row stopped
    assert engine.replies(steps) == together


def test_stop_tokens_can_be_chosen() -> None:
    engine = parrot(spelled("abcde{assistant_end}fgf"))
    cache = engine.new_cache(1, 20)
    logits = engine.extend(cache, [Text(spelled("a"))])
    steps = engine.decode(cache, logits, GREEDY, max_tokens=9, stop=[ord("d")])
    assert [step.tokens[0] for step in steps] == spelled("bcd")
    assert cache.positions.tolist() == [3]  # a, b, c


# -- conversations ----------------------------------------------------------------------------------


def turn(question: str) -> list[int]:
    return render_prompt(TOKENIZER, question)[1:]


def heard(engine: Engine, conversation: Conversation, segments: list[Segment], sampling: Sampling) -> Reply:
    return engine.replies(conversation.ask(segments, sampling, max_tokens=6))[0]


def test_a_second_turn_is_a_conversation_begun_anew(engine: Engine) -> None:
    first: list[Segment] = [Audio(clip(20, 1)), Text(render_prompt(TOKENIZER, "What is this?"))]
    second: list[Segment] = [Audio(clip(10, 2)), Text(turn("And that?"))]
    conversation = Conversation(engine, 130)
    answer = heard(engine, conversation, first, WARM)
    after = heard(engine, conversation, second, WARM)
    anew: list[Segment] = [*first, Text([*answer.ids, END]), *second]
    assert after == heard(engine, Conversation(engine, 130), anew, WARM)


def test_an_answer_is_regenerated_and_a_turn_edited(engine: Engine) -> None:
    opening: list[Segment] = [Text(words(150, 1))]
    conversation = Conversation(engine, 400)
    answer = heard(engine, conversation, opening, WARM)
    place = conversation.bookmark()
    turns: list[list[Segment]] = [[Text(words(140, seed))] for seed in (2, 3)]
    replies = [heard(engine, conversation, turns[0], WARM)]
    for again, seed in ((turns[0], 7), (turns[0], 8), (turns[1], 7)):
        conversation.go_back(place)
        replies.append(heard(engine, conversation, again, Sampling(1.0, 40, seed)))
        anew: list[Segment] = [*opening, Text([*answer.ids, END]), *again]
        assert replies[-1] == heard(engine, Conversation(engine, 400), anew, Sampling(1.0, 40, seed))
    assert replies[0] == replies[1]
    assert replies[1] != replies[2]


def test_an_abandoned_answer_is_closed_where_it_stood(engine: Engine) -> None:
    conversation = Conversation(engine, 100)
    opening: list[Segment] = [Text(words(10))]
    answer = conversation.ask(opening, WARM, max_tokens=9)
    said = [next(answer).tokens[0] for _ in range(3)]
    after = heard(engine, conversation, [Text(words(5, 1))], WARM)
    assert list(answer) == []
    anew: list[Segment] = [*opening, Text([*said, END]), Text(words(5, 1))]
    assert after == heard(engine, Conversation(engine, 100), anew, WARM)
    silent = Conversation(engine, 100)
    silent.ask(opening, WARM, max_tokens=9)  # not a token was taken
    after = heard(engine, silent, [Text(words(5, 1))], WARM)
    assert after == heard(engine, Conversation(engine, 100), [*opening, Text([END, *words(5, 1)])], WARM)


def test_a_stop_token_is_read_once_as_the_end_of_the_answer() -> None:
    for end in ("{assistant_end}", "{bos}"):
        engine = parrot(spelled("ab" + end + "c"), spelled("{assistant_end}d"))
        conversation = Conversation(engine, 7)
        assert heard(engine, conversation, [Text(spelled("a"))], GREEDY).text == "b"
        assert conversation.bookmark().unread == [END]


# -- bad input --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("segments", "message"),
    [
        ([], "segments"),
        ([Text([])], "segments of row 0 hold nothing"),
        ([[Text([1])], []], "segments of row 1 hold nothing"),
        ([[Text([1])]], "segments hold 1 rows; the cache has 2"),
        ([Text([1, 2, 257])], r"ids\[2\] of a Text .* below 257, not 257"),
        ([Text([1]), Text([-1])], r"ids\[0\] of a Text .* not -1"),
        ([Text([1.5])], r"ids\[0\] of a Text .* not 1.5"),
        ([Text([1]), Audio(torch.zeros(3, 31))], r"features of an Audio must be \(rows, 32\), not \(3, 31\)"),
        ([Audio(torch.zeros(1, 3, 32))], r"not \(1, 3, 32\)"),
        ([Text([1]), Audio(torch.full((3, 32), torch.nan))], "features .* not finite"),
        ([[Text([1])], [Text(words(27))]], "segments of row 1 .* 27 positions; 26 of 30 are free"),
        ([Audio(clip(20)), Text(words(7))], "segments of row 0 .* 27 positions"),
        ([[Text([1])], ["text"]], "segments must be Text or Audio, not str"),
    ],
    ids=str,
)
def test_what_cannot_be_read_leaves_the_cache_as_it_was(
    engine: Engine, segments: list[Segment], message: str
) -> None:
    cache = engine.new_cache(2, 30)
    engine.extend(cache, [Text(words(4))])
    twin = cache.select(torch.arange(2))
    with pytest.raises(ValueError, match=message):
        engine.extend(cache, segments)
    assert torch.equal(cache.positions, twin.positions)
    assert torch.equal(engine.extend(cache, [Text(words(26, 1))]), engine.extend(twin, [Text(words(26, 1))]))


def test_bad_arguments_are_named(engine: Engine) -> None:
    cache, prompt = engine.new_cache(1, 30), [Text(words(20))]
    logits = engine.extend(cache, prompt)
    bad = [
        ("batch", lambda: engine.new_cache(0, 10)),
        ("capacity", lambda: engine.new_cache(1, 0)),
        ("reserve", lambda: engine.extend(cache, prompt, reserve=-1)),
        ("max_tokens 12 ", lambda: engine.decode(cache, logits, GREEDY, max_tokens=12)),
        ("max_tokens", lambda: engine.decode(cache, logits, GREEDY, max_tokens=0)),
        ("logits", lambda: engine.decode(cache, logits[:, :9], GREEDY, max_tokens=2)),
        ("logits", lambda: engine.decode(cache, logits.expand(2, -1), GREEDY, max_tokens=2)),
        ("prompts", lambda: engine.generate([], sampling=GREEDY, max_tokens=2)),
        ("row 1", lambda: engine.generate([prompt, []], sampling=GREEDY, max_tokens=2)),
        ("samples", lambda: engine.generate([prompt], samples=0, sampling=GREEDY, max_tokens=2)),
        ("max_tokens 9999", lambda: engine.generate([prompt], sampling=GREEDY, max_tokens=9999)),
        ("temperature", lambda: Sampling(temperature=-1.0)),
        ("temperature", lambda: Sampling(temperature=float("nan"))),
        ("top_k", lambda: Sampling(top_k=0)),
        ("max_chunk", lambda: Engine(engine.gpt, TOKENIZER, max_chunk=0)),
        ("tokenizer has 257 tokens and the GPT 100", lambda: Engine(small_gpt(), TOKENIZER)),
        ("turn", lambda: Conversation(engine, 30).ask([], GREEDY, max_tokens=2)),
        ("max_tokens", lambda: Conversation(engine, 30).ask(prompt, GREEDY, max_tokens=0)),
    ]
    for message, call in bad:
        with pytest.raises(ValueError, match=message):
            call()
    assert cache.positions.tolist() == [20]
    assert len(list(engine.decode(cache, logits, GREEDY, max_tokens=11, stop=()))) == 11


def test_positions_end_where_the_rotary_table_ends(engine: Engine) -> None:
    cache = engine.new_cache(1, 6000)
    with pytest.raises(ValueError, match="segments of row 0 must have 5121 positions; 5120 of 5120 are free"):
        engine.extend(cache, [Text(words(5000))], reserve=121)
    assert cache.positions.tolist() == [0]


def test_padding_may_reach_beyond_the_rotary_table() -> None:
    gpt = small_gpt(vocab_size=VOCABULARY, sequence_len=16)  # 160 positions
    engine, rows = Engine(gpt, TOKENIZER), [[Text(words(158, 1))], [Text(words(2, 2))]]
    more = [[Text(words(2, 3))], [Text(words(100, 4))]]
    cache = engine.new_cache(2, 160)
    engine.extend(cache, rows)
    ends = [engine.extend(engine.new_cache(1, 160), [*a, *b])[0] for a, b in zip(rows, more, strict=True)]
    assert_close(engine.extend(cache, more), torch.stack(ends))


def test_a_turn_without_room_for_its_answer_changes_nothing(engine: Engine) -> None:
    conversation = Conversation(engine, 40)
    with pytest.raises(ValueError, match="segments of row 0 must have 41 positions; 40 of 40 are free"):
        conversation.ask([Text(words(30))], GREEDY, max_tokens=12)
    reply = heard(engine, conversation, [Text(words(30))], GREEDY)
    assert reply == heard(engine, Conversation(engine, 40), [Text(words(30))], GREEDY)


@pytest.mark.parametrize("change", [{"n_layer": 4}, {"n_kv_head": 4}, {"n_embd": 64}, {"n_head": 2}], ids=str)
def test_a_cache_of_another_model_is_refused(engine: Engine, change: dict[str, int]) -> None:
    cache = small_gpt(vocab_size=VOCABULARY, **change).new_cache(1, 30)
    with pytest.raises(ValueError, match="cache"):
        engine.extend(cache, [Text(words(4))])
    with pytest.raises(ValueError, match="cache"):
        engine.decode(cache, torch.zeros(1, VOCABULARY), GREEDY, max_tokens=2)
    assert cache.positions.tolist() == [0]


# -- the calculator ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("expression", "value"),
    [
        ("2 + 3 * 4", "14"),
        ("(2+3)*4", "20"),
        ("1,200 * 3", "3600"),
        ("7/2", "3.5"),
        ("6/3", "2.0"),
        ("7//2", "3"),
        ("-3 - -.5", "-2.5"),
        ("0.1+0.2", "0.30000000000000004"),
        ("123456789*987654321", "121932631112635269"),
        ('"strawberry".count("r")', "3"),
        ("'mississippi'.count( 'ss' )", "2"),
        ('"it\'s, it".count("it")', "2"),
        *(
            (nothing, None)
            for nothing in ("", " ", "2**3", "1/0", "1//0", "abc", "1+", "(1", "007", "()", "5 5")
        ),
        *(
            (nothing, None)
            for nothing in ("3(4)", "1.real", "...", "1e9", "0x10", "1_000", "True", "[1]", "1<2")
        ),
        *((nothing, None) for nothing in ("__import__('os')", '"a".upper()', '"a"*9', '"a".count(a)', '"a"')),
        ('"a".count("a").real', None),
        ("9" * 101, None),
        ("9" * 60 + "*" + "9" * 60, None),
        ("(" * 100 + "1" + ")" * 100, "1"),
        ("-" * 200 + "1", None),
        ("1+" * 40 + "1", "41"),
        ("1+" * 70 + "1", None),
        ("1" + " " * 256, None),
        ("1\n+1", None),
        ("1\n", None),
        ("１+１", None),
    ],
    ids=str,
)
def test_calculator(expression: str, value: str | None) -> None:
    assert calculate(expression) == value


def test_the_calculator_agrees_with_python_on_any_arithmetic() -> None:
    """Whatever it is given, it answers at once: with Python's own value, or not at all."""
    rng = random.Random(3)
    answered, begun = 0, time.process_time()
    for _ in range(20_000):
        length = rng.choice((3, 7, 12, 30))
        expression = "".join(rng.choices("0123456789" * 2 + "+-*/.,() ", k=length)).replace("**", "*")
        value = calculate(expression)
        if value is not None:
            answered += 1
            truth = eval(expression.replace(",", "").strip(), {"__builtins__": {}})
            assert value == str(truth)
            assert abs(truth) <= MAX_MAGNITUDE
    alphabet = "0123456789+-*/.,() \"'\\\n\0\tabcount.count(éß𝟙{}[]<>=:;#_e"
    for _ in range(20_000):
        calculate("".join(rng.choices(alphabet, k=rng.randrange(300))))
    assert answered > 4_000
    assert time.process_time() - begun < 20
