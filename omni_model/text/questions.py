"""The grammar of sounds: what can be asked about a clip, which answers exist, and how a clip is put in words.

`grammar.json` beside this file is the vocabulary. Every answer is one distinctive word ("deep", not "very
low"), because a small model finds an option by matching its word. Options are written `A red ; B blue`, the
letter right before the word, so that the word's position already knows its letter.
"""

import functools
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from omni_model.config import BadInput

LETTERS = "ABCD"
NOTHING = "nothing"  # the answer to a question about words where none is said
SPOKEN = ("words", "prosody", "quality")  # groups of what only a clip in which somebody speaks has


@dataclass(frozen=True)
class Category:
    """One thing a clip can be asked about: the benchmark group, ways to ask, the answers, and phrases.

    `comparison_questions` ask about one of two clips; their `{place}` is first or second. A category that is
    not `embedded` is heard in public sets alone; the lessons, which are the demo's data, leave it out.
    """

    name: str
    group: str
    questions: tuple[str, ...]
    comparison_questions: tuple[str, ...]
    options: tuple[str, ...]
    phrases: Mapping[str, str]
    embedded: bool = True

    def phrase(self, place: str, value: str) -> str:
        """`value` worded for a `place` in the sentence; a phrase `place.value` wins over `place`."""
        return self.phrases.get(f"{place}.{value}", self.phrases[place]).format(value)


@dataclass(frozen=True)
class Grammar:
    """Every category by name, and the ways to ask for a caption and for what is said."""

    categories: Mapping[str, Category]
    caption_prompts: tuple[str, ...]
    transcript_prompts: tuple[str, ...]

    def category(self, name: str) -> Category:
        """The category of that name.

        Raises:
            BadInput: no such category.
        """
        if name not in self.categories:
            raise BadInput(f"{name!r} is not a category of grammar.json; one of {', '.join(self.categories)}")
        return self.categories[name]


@functools.cache
def grammar() -> Grammar:
    """The vocabulary of `grammar.json`, in the file's order."""
    plain = json.loads(Path(__file__).with_name("grammar.json").read_text(encoding="utf-8"))
    categories = {
        name: Category(
            name,
            c["group"],
            tuple(c["questions"]),
            tuple(c.get("which_clip_questions", ())),
            tuple(c["options"]),
            c.get("phrases", {}),
            c.get("embedded", True),
        )
        for name, c in plain["categories"].items()
    }
    return Grammar(categories, tuple(plain["caption_prompts"]), tuple(plain["transcript_prompts"]))


def multiple_choice(question: str, options: Sequence[str]) -> str:
    """The question, and its four options on the next line."""
    return f"{question}\n{list_options(options)}"


def list_options(options: Sequence[str]) -> str:
    """`A red ; B blue ; C green ; D black`."""
    if len(options) != len(LETTERS):
        raise BadInput(f"a question has {len(LETTERS)} options, not {len(options)}: {', '.join(options)}")
    return " ; ".join(f"{letter} {option}" for letter, option in zip(LETTERS, options, strict=True))


def pick_options(category: str, correct: str, rng: np.random.Generator) -> list[str]:
    """Four options in random order: `correct` and three other answers of its category.

    Raises:
        BadInput: `correct` is not an answer of the category.
    """
    known = grammar().category(category).options
    if correct not in known:
        raise BadInput(f"{correct!r} is not an answer of {category}; one of {', '.join(known)}")
    others = [option for option in known if option != correct]
    wrong = [others[i] for i in rng.permutation(len(others))[: len(LETTERS) - 1]]
    picked = [correct, *wrong]
    return [picked[i] for i in rng.permutation(len(picked))]


def askable(labels: Mapping[str, str]) -> dict[str, str]:
    """The labels that the grammar has questions and words for; corpora may know more about their clips."""
    known = grammar().categories
    return {name: v for name, v in labels.items() if name in known and v in known[name].options}


def caption(labels: Mapping[str, str], transcript: str) -> str:
    """One English sentence that names every label of a clip.

    >>> caption({"voice": "woman", "pace": "slow"}, "seven red cats")
    'A woman says seven red cats at a slow pace.'

    Raises:
        BadInput: a label that the grammar does not know.
    """
    for name, value in labels.items():
        if value not in grammar().category(name).options:
            raise BadInput(f"{value!r} is not an answer of {name} in grammar.json")
    spoken = bool(transcript) or any(grammar().categories[name].group in SPOKEN for name in labels)
    sentence = _speech(labels, transcript) if spoken else _sound(labels)
    if "recording" in labels:
        sentence += " " + grammar().categories["recording"].phrase("anywhere", labels["recording"])
    return f"{sentence[0].upper()}{sentence[1:]}."


def _speech(labels: Mapping[str, str], transcript: str) -> str:
    words = [labels[name] for name in ("number", "colour", "animal") if name in labels]
    said = transcript or " ".join(words)
    # A word that the transcript does not hold would be lost to the reader of the caption.
    unsaid = [word for word in words if word not in said]
    verb = f"says {said}" if said else "speaks"
    parts = [f"a {labels.get('voice', 'voice')} {verb}", *(f"meaning {word}" for word in unsaid)]
    for name in ("pace", "pitch", "contour", "tremolo", "loudness", "emotion"):
        if name in labels:
            parts.append(grammar().categories[name].phrase("speech", labels[name]))
    if "beeps" in labels:
        parts.append("with " + _count(labels["beeps"]))
    if "noise" in labels:
        parts.append("over " + _background(labels["noise"]))
    if source := _source(labels):
        parts.append("in a recording of " + source)
    return " ".join(parts)


def _sound(labels: Mapping[str, str]) -> str:
    shape = [labels[name] for name in ("loudness", "pitch", "contour", "tremolo") if name in labels]
    background = _background(labels["noise"]) if "noise" in labels else ""
    source = _source(labels)
    if "beeps" in labels:
        count, noun = _count(labels["beeps"]).split(" ", 1)
        sound = " ".join(["there are" if noun == "beeps" else "there is", count, *shape, noun])
    elif any(name in labels for name in ("pitch", "contour", "tremolo")):
        sound = " ".join(["a", *shape, "tone"])
    elif background and not source:
        return " ".join(["there is", *shape, background])
    else:
        sound = " ".join(["a", *shape, "sound"])
    if source:
        sound += " of " + source
    return f"{sound} over {background}" if background else sound


def _source(labels: Mapping[str, str]) -> str:
    """What a recording of a public set is of, in the words of its labels."""
    return " and ".join(labels[name] for name in ("event", "background") if name in labels)


def _count(beeps: str) -> str:
    return grammar().categories["beeps"].phrase("count", beeps)


def _background(noise: str) -> str:
    return grammar().categories["noise"].phrase("background", noise)
