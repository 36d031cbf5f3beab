"""Choosing clips and options so that nothing but the sound tells the answer.

Each answer of a category is the key about equally often, and a wrong option about equally often; letters
are dealt in turn. Where it can be had, two items make a *pair*: the same words, the same question and
options, and another sound, so that whoever only reads gets at most one of them.
"""

import hashlib
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from omni_model.config import BadInput
from omni_model.text.questions import LETTERS, Category, askable

Clip = Mapping[str, Any]
# One or two clips that are asked about with the same words and options.
Unit = tuple[Clip, ...]


def named_rng(seed: int, name: str) -> np.random.Generator:
    """Random numbers that belong to one named part of the benchmark, on every machine."""
    return np.random.default_rng([seed, int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big")])


def shuffled(things: Sequence[Any], rng: np.random.Generator) -> list[Any]:
    """The same things in random order."""
    return [things[i] for i in rng.permutation(len(things))]


def held_out(corpora: Iterable[Sequence[Clip]]) -> list[Clip]:
    """The test clips of all corpora in key order, with the labels that the grammar has questions for."""
    found = [clip for clips in corpora for clip in clips if clip["split"] == "test"]
    found.sort(key=lambda clip: str(clip["key"]))
    return [{**clip, "labels": askable(clip["labels"])} for clip in found]


def answers_in(category: Category, clips: Sequence[Clip]) -> list[str]:
    """The answers of a category that some clip has, in the grammar's order."""
    there = {clip["labels"].get(category.name) for clip in clips}
    return [option for option in category.options if option in there]


def choose_units(
    category: Category,
    group: str,
    count: int,
    clips: Sequence[Clip],
    used: Counter[str],
    rng: np.random.Generator,
    *,
    paired: bool,
) -> list[Unit]:
    """`count` different clips in random order, each answer of the category equally often (within one).

    Clips that have been used least come first, and `used` grows. `paired`: as many as can be in pairs that
    say the same words with different answers.
    """
    pools: dict[str, list[Clip]] = {answer: [] for answer in answers_in(category, clips)}
    for clip in shuffled([clip for clip in clips if category.name in clip["labels"]], rng):
        pools[clip["labels"][category.name]].append(clip)
    left = _deal_answers(category, group, count, {answer: len(pool) for answer, pool in pools.items()}, rng)
    units = _choose_pairs(category.name, pools, left, used) if paired else []
    taken = {clip["key"] for unit in units for clip in unit}
    for answer, pool in pools.items():
        free = [clip for clip in pool if clip["key"] not in taken]
        free.sort(key=lambda clip: used[clip["key"]])  # stable: ties keep their random order
        units += [(clip,) for clip in free[: left[answer]]]
    used.update(clip["key"] for unit in units for clip in unit)
    return shuffled(units, rng)


def _deal_answers(
    category: Category, group: str, count: int, available: Mapping[str, int], rng: np.random.Generator
) -> Counter[str]:
    """How many items each answer is the key of; no two answers differ by more than one."""
    least, extra = divmod(count, len(available))
    able = [answer for answer, number in available.items() if number > least]
    if min(available.values()) < least or len(able) < extra:
        answer = min(available, key=lambda name: (available[name], name))
        raise BadInput(
            f"the test split has {available[answer]} clips with {category.name} {answer!r}, too few for "
            f"{count} balanced {category.name} items; make more test clips or lower benchmark.{group}"
        )
    quota = Counter(dict.fromkeys(available, least))
    quota.update(shuffled(able, rng)[:extra])
    return quota


def _choose_pairs(
    name: str, pools: Mapping[str, Sequence[Clip]], left: Counter[str], used: Counter[str]
) -> list[Unit]:
    """Pairs of clips with the same transcript and different answers; `left` shrinks by what they take.

    The two answers that are still wanted most come first, so that no answer is left over alone.
    """
    by_words: dict[str, list[Clip]] = {}
    for pool in pools.values():
        for clip in pool:
            if clip["transcript"]:
                by_words.setdefault(clip["transcript"], []).append(clip)
    open_pairs = [
        (one, other)
        for clips in by_words.values()
        for place, one in enumerate(clips)
        for other in clips[place + 1 :]
        if one["labels"][name] != other["labels"][name]
    ]
    pairs: list[Unit] = []
    while open_pairs := [pair for pair in open_pairs if all(left[clip["labels"][name]] for clip in pair)]:
        best = min(
            open_pairs,
            key=lambda pair: (
                sum(used[clip["key"]] for clip in pair),
                -sum(left[clip["labels"][name]] for clip in pair),
            ),
        )
        pairs.append(best)
        left.subtract(clip["labels"][name] for clip in best)
        keys = {clip["key"] for clip in best}
        open_pairs = [pair for pair in open_pairs if keys.isdisjoint(clip["key"] for clip in pair)]
    return pairs


def least_used(clips: Sequence[Clip], used: Counter[str], rng: np.random.Generator) -> Clip:
    """A random one of the clips that have been used least; it is used once more."""
    chosen: Clip = min(shuffled(clips, rng), key=lambda clip: used[clip["key"]])
    used[chosen["key"]] += 1
    return chosen


def deal_wrong_options(
    keys: Sequence[str],
    options: Sequence[str],
    dealt: Counter[str],
    rng: np.random.Generator,
    *,
    always: Sequence[str] = (),
) -> list[list[str]]:
    """Three wrong options for each of the keys of a unit, which share them.

    They are the other keys of the unit, those that are `always` there, and then what has been a wrong option
    least often; `dealt` counts that, and grows.
    """
    fixed = [*dict.fromkeys((*keys, *always))]
    others = [option for option in shuffled(list(options), rng) if option not in fixed]
    others.sort(key=lambda option: dealt[option])
    shared = [*fixed, *others[: len(LETTERS) - len(fixed)]]
    wrong = [[option for option in shared if option != key] for key in keys]
    dealt.update(option for each in wrong for option in each)
    return wrong


def with_key_at(letter: int, key: str, wrong: Sequence[str], rng: np.random.Generator) -> tuple[str, ...]:
    """The four options, the right one at the place of its letter and the others in random order."""
    options = shuffled(wrong, rng)
    options.insert(letter, key)
    return tuple(options)


def letters_in_turn(first: int, count: int) -> list[int]:
    """The letters of `count` places from `first` on; four in a row are all different."""
    return [place % len(LETTERS) for place in range(first, first + count)]
