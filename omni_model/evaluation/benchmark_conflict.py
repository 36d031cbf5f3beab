"""Items whose sound contradicts a quick guess: nobody speaks, or the wrong option is true of something else.

*Silence*: a question about words, with "nothing" among the options. In a quarter of these items nobody speaks
and "nothing" is right; in the others the word is said. So always answering "nothing" gains nothing.

*Conflict*: one wrong option is true of another side of the same clip, as where somebody says white over pink
noise and the noise is asked for, or the colour is asked for that was said over white noise. Following that
lure gets no such item right. Where there are too few such clips, the answer and the lure stand in two clips,
and in one alone somebody speaks: a number said, and another number of beeps.
"""

from collections import Counter
from collections.abc import Sequence

import numpy as np

from omni_model.config import BadInput
from omni_model.evaluation.benchmark_choice import (
    Clip,
    answers_in,
    deal_wrong_options,
    least_used,
    letters_in_turn,
    named_rng,
    shuffled,
    with_key_at,
)
from omni_model.evaluation.benchmark_item import Item
from omni_model.text.questions import LETTERS, NOTHING, SPOKEN, Category, grammar

GROUP = "conflict"
SILENCE = "silence"  # the kind of a clip in which there is nothing but a room's noise
MAY_SPEAK = ("speech", "music")  # labels of recordings in which somebody may be heard, transcript or not
# The category asked, the clips, the index of the one that is asked about, and the lure.
Lured = tuple[Category, tuple[Clip, ...], int, str]


def conflict_items(size: int, clips: Sequence[Clip], used: Counter[str], seed: int) -> list[Item]:
    """Half silence and half conflict, each a multiple of four; the odd four are silence.

    Raises:
        BadInput: too few test clips are silent, or say a word that is true of something else.
    """
    step = len(LETTERS)
    conflicts = size // (2 * step) * step
    return [
        *_silence_items(size - conflicts, clips, used, seed),
        *_lure_items(conflicts, clips, used, seed),
    ]


# --- silence -------------------------------------------------------------------------------------


def _silence_items(count: int, clips: Sequence[Clip], used: Counter[str], seed: int) -> list[Item]:
    rng = named_rng(seed, f"{GROUP}/silence")
    known = [category for category in grammar().categories.values() if category.group == "words"]
    words = {category.name: answers_in(category, clips) for category in known}
    asked = [category for category in known if len(words[category.name]) >= len(LETTERS)]
    mute = [clip for clip in clips if _is_mute(clip)]
    if not asked or not mute:
        missing = "in which nobody speaks" if asked else "that say a number, a colour or an animal"
        raise BadInput(
            f"the benchmark's group {GROUP} has no test clips {missing}; add such a corpus, or set "
            f"benchmark.{GROUP} to 0"
        )
    letters, keys, dealt = shuffled(letters_in_turn(0, count), rng), Counter[str](), Counter[str]()
    items: list[Item] = []
    for number in range(count):
        category = asked[number % len(asked)]
        # The last of every four: a letter's share of all items is nothing's share of these.
        if number % len(LETTERS) == len(LETTERS) - 1:
            key, clip = NOTHING, least_used(_mute_pool(mute, number // len(LETTERS)), used, rng)
        else:
            key = min(shuffled(words[category.name], rng), key=lambda word: keys[word])
            clip = least_used([c for c in clips if c["labels"].get(category.name) == key], used, rng)
        keys[key] += 1
        (wrong,) = deal_wrong_options([key], words[category.name], dealt, rng, always=[NOTHING])
        items.append(_item("silence", category, [clip], number, key, wrong, letters[number], rng))
    return items


def _is_mute(clip: Clip) -> bool:
    """Whether nobody speaks in it, as far as anybody knows."""
    spoken = any(
        value in MAY_SPEAK or grammar().categories[name].group in SPOKEN
        for name, value in clip["labels"].items()
    )
    return not (clip["transcript"] or clip["speaker"] or spoken)


def _mute_pool(mute: Sequence[Clip], number: int) -> list[Clip]:
    """Silent clips and sounding ones in turn, where there are both."""
    silent = [clip for clip in mute if is_silent(clip)]
    sounding = [clip for clip in mute if not is_silent(clip)]
    first, second = (silent, sounding) if number % 2 == 0 else (sounding, silent)
    return first or second


def is_silent(clip: Clip) -> bool:
    """Whether a clip was made to hold a room's noise alone."""
    return bool(clip["provenance"].get("kind") == SILENCE)


# --- conflict ------------------------------------------------------------------------------------


def _lure_items(count: int, clips: Sequence[Clip], used: Counter[str], seed: int) -> list[Item]:
    rng = named_rng(seed, f"{GROUP}/lure")
    asked = [*_inside(count, clips, used, rng)]
    asked += _side_by_side(count - len(asked), clips, used, rng)
    if len(asked) < count:
        raise BadInput(
            f"the benchmark's group {GROUP} needs {count} test clips in which one thing is called like "
            f"another, as a colour white said over pink noise or another colour over white noise, and there "
            f"are {len(asked)}; make more noisy recordings for the test split or lower benchmark.{GROUP}"
        )
    letters, dealt = shuffled(letters_in_turn(0, count), rng), Counter[str]()
    items: list[Item] = []
    for number, (category, heard, place, lure) in enumerate(asked):
        key = heard[place]["labels"][category.name]
        (wrong,) = deal_wrong_options([key], answers_in(category, clips), dealt, rng, always=[lure])
        letter = letters[number]
        items.append(_item("lure", category, heard, number, key, wrong, letter, rng, asked=place, lure=lure))
    return items


def _inside(count: int, clips: Sequence[Clip], used: Counter[str], rng: np.random.Generator) -> list[Lured]:
    """At most `count` single clips that hold the answer and the lure, no clip twice."""
    found: list[Lured] = []
    pools = lured(clips)
    taken: set[str] = set()
    # The rarest kind gets its even share first, so that what it lacks is shared among the others.
    names = sorted(pools, key=lambda name: (len(pools[name]), name))
    for index, name in enumerate(names):
        free = [pair for pair in shuffled(pools[name], rng) if pair[0]["key"] not in taken]
        keys: Counter[str] = Counter()
        for _ in range(min(len(free), (count - len(found)) // (len(names) - index))):
            clip, lure = min(free, key=lambda pair: (keys[pair[0]["labels"][name]], used[pair[0]["key"]]))
            free = [pair for pair in free if pair[0]["key"] != clip["key"]]
            keys[clip["labels"][name]] += 1
            used[clip["key"]] += 1
            taken.add(clip["key"])
            found.append((grammar().category(name), (clip,), 0, lure))
    return found


def lured(clips: Sequence[Clip]) -> dict[str, list[tuple[Clip, str]]]:
    """Category -> clips that can be asked about it while a wrong answer is true of something else in them.

    Beside each clip stands that answer, the lure.
    """
    found: dict[str, list[tuple[Clip, str]]] = {}
    for category in _with_options(clips):
        answers = answers_in(category, clips)
        for clip in clips:
            key = clip["labels"].get(category.name)
            lures = [v for name, v in clip["labels"].items() if name != category.name and v in answers]
            if key is not None and (lure := next((v for v in lures if v != key), "")):
                found.setdefault(category.name, []).append((clip, lure))
    return found


def _side_by_side(
    count: int, clips: Sequence[Clip], used: Counter[str], rng: np.random.Generator
) -> list[Lured]:
    """At most `count` times two clips: one holds the answer, the other the lure.

    In one alone somebody speaks, so the question can be about one of them only.
    """
    kinds = [
        kind
        for category in _with_options(clips)
        for other in grammar().categories.values()
        if other is not category and (kind := _apart(category, other, clips))
    ]
    found: list[Lured] = []
    keys: Counter[str] = Counter()
    for number in range(count if kinds else 0):
        category, lure_name, abouts, besides = kinds[number % len(kinds)]
        about = min(
            shuffled(abouts, rng), key=lambda clip: (keys[clip["labels"][category.name]], used[clip["key"]])
        )
        key = about["labels"][category.name]
        beside = least_used([clip for clip in besides if clip["labels"][lure_name] != key], used, rng)
        used[about["key"]] += 1
        keys[key] += 1
        place = int(rng.integers(2))
        heard = (about, beside) if place == 0 else (beside, about)
        found.append((category, heard, place, beside["labels"][lure_name]))
    return found


def _apart(
    category: Category, other: Category, clips: Sequence[Clip]
) -> tuple[Category, str, list[Clip], list[Clip]] | None:
    """Clips with the answer and clips with a lure by the name of `other`; None where one kind is missing."""
    answers = answers_in(category, clips)
    abouts = [c for c in clips if category.name in c["labels"] and other.name not in c["labels"]]
    besides = [
        c for c in clips if c["labels"].get(other.name) in answers and category.name not in c["labels"]
    ]
    for speaking in (True, False):
        beside = [clip for clip in besides if _is_mute(clip) == speaking]
        lures = {clip["labels"][other.name] for clip in beside}
        about = [c for c in abouts if _is_mute(c) != speaking and lures - {c["labels"][category.name]}]
        if about:
            return category, other.name, about, beside
    return None


def _with_options(clips: Sequence[Clip]) -> list[Category]:
    """The categories that test clips give four answers to."""
    known = grammar().categories.values()
    return [category for category in known if len(answers_in(category, clips)) >= len(LETTERS)]


def _item(
    part: str,
    category: Category,
    heard: Sequence[Clip],
    number: int,
    key: str,
    wrong: Sequence[str],
    letter: int,
    rng: np.random.Generator,
    *,
    asked: int = 0,
    lure: str = "",
) -> Item:
    return Item(
        id=f"{GROUP}-{part}-{number:02d}",
        group=GROUP,
        category=category.name,
        clips=tuple(clip["key"] for clip in heard),
        question=category.questions[int(rng.integers(len(category.questions)))],
        options=with_key_at(letter, key, wrong, rng),
        answer=letter,
        transcript=" / ".join(clip["transcript"] for clip in heard if clip["transcript"]),
        licence=", ".join(dict.fromkeys(clip["licence"] for clip in heard)),
        asked=asked,
        lure=lure,
    )
