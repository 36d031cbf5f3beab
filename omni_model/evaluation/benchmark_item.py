"""What AudioBench-mini is made of: items, the groups they belong to, and the file that holds them."""

import json
from collections.abc import Sequence
from dataclasses import dataclass

from omni_model.artifacts import Benchmark, sha256_file
from omni_model.config import BadInput
from omni_model.text.questions import LETTERS

ITEMS = "items.jsonl"
CHANCE = 1 / len(LETTERS)
PAIR_CHANCE = CHANCE**2
PASS_MARK = 0.40
GROUPS = ("words", "speaker", "prosody", "quality", "room", "events", "conflict")
# What is claimed is claimed of these: a group of twenty items alone has an interval of forty points.
MACRO_GROUPS = {
    "words": ("words",),
    "voice": ("speaker", "prosody", "quality"),
    "scene": ("room", "events"),
    "conflict": ("conflict",),
}


@dataclass(frozen=True)
class Item:
    """One question.

    Attributes:
        clips: keys of the one or two clips that are heard, in this order.
        answer: index of the right option.
        asked: index of the clip that the question is about.
        transcript: what is said; of two clips, both with a stroke between.
        pair: the same for two items that say the same words, have the same options and differ in their key.
        lure: the option that is true of something else in the clip.
    """

    id: str
    group: str
    category: str
    clips: tuple[str, ...]
    question: str
    options: tuple[str, ...]
    answer: int
    transcript: str
    licence: str
    asked: int = 0
    pair: str = ""
    lure: str = ""

    @property
    def key(self) -> str:
        """The right option."""
        return self.options[self.answer]

    @property
    def macro_group(self) -> str:
        """The macro group that it counts for."""
        return next(name for name, groups in MACRO_GROUPS.items() if self.group in groups)


def read_items(benchmark: Benchmark) -> list[Item]:
    """The items in the order of the file.

    Raises:
        BadInput: the file is not the one that was frozen.
    """
    path = benchmark.out / ITEMS
    if not path.exists() or sha256_file(path) != benchmark.items_sha256:
        raise BadInput(
            f"{path} is not the item file that was frozen; delete {benchmark.uri} to have it made again"
        )
    plain = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    return [
        Item(**{**fields, "clips": tuple(fields["clips"]), "options": tuple(fields["options"])})
        for fields in plain
    ]


def pairs_of(items: Sequence[Item]) -> list[tuple[int, int]]:
    """Row numbers of the two items of each pair."""
    first: dict[str, int] = {}
    found = []
    for row, item in enumerate(items):
        if item.pair in first:
            found.append((first.pop(item.pair), row))
        elif item.pair:
            first[item.pair] = row
    return found
