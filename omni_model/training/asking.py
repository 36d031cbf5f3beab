"""The kinds of rows that teach a listener: what can be asked about a clip, two of them, or none.

A row is a conversation as `omni_model.text.conversation` renders it. Which clips can be asked in a way, and
what is asked of them, follows from their labels, transcripts and exchanges; everything random comes from the
generator alone.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from omni_model.config import BadInput
from omni_model.text.conversation import Exchange, Message
from omni_model.text.lessons import choice_question, open_question, sentence
from omni_model.text.questions import (
    LETTERS,
    NOTHING,
    askable,
    caption,
    grammar,
    multiple_choice,
    pick_options,
)

Clip = Mapping[str, Any]
Part = dict[str, str]
MAX_TURNS = 3
WORDS = "words"  # the group of labels that somebody says
FIRST, SECOND = "first", "second"


@dataclass(frozen=True)
class Asker:
    """The clips of one split that can be asked about, and one way to ask each kind of row.

    Attributes:
        clips: metadata as corpora hold it, with `labels` cut down to what can be asked.
        question_first: share of rows in which the clip comes after the words.
    """

    clips: Sequence[Clip]
    question_first: float

    @classmethod
    def of(cls, clips: Sequence[Clip], question_first: float) -> "Asker":
        """The clips with the labels that the grammar knows."""
        return cls([{**clip, "labels": askable(clip["labels"])} for clip in clips], question_first)

    def pools(self, kind: str) -> list[list[Clip]]:
        """The clips that rows of this kind begin with, one pool after the other giving one.

        Questions about a label have a pool for each category, of clips that are told by that label alone:
        otherwise what every clip has, as loudness, would be asked most. Kinds without a clip have no pool.
        """
        if KINDS[kind].fits is None:
            return []
        able = [clip for clip in self.clips if KINDS[kind].fits(clip)]
        if not KINDS[kind].by_label:
            return [able] if able else []
        names = sorted({name for clip in able for name in clip["labels"]})
        return [
            [{**clip, "labels": {name: clip["labels"][name]}} for clip in able if name in clip["labels"]]
            for name in names
        ]

    def row(self, kind: str, clip: Clip | None, rng: np.random.Generator) -> list[Message]:
        """One conversation of a kind, about `clip` where the kind has one."""
        return KINDS[kind].make(self, clip or {}, rng)

    def about(self, clip: Clip, exchanges: Sequence[Exchange], rng: np.random.Generator) -> list[Message]:
        """A conversation about one clip, which is heard in the first question."""
        (question, answer), *more = exchanges
        heard: Part = {"type": "audio", "clip": clip["key"]}
        said: Part = {"type": "text", "text": question}
        parts = [said, heard] if rng.random() < self.question_first else [heard, said]
        return [*_turn(parts, answer), *(message for each in more for message in _turn(*each))]

    def other(self, clip: Clip, categories: Sequence[str], rng: np.random.Generator) -> tuple[Clip, str]:
        """Another clip that is labelled differently in one of the categories, and which one.

        Raises:
            BadInput: there is none.
        """
        for category in rng.permutation(categories).tolist():
            own = clip["labels"][category]
            for index in rng.permutation(len(self.clips)):
                if self.clips[index]["labels"].get(category, own) != own:
                    return self.clips[index], category
        raise BadInput(
            f"no clip is labelled differently from {clip['key']} in {', '.join(categories)}, so two cannot "
            "be compared; set instructions.comparison to 0"
        )


def _turn(question: str | Sequence[Part], answer: str) -> list[Message]:
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


# --- exchanges about one clip --------------------------------------------------------------------


def ask_caption(clip: Clip, rng: np.random.Generator) -> Exchange:
    """A request for a caption, and the caption."""
    return str(rng.choice(grammar().caption_prompts)), caption(clip["labels"], clip["transcript"])


def ask_transcript(clip: Clip, rng: np.random.Generator) -> Exchange:
    """What is said, word by word."""
    return str(rng.choice(grammar().transcript_prompts)), clip["transcript"]


def ask_open(clip: Clip, rng: np.random.Generator) -> Exchange:
    """A question about one label, and the word."""
    category = str(rng.choice(sorted(clip["labels"])))
    return str(rng.choice(grammar().category(category).questions)), clip["labels"][category]


def ask_choice(clip: Clip, rng: np.random.Generator) -> Exchange:
    """A multiple-choice question about one label, and the letter."""
    category = str(rng.choice(sorted(clip["labels"])))
    question = str(rng.choice(grammar().category(category).questions))
    return _choice(question, pick_options(category, clip["labels"][category], rng), clip["labels"][category])


def ask_for_words(clip: Clip, rng: np.random.Generator) -> Exchange:
    """For a word that may not be there: one of the options is that nothing is said."""
    said = [name for name in sorted(clip["labels"]) if grammar().category(name).group == WORDS]
    if not said and rng.random() < 1 / 3:
        return str(rng.choice(grammar().transcript_prompts)), NOTHING
    words = said or [name for name, each in grammar().categories.items() if each.group == WORDS]
    category = str(rng.choice(words))
    known = grammar().category(category)
    answer = clip["labels"].get(category, NOTHING)
    others = [option for option in known.options if option != answer]
    wrong = [others[i] for i in rng.permutation(len(others))]
    options = [answer, *([] if answer == NOTHING else [NOTHING]), *wrong][: len(LETTERS)]
    return _choice(
        str(rng.choice(known.questions)), [options[i] for i in rng.permutation(len(options))], answer
    )


def _choice(question: str, options: Sequence[str], answer: str) -> Exchange:
    return multiple_choice(question, options), LETTERS[options.index(answer)]


# --- rows ----------------------------------------------------------------------------------------


def _alone(ask: Callable[[Clip, np.random.Generator], Exchange]) -> Callable[..., list[Message]]:
    return lambda asker, clip, rng: asker.about(clip, [ask(clip, rng)], rng)


def _several_turns(asker: Asker, clip: Clip, rng: np.random.Generator) -> list[Message]:
    """Questions about two or three labels of one clip, open or multiple choice."""
    labels = clip["labels"]
    names = [str(name) for name in rng.permutation(sorted(labels))[: rng.integers(2, MAX_TURNS + 1)]]
    exchanges = []
    for name in names:
        ask = ask_choice if rng.random() < 0.5 else ask_open
        exchanges.append(ask({**clip, "labels": {name: labels[name]}}, rng))
    return asker.about(clip, exchanges, rng)


def _compared(asker: Asker, clip: Clip, rng: np.random.Generator) -> list[Message]:
    """Two clips and a multiple-choice question about one; what the other is, is among the options."""
    other, category = asker.other(clip, _comparable(clip), rng)
    pair = [clip, other]
    if rng.random() < 0.5:
        pair.reverse()
    asked = int(rng.integers(2))
    known = grammar().category(category)
    question = str(rng.choice(known.comparison_questions)).format(place=(FIRST, SECOND)[asked])
    answer, distractor = pair[asked]["labels"][category], pair[1 - asked]["labels"][category]
    rest = [option for option in known.options if option not in (answer, distractor)]
    options = [answer, distractor, *(rest[i] for i in rng.permutation(len(rest))[: len(LETTERS) - 2])]
    asked_as, letter = _choice(question, [options[i] for i in rng.permutation(len(options))], answer)
    parts: list[Part] = [{"type": "audio", "clip": each["key"]} for each in pair]
    return _turn([*parts, {"type": "text", "text": asked_as}], letter)


def _comparable(clip: Clip) -> list[str]:
    return [name for name in sorted(clip["labels"]) if grammar().category(name).comparison_questions]


def _told_by_others(asker: Asker, clip: Clip, rng: np.random.Generator) -> list[Message]:
    """One of the questions that came with the clip."""
    question, answer = clip["exchanges"][rng.integers(len(clip["exchanges"]))]
    return asker.about(clip, [(question, answer)], rng)


def _replayed(asker: Asker, clip: Clip, rng: np.random.Generator) -> list[Message]:
    """A question about a sentence that stands where a clip would stand, as in the lessons."""
    write = (choice_question, choice_question, open_question, sentence)[rng.integers(4)]
    document = write(rng)
    while "sound" not in document:  # a plain sentence asks nothing
        document = write(rng)
    heard: Part = {"type": "description", "text": document["sound"]}
    return _turn([heard, {"type": "text", "text": document["question"]}], document["answer"])


@dataclass(frozen=True)
class Kind:
    """Which clips a kind of row can be about (None: it has no clip), and how it is written.

    Attributes:
        by_label: whether a row is about one label, so that categories are dealt in turn.
    """

    fits: Callable[[Clip], bool] | None
    make: Callable[[Asker, Clip, np.random.Generator], list[Message]]
    by_label: bool = False


def _labelled(clip: Clip) -> bool:
    return bool(clip["labels"])


KINDS: dict[str, Kind] = {
    "caption": Kind(_labelled, _alone(ask_caption)),
    "transcription": Kind(lambda clip: bool(clip["transcript"]), _alone(ask_transcript)),
    "question": Kind(_labelled, _alone(ask_open), by_label=True),
    "choice": Kind(_labelled, _alone(ask_choice), by_label=True),
    "no_speech": Kind(lambda clip: not clip["transcript"] or bool(_words(clip)), _alone(ask_for_words)),
    "multi_turn": Kind(lambda clip: len(clip["labels"]) > 1, _several_turns),
    "comparison": Kind(lambda clip: bool(_comparable(clip)), _compared),
    "public": Kind(lambda clip: bool(clip.get("exchanges")), _told_by_others),
    "replay": Kind(None, _replayed),
}


def _words(clip: Clip) -> list[str]:
    return [name for name in clip["labels"] if grammar().category(name).group == WORDS]
