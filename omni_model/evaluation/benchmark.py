"""AudioBench-mini: multiple-choice questions about sounds, made so that guessing without ears gains nothing.

Public benchmarks of this kind can be beaten unheard: in one of them the first option is right in 39.5 % of
items, where chance is 25 %. Here each letter is the key equally often inside each group, each answer of a
category is the key and a wrong option about equally often, and every clip comes from the test split, whose
voices and sound parameters no training saw. The items have a seed of their own and are fixed before training.
"""

import hashlib
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from omni_model.artifacts import AudioCorpus, Benchmark, canonical_json, sha256_file
from omni_model.audio.corpora import read_clips
from omni_model.config import JSON, BadInput, BenchmarkRecipe, Runtime
from omni_model.storage import Workspace
from omni_model.text.questions import LETTERS, Category, askable, grammar

ITEMS = "items.jsonl"
CARD = "card.md"
GROUPS = ("words", "voice", "scene")
CHANCE = 1 / len(LETTERS)
PASS_MARK = 0.40


@dataclass(frozen=True)
class Item:
    """One question. `source` is the corpus that holds `clip`; `answer` is the index of the right option."""

    id: str
    group: str
    category: str
    clip: str
    source: str
    question: str
    options: tuple[str, ...]
    answer: int
    transcript: str
    licence: str

    @property
    def key(self) -> str:
        """The right option."""
        return self.options[self.answer]


@dataclass(frozen=True)
class _Candidate:
    """A test clip of one corpus."""

    source: str
    clip: Mapping[str, Any]

    @property
    def name(self) -> str:
        return f"{self.source}/{self.clip['key']}"


def read_items(benchmark: Benchmark) -> list[Item]:
    """The items in the order of the file.

    Raises:
        BadInput: the file is not the one that was frozen.
    """
    path = benchmark.out / ITEMS
    if sha256_file(path) != benchmark.items_sha256:
        raise BadInput(
            f"{path} is not the item file that was frozen; delete {benchmark.uri} to have it made again"
        )
    plain = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    return [Item(**{**fields, "options": tuple(fields["options"])}) for fields in plain]


def build_benchmark(
    recipe: BenchmarkRecipe, sounds: AudioCorpus, speech: AudioCorpus, *, work: Workspace, runtime: Runtime
) -> dict[str, JSON]:
    """Stage: `items.jsonl` and `card.md` from the test clips of two corpora. Uses the recipe's own seed.

    Raises:
        BadInput: a group's size is not a multiple of four, or the test clips cannot fill a category evenly.
    """
    clips = {"sounds": read_clips(sounds), "speech": read_clips(speech)}
    items = write_items(recipe, clips)
    lines = [canonical_json(asdict(item)) for item in items]
    path = work.out / ITEMS
    path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    (work.out / CARD).write_text(card(items), encoding="utf-8")
    letters = Counter(LETTERS[item.answer] for item in items)
    work.metrics.summary(num_items=len(items), **{f"key_{letter}": letters[letter] for letter in LETTERS})
    return {"num_items": len(items), "items_sha256": sha256_file(path)}


def write_items(recipe: BenchmarkRecipe, clips: Mapping[str, Sequence[Mapping[str, Any]]]) -> list[Item]:
    """Balanced items of every group; `clips` by source, of which only test clips are used."""
    candidates = [
        _Candidate(source, dict(clip) | {"labels": askable(clip["labels"])})
        for source in sorted(clips)
        for clip in sorted(clips[source], key=lambda clip: clip["key"])
        if clip["split"] == "test"
    ]
    used: Counter[str] = Counter()
    items: list[Item] = []
    for group in GROUPS:
        size = getattr(recipe, group)
        if size % len(LETTERS):
            raise BadInput(
                f"benchmark.{group} is {size}; use a multiple of {len(LETTERS)}, so that keys balance"
            )
        categories = [
            category
            for category in grammar().categories.values()
            if category.group == group and any(category.name in one.clip["labels"] for one in candidates)
        ]
        if not categories:
            raise BadInput(f"no test clip has a label of the group {group}; lower benchmark.{group} to 0")
        position = 0
        for index, category in enumerate(categories):
            share = size // len(categories) + (index < size % len(categories))
            # Letters are dealt in turn through the whole group: exact there, and nearly so in each category.
            letters = [place % len(LETTERS) for place in range(position, position + share)]
            items += _category_items(category, letters, candidates, used, recipe.seed)
            position += share
    return items


def _category_items(
    category: Category, letters: list[int], candidates: list[_Candidate], used: Counter[str], seed: int
) -> list[Item]:
    """One item per letter; `used` counts what other categories took, and grows."""
    rng = np.random.default_rng([seed, _hash(f"{category.group}/{category.name}")])
    chosen = _choose_clips(category, len(letters), candidates, used, rng)
    keys = [clip.clip["labels"][category.name] for clip in chosen]
    wrong = _deal_wrong_options(keys, category.options, rng)
    items = []
    for number, (clip, key, others, letter) in enumerate(
        zip(chosen, keys, wrong, rng.permutation(letters), strict=True)
    ):
        options = [others[i] for i in rng.permutation(len(others))]
        options.insert(int(letter), key)
        items.append(
            Item(
                id=f"{category.group}-{category.name}-{number:02d}",
                group=category.group,
                category=category.name,
                clip=clip.clip["key"],
                source=clip.source,
                question=category.questions[int(rng.integers(len(category.questions)))],
                options=tuple(options),
                answer=int(letter),
                transcript=clip.clip["transcript"],
                licence=clip.clip["licence"],
            )
        )
    return items


def _choose_clips(
    category: Category, count: int, candidates: list[_Candidate], used: Counter[str], rng: np.random.Generator
) -> list[_Candidate]:
    """`count` different clips in random order, each label of the category as often as any other (within one).

    Clips that other categories have not used come first.
    """
    pools: dict[str, list[_Candidate]] = {option: [] for option in category.options}
    for index in rng.permutation(len(candidates)):
        label = candidates[index].clip["labels"].get(category.name)
        if label is not None:
            if label not in pools:
                raise BadInput(
                    f"clip {candidates[index].name} is labelled {category.name} {label!r}, "
                    f"which is not an answer in grammar.json; use one of {', '.join(category.options)}"
                )
            pools[label].append(candidates[index])
    chosen: list[_Candidate] = []
    quota = _deal_labels(category, count, {label: len(pool) for label, pool in pools.items()}, rng)
    for label, pool in pools.items():
        pool.sort(key=lambda clip: used[clip.name])  # stable: ties keep their random order
        chosen += pool[: quota[label]]
    used.update(clip.name for clip in chosen)
    return [chosen[i] for i in rng.permutation(len(chosen))]


def _deal_labels(
    category: Category, count: int, available: Mapping[str, int], rng: np.random.Generator
) -> Counter[str]:
    """How many items each label is the key of; no two labels differ by more than one."""
    least, extra = divmod(count, len(category.options))
    short = {label: number for label, number in available.items() if number < least}
    able = [label for label, number in available.items() if number > least]
    if short or len(able) < extra:
        label = min(available, key=lambda name: (available[name], name))
        raise BadInput(
            f"the test split has {available[label]} clips with {category.name} {label!r}, too few "
            f"for {count} balanced {category.name} items; make more test clips or lower "
            f"benchmark.{category.group}"
        )
    quota = Counter(dict.fromkeys(category.options, least))
    quota.update(able[i] for i in rng.permutation(len(able))[:extra])
    return quota


def _deal_wrong_options(
    keys: Sequence[str], options: Sequence[str], rng: np.random.Generator
) -> list[list[str]]:
    """Three wrong options per key: always those that have been wrong options least often so far."""
    dealt: Counter[str] = Counter()
    wrong: list[list[str]] = []
    for key in keys:
        order = [options[i] for i in rng.permutation(len(options)) if options[i] != key]
        picked = sorted(order, key=lambda option: dealt[option])[: len(LETTERS) - 1]
        dealt.update(picked)
        wrong.append(picked)
    return wrong


def _hash(text: str) -> int:
    """A number that stands for a text on every machine and in every process."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big")


CARD_TEXT = """# AudioBench-mini

{total} questions about {clips} sound clips, four options each, one of them right. Guessing gives 25 %.

## What it is

- Closed-set perception: what was said, in which voice, and what else is in the air.
- Test clips only: their voices and sound parameters occur in no training or validation clip.
- Each letter A to D is the key equally often in every group; inside a category every answer is the key, and \
a wrong option, about equally often. No clip is used twice in one category.
- The score asks each item in all four rotations of its options, so a model that likes one letter gets 25 %.
- Passing takes {goal} % and a lead over the best baseline without audio whose 95 % interval lies above zero.

## What it is not

- Not open understanding: the vocabulary is closed, and the same kinds of labels are taught in training, to \
the micro encoder (where that is the ear) as to the listener.
- Not real people or real rooms: every voice and every sound is synthetic.
- Not always an unheard kind of voice: the one croaking voice is new to the test by its accent alone.
- Not yet hard: no emotion, no conflict between words and tone, no question that needs reasoning.
- Not a part of, and not comparable with, AudioLLMs/AudioBench, MMAU or any other public benchmark.

## What is in it

{contents}

Licences of the clips: {licences}.
"""


def card(items: Sequence[Item]) -> str:
    """The benchmark card in Markdown: headings, paragraphs and flat lists only."""
    lines = []
    for group in dict.fromkeys(item.group for item in items):
        categories = Counter(item.category for item in items if item.group == group)
        parts = ", ".join(f"{name} {number}" for name, number in categories.items())
        lines.append(f"- {group} ({sum(categories.values())}): {parts}")
    return CARD_TEXT.format(
        total=len(items),
        clips=len({(item.source, item.clip) for item in items}),
        goal=round(100 * PASS_MARK),
        contents="\n".join(lines),
        licences=", ".join(sorted({item.licence for item in items})),
    )


def read_card(directory: Path) -> str:
    """The Markdown of a benchmark's payload directory."""
    return (directory / CARD).read_text(encoding="utf-8")
