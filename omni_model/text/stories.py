"""Short stories about places and what is heard there, with the facts that each of them tells.

`stories.json` beside this file has the words and the sentences. In a sentence `[a|b|]` is one of its parts,
`{animal}` the story's animal, and `{animal_does}` a phrase about it. A story has one value a category, so it
cannot contradict itself, and its facts are the categories that its sentences name, so every fact can be read
in it. As in `questions.py`, every answer is one distinctive word; no two answers of a story are the same.
"""

import functools
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from omni_model.config import BadInput
from omni_model.text.questions import LETTERS

EVENTS = ("animal", "thing", "speech")
CLOSING_SHARE = 0.3
INDOORS_SHARE = 0.5
ONE_OF = re.compile(r"\[([^\[\]]*)\]")
SLOT = re.compile(r"\{(\w+)\}")


@dataclass(frozen=True)
class Story:
    """Two to five sentences, and what they tell: category -> the word that answers its question."""

    text: str
    facts: Mapping[str, str]


@functools.cache
def _words() -> dict[str, Any]:
    found: dict[str, Any] = json.loads(Path(__file__).with_name("stories.json").read_text(encoding="utf-8"))
    return found


def story_categories() -> tuple[str, ...]:
    """Everything that a story may tell."""
    return tuple(_words()["categories"])


def story_options(category: str) -> tuple[str, ...]:
    """Every answer of a category.

    Raises:
        BadInput: no such category.
    """
    return tuple(_category(category)["options"])


def story_question(category: str, rng: np.random.Generator) -> str:
    """One of the ways to ask for a category.

    Raises:
        BadInput: no such category.
    """
    return str(rng.choice(_category(category)["questions"]))


def pick_story_options(category: str, correct: str, rng: np.random.Generator) -> list[str]:
    """Four options in random order: `correct` and three other answers of its category.

    Raises:
        BadInput: `correct` is not an answer of the category.
    """
    others = [option for option in story_options(category) if option != correct]
    if len(others) == len(story_options(category)):
        raise BadInput(f"{correct!r} is not an answer of {category} in stories.json")
    picked = [correct, *(others[i] for i in rng.choice(len(others), size=len(LETTERS) - 1, replace=False))]
    return [picked[i] for i in rng.permutation(len(picked))]


def _category(name: str) -> dict[str, Any]:
    categories: dict[str, dict[str, Any]] = _words()["categories"]
    if name not in categories:
        raise BadInput(f"{name!r} is not a category of stories.json; one of {', '.join(categories)}")
    return categories[name]


def random_story(rng: np.random.Generator) -> Story:
    """A place, one to three things that happen there in any order, and sometimes a closing sentence."""
    indoors = bool(rng.random() < INDOORS_SHARE)
    values = _draw(indoors, rng)
    events = [EVENTS[i] for i in rng.permutation(len(EVENTS))[: rng.integers(1, len(EVENTS) + 1)]]
    kinds = ["opening", *events, *(["closing"] if rng.random() < CLOSING_SHARE else [])]
    sentences = [_one_of_each(str(rng.choice(_words()["sentences"][kind])), rng) for kind in kinds]
    told = {slot.partition("_")[0] for sentence in sentences for slot in SLOT.findall(sentence)}
    filled = [SLOT.sub(lambda found: _fill(found[1], values, indoors), each) for each in sentences]
    return Story(
        " ".join(_capitalised(each) for each in filled),
        {category: values[category] for category in story_categories() if category in told},
    )


def _draw(indoors: bool, rng: np.random.Generator) -> dict[str, str]:
    """A value for every category, no word twice, none at odds with the place or the weather."""
    words = _words()
    here: dict[str, list[str]] = dict(words["indoors" if indoors else "outdoors"])
    here.setdefault("place", [p for p in story_options("place") if p not in words["indoors"]["place"]])
    values: dict[str, str] = {}
    for category in ("weather", *(name for name in story_categories() if name != "weather")):
        if category == "time":
            here.update(words.get(values["weather"], {}))
        options = here.get(category, story_options(category))
        values[category] = str(rng.choice([each for each in options if each not in values.values()]))
    return values


def _one_of_each(sentence: str, rng: np.random.Generator) -> str:
    def pick(found: re.Match[str]) -> str:
        parts = found[1].split("|")
        return parts[rng.integers(len(parts))]

    return ONE_OF.sub(pick, sentence)


def _fill(slot: str, values: Mapping[str, str], indoors: bool) -> str:
    """What stands in a slot: `animal` a bare word, `animal_a` with its article, else a phrase about it."""
    category, _, form = slot.partition("_")
    value = values[category]
    if slot == category:
        return value
    if not form:
        return _capitalised(value)
    if form == "a":
        return f"{'an' if value[0] in 'aeiou' else 'a'} {value}"
    if form == "there":
        return _phrase(category, "is", value) + (" outside" if indoors else "")
    return _phrase(category, form, value)


def _phrase(category: str, form: str, value: str) -> str:
    phrases: dict[str, str] = _words()["phrases"][category]
    return phrases.get(f"{form}.{value}", phrases.get(form, "")).format(value)


def _capitalised(text: str) -> str:
    return text[:1].upper() + text[1:]
