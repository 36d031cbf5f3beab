"""AudioBench-mini as it is built: nothing but the sound tells an answer, and training has met none of it."""

from collections import Counter
from typing import Any

import pytest

from omni_model.config import BadInput, BenchmarkRecipe
from omni_model.evaluation.benchmark_card import card
from omni_model.evaluation.benchmark_choice import held_out
from omni_model.evaluation.benchmark_conflict import lured
from omni_model.evaluation.benchmark_item import GROUPS, MACRO_GROUPS, Item, pairs_of
from omni_model.evaluation.benchmark_overlap import refuse_overlap
from omni_model.text.questions import LETTERS, NOTHING, grammar
from tests.small_benchmark import NONE, Clip, corpora, items_of, phrases, recorded, sounds


@pytest.fixture(scope="module")
def items() -> list[Item]:
    return items_of(*corpora())


@pytest.fixture(scope="module")
def clips() -> dict[str, Clip]:
    return {clip["key"]: clip for corpus in corpora() for clip in corpus}


def of(items: list[Item], group: str) -> list[Item]:
    return [item for item in items if item.group == group]


# --- balance -------------------------------------------------------------------------------------


def test_fifty_keys_a_letter_and_equal_keys_in_each_group(items: list[Item]) -> None:
    recipe = BenchmarkRecipe()
    assert len(items) == 200
    assert {group: len(of(items, group)) for group in GROUPS} == {g: getattr(recipe, g) for g in GROUPS}
    assert [item.group for item in items] == sorted((i.group for i in items), key=GROUPS.index)
    assert sorted(name for parts in MACRO_GROUPS.values() for name in parts) == sorted(GROUPS)
    for group in GROUPS:
        keys = Counter(item.answer for item in of(items, group))
        assert len(set(keys.values())) == 1, (group, keys)
        assert len(keys) == len(LETTERS)
    assert len({item.id for item in items}) == 200


def test_every_answer_is_key_and_wrong_option_about_equally_often(items: list[Item]) -> None:
    for group in ("words", "speaker", "prosody", "quality", "room", "events"):
        for name in dict.fromkeys(item.category for item in of(items, group)):
            asked = [item for item in of(items, group) if item.category == name]
            options = grammar().category(name).options
            keys = Counter(item.key for item in asked)
            wrong = Counter(option for item in asked for option in item.options if option != item.key)
            assert max(keys.values()) - min(keys[option] for option in options) <= 1, (name, keys)
            assert max(wrong.values()) - min(wrong[option] for option in options) <= 2, (name, wrong)
        shares = Counter(item.category for item in of(items, group))
        assert max(shares.values()) - min(shares.values()) <= 1, shares


def test_a_guess_by_category_position_or_length_gains_nothing(items: list[Item]) -> None:
    """Whoever knows all frequencies, but hears nothing, has no more than a slightly uneven draw gives."""
    for group in GROUPS:
        asked = of(items, group)
        by_key = Counter((item.category, item.key) for item in asked)
        shown = Counter((item.category, option) for item in asked for option in item.options)
        rates = {option: by_key[option] / shown[option] for option in shown}
        gained = sum(
            item.key == max(item.options, key=lambda option, item=item: rates[item.category, option])
            for item in asked
        )
        assert gained / len(asked) <= (0.65 if group == "conflict" else 0.45), group


def test_items_ask_what_the_test_clip_holds(items: list[Item], clips: dict[str, Clip]) -> None:
    for item in items:
        assert all(clips[key]["split"] == "test" for key in item.clips)
        labels = clips[item.clips[item.asked]]["labels"]
        assert item.key == labels.get(item.category, NOTHING)
        assert len(set(item.options)) == 4
        category = grammar().category(item.category)
        asked = [question.format(place="first") for question in category.comparison_questions]
        asked += [question.format(place="second") for question in category.comparison_questions]
        assert item.question in (asked if item.group == "speaker" else category.questions)
    for group in GROUPS:
        heard = [(item.category, key) for item in of(items, group) for key in item.clips]
        assert len(heard) - len(set(heard)) <= (2 if group == "speaker" else 0)
    reused = Counter(key for item in items for key in item.clips)
    assert max(reused.values()) <= 3
    assert sum(count > 1 for count in reused.values()) <= 30


def test_items_depend_on_their_own_seed_and_not_on_the_order_of_clips(items: list[Item]) -> None:
    assert items_of(*(corpus[::-1] for corpus in corpora()[::-1])) == items
    assert items_of(*corpora(), seed=1) != items


# --- pairs ---------------------------------------------------------------------------------------


def test_pairs_say_the_same_and_sound_different(items: list[Item]) -> None:
    pairs = [(items[one], items[other]) for one, other in pairs_of(items)]
    assert len(pairs) == len({item.pair for item in items if item.pair})
    assert Counter(one.group for one, _ in pairs)["prosody"] == 12  # every item of the group
    assert Counter(one.group for one, _ in pairs)["quality"] == 12
    assert Counter(one.group for one, _ in pairs)["room"] >= 4
    for one, other in pairs:
        assert one.transcript == other.transcript != ""
        assert (one.category, one.question, set(one.options)) == (
            other.category,
            other.question,
            set(other.options),
        )
        assert one.key != other.key
        assert one.clips != other.clips


# --- two clips -----------------------------------------------------------------------------------


def test_two_speakers_differ_and_every_voice_and_place_comes_equally_often(
    items: list[Item], clips: dict[str, Clip]
) -> None:
    asked = of(items, "speaker")
    others = Counter()
    for item in asked:
        heard = [clips[key] for key in item.clips]
        assert len({clip["speaker"] for clip in heard}) == 2
        assert len({clip["labels"]["voice"] for clip in heard}) == 2
        other = heard[1 - item.asked]["labels"]["voice"]
        assert other in item.options
        assert ("first", "second")[item.asked] in item.question
        others[other] += 1
    assert Counter(item.asked for item in asked) == {0: 8, 1: 8}
    assert set(Counter(item.key for item in asked).values()) == {4}
    assert set(others.values()) == {4}
    assert set(Counter((item.key, item.asked) for item in asked).values()) == {2}


# --- conflict and silence ------------------------------------------------------------------------


def test_nothing_is_right_in_a_quarter_and_there_nobody_speaks(
    items: list[Item], clips: dict[str, Clip]
) -> None:
    asked = [item for item in of(items, "conflict") if not item.lure]
    assert len(asked) == 8
    assert all(NOTHING in item.options for item in asked)
    silent = [clips[item.clips[0]] for item in asked if item.key == NOTHING]
    assert len(silent) == 2
    assert all((clip["transcript"], clip["speaker"]) == ("", "") for clip in silent)
    assert {clip["provenance"]["kind"] == "silence" for clip in silent} == {True, False}
    for item in asked:
        assert item.key == NOTHING or item.key in item.transcript.split()


def check_lures(items: list[Item], clips: dict[str, Clip]) -> None:
    for item in items:
        assert item.lure in item.options
        assert item.lure != item.key
        told = {
            (name, value) for key in item.clips for name, value in clips[key]["labels"].items()
        }  # true of something else that is heard
        assert any(value == item.lure and name != item.category for name, value in told)
        assert (item.category, item.lure) not in told


def test_lures_are_true_of_something_else_in_the_clip(items: list[Item], clips: dict[str, Clip]) -> None:
    asked = [item for item in of(items, "conflict") if item.lure]
    assert len(asked) == 8
    check_lures(asked, clips)
    inside = [item for item in asked if len(item.clips) == 1]
    assert len(inside) == min(8, sum(map(len, lured(held_out(corpora())).values())))
    assert all("white" in (item.lure, item.key) for item in inside)


def test_without_noise_under_words_answer_and_lure_stand_in_two_clips() -> None:
    corpora = [sounds(), recorded(phrases(), noisy=False)]
    clips = {clip["key"]: clip for corpus in corpora for clip in corpus}
    asked = [item for item in items_of(*corpora, **NONE | {"conflict": 16}) if item.lure]
    assert {len(item.clips) for item in asked} == {2}
    check_lures(asked, clips)
    for item in asked:
        assert sum(bool(clips[key]["transcript"]) for key in item.clips) == 1
        assert item.category not in clips[item.clips[1 - item.asked]]["labels"]
    assert {item.category for item in asked} == {"number", "colour", "beeps", "noise"}


def test_four_conflict_items_are_silence_and_twelve_are_two_thirds() -> None:
    for size, silence in ((4, 4), (8, 4), (12, 8)):
        asked = items_of(*corpora(), **NONE | {"conflict": size})
        assert len(asked) == size
        assert sum(NOTHING in item.options for item in asked) == silence
        assert sum(item.key == NOTHING for item in asked) == silence / 4


# --- public recordings ---------------------------------------------------------------------------


def public(category: str, answers: tuple[str, ...], count: int, **fields: Any) -> list[Clip]:
    return [
        {
            "key": f"{category}-{number}",
            "split": "test",
            "labels": {category: answers[number % len(answers)]},
            "transcript": "",
            "speaker": "",
            "licence": "CC-BY-4.0",
            "provenance": {"generator": "test", "file_sha256": f"{category}{number}"},
            **fields,
        }
        for number in range(count)
    ]


def test_categories_of_public_recordings_take_part_in_their_group() -> None:
    moods = ("angry", "happy", "sad", "neutral")
    acted = public("emotion", moods, 40, transcript="It's eleven o'clock", speaker="crema-d-1010")
    asked = items_of(acted, **NONE | {"prosody": 12})
    assert len(pairs_of(asked)) == 6
    assert {option for item in asked for option in item.options} == set(
        moods
    )  # what nobody shows is no option
    events = grammar().category("event").options
    asked = items_of(sounds(), public("event", events, 100), **NONE | {"events": 24})
    assert set(Counter(item.category for item in asked).values()) == {4}
    assert {item.category for item in asked} == {"pitch", "contour", "tremolo", "beeps", "loudness", "event"}


# --- refusals ------------------------------------------------------------------------------------


def test_sizes_groups_and_clips_that_cannot_balance_are_refused_in_words() -> None:
    with pytest.raises(BadInput, match=r"benchmark\.words is 47; use a multiple of 4"):
        items_of(*corpora(), words=47)
    with pytest.raises(BadInput, match="every group of the benchmark has size 0"):
        items_of(*corpora(), **NONE)
    with pytest.raises(BadInput, match=r"too few for 24 balanced pace items; .* benchmark\.prosody"):
        items_of(recorded(phrases(test=16)), **NONE | {"prosody": 24})
    with pytest.raises(BadInput, match=r"group room is empty: .* recording \(clean, .*\), of which there is"):
        items_of(recorded(phrases(), noisy=False)[:1], **NONE | {"room": 4})
    with pytest.raises(BadInput, match=r"group speaker is empty: .* set benchmark\.speaker to 0"):
        items_of(sounds(), **NONE | {"speaker": 4})
    with pytest.raises(BadInput, match="group conflict has no test clips in which nobody speaks"):
        items_of(recorded(phrases()), **NONE | {"conflict": 4})
    few = [clip for clip in recorded(phrases()) if "noise" not in clip["labels"]]
    mute = [clip for clip in sounds() if not clip["labels"]]
    with pytest.raises(
        BadInput, match="as a colour white said over pink noise .* there are 0; make more noisy"
    ):
        items_of(few, mute, **NONE | {"conflict": 8})


def changed(clip: Clip, **fields: Any) -> Clip:
    return {**clip, "key": f"changed-{clip['key']}", **fields}


def test_a_speaker_a_sentence_and_a_sound_of_training_are_refused_and_named() -> None:
    noises, spoken = corpora()
    refuse_overlap([noises, spoken])
    tested = [clip for clip in spoken if clip["split"] == "test"]
    sentences = [clip for clip in tested if clip["transcript"].count(" ") == 2]
    known = [
        changed(sentences[0], split="validation", speaker="anna", provenance={"generator": "other"}),
        *(
            changed(clip, split="train", speaker="berta", provenance={"generator": "other"})
            for clip in sentences[1:6]
        ),
    ]
    said = len({clip["transcript"] for clip in sentences[:6]})
    with pytest.raises(
        BadInput, match=rf"shares {said} sentences \('.*', '.*', '.*', \.\.\.\) with training"
    ):
        refuse_overlap([spoken, known])
    with pytest.raises(BadInput, match=r"shares 1 speaker \(anna\)"):
        refuse_overlap([[changed(tested[0], speaker="anna"), changed(noises[0], speaker="anna")]])
    tone = next(clip for clip in noises if clip["split"] == "test")
    with pytest.raises(BadInput, match=rf"shares 1 sound \({tone['key']} as changed-{tone['key']}\)"):
        refuse_overlap([noises, [changed(tone, split="train")]])
    added = {"augmentation": {"name": "noisy", "snr_db": 7.25, "seed": 1}}
    with pytest.raises(BadInput, match="shares 1 sound"):
        refuse_overlap(
            [
                [changed(noises[0], provenance={"generator": "a", "n": 1, **added})],
                [changed(tone, provenance={"generator": "a", "n": 2, **added})],
            ]
        )
    with pytest.raises(BadInput, match="the clip key .* is used in two corpora"):
        refuse_overlap([noises, noises[:1]])


def test_short_phrases_recur_and_acted_sentences_return_with_several_answers() -> None:
    _, spoken = corpora()
    short = next(clip for clip in spoken if clip["split"] == "test" and " " not in clip["transcript"])
    again = changed(short, split="train", speaker="anna", provenance={"generator": "other"})
    refuse_overlap([spoken, [again]])
    acted = public("emotion", ("angry", "sad"), 8, transcript="Don't forget a jacket", speaker="one")
    for number, clip in enumerate(acted):
        clip |= {"split": "train" if number < 4 else "test", "speaker": f"actor {number}"}
    refuse_overlap([acted])
    with pytest.raises(BadInput, match=r"shares 1 sentence \(\"Don't forget a jacket\"\)"):
        refuse_overlap(
            [[clip for clip in acted if clip["labels"]["emotion"] == "sad" or clip["split"] == "test"]]
        )


# --- the card ------------------------------------------------------------------------------------


def test_the_card_says_what_it_is_and_what_it_is_not(items: list[Item]) -> None:
    text = card(items)
    for phrase in (
        "200 questions",
        "closed",
        "synthetic",
        "micro encoder",
        "AudioLLMs/AudioBench",
        "no sentence of 3 words or more",
        f"{len(pairs_of(items))} pairs",
        "conflict (16)",
        "CC0-1.0",
    ):
        assert phrase in text
