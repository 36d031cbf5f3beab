"""How a row of a public set reads as a conversation: the one place where it becomes text.

What a model is taught and what it is examined on must be the same text, so both come from here. Options are
written with the letter in front, because then the position of an option already knows its letter. Options of
one word each stand on one line, `A red ; B blue`, the very form in which the small models of this house bind
letters and in which clips are asked about (`questions.py`). Longer ones have a line each, for a letter that
begins a line is the same token as the letter of the answer, and one behind a space is another.

nanochat writes the letter behind, `- red=A`, for that sameness and for a binding that small models find
easier. With one word to an option our own runs bind a letter in front to .98 and more; with long options the
two forms have not been compared.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from omni_model.config import BadInput

CHOICE_SETS = ("mmlu", "arc-easy", "arc-challenge")
LETTERS = "ABCDEFGH"
CALCULATION = re.compile(r"<<([^<>]+)=([^<>=]+)>>")  # GSM8K's mark: what to compute, and what comes out
FINAL_NUMBER = re.compile(r"####\s*\$?(-?[\d.,]+)")

Part = dict[str, str]
Message = dict[str, Any]


@dataclass(frozen=True)
class ChoiceQuestion:
    """A question, a letter for each of its choices, and the letter that is right."""

    question: str
    letters: tuple[str, ...]
    choices: tuple[str, ...]
    answer: str


def multiple_choice(question: str, letters: Sequence[str], choices: Sequence[str]) -> str:
    """What the model is asked.

    >>> multiple_choice("Which colour?", "ABC", ["red", "blue", "black"])
    'Which colour?\\nA red ; B blue ; C black'

    Raises:
        BadInput: not one letter for each choice.
    """
    if len(letters) != len(choices):
        raise BadInput(f"{question!r} has {len(choices)} choices and {len(letters)} letters; give one each")
    words = all(len(choice.split()) == 1 for choice in choices)
    between = " ; " if words else "\n"
    return f"{question}\n" + between.join(f"{a} {b}" for a, b in zip(letters, choices, strict=True))


def choice_row(name: str, row: Mapping[str, Any]) -> ChoiceQuestion:
    """A row of one of CHOICE_SETS. Choices are lettered A, B, C in order, also where a row says 1, 2, 3.

    Raises:
        BadInput: the set has no choices, or the row's answer is none of them.
    """
    if name == "mmlu":
        choices, right = list(row["choices"]), int(row["answer"])
    elif name in CHOICE_SETS:
        choices, labels = list(row["choices"]["text"]), list(row["choices"]["label"])
        right = labels.index(row["answerKey"]) if row["answerKey"] in labels else -1
    else:
        raise BadInput(f"{name!r} is no set of multiple choice; one of {', '.join(CHOICE_SETS)}")
    if not 2 <= len(choices) <= len(LETTERS) or not 0 <= right < len(choices):
        raise BadInput(f"{name}: the answer to {row['question']!r} is none of its {len(choices)} choices")
    letters = tuple(LETTERS[: len(choices)])
    return ChoiceQuestion(row["question"], letters, tuple(choices), letters[right])


def choice_messages(name: str, row: Mapping[str, Any]) -> list[Message]:
    """The question as a user asks it; the assistant says the letter and no more."""
    found = choice_row(name, row)
    asked = multiple_choice(found.question, found.letters, found.choices)
    return [{"role": "user", "content": asked}, {"role": "assistant", "content": found.answer}]


def gsm8k_messages(row: Mapping[str, Any]) -> list[Message]:
    """A sum and its solution; each `<<12/60=0.2>>` becomes a call of the calculator and what it returns."""
    parts: list[Part] = []
    answer, end = str(row["answer"]), 0
    for mark in CALCULATION.finditer(answer):
        parts += [{"type": "text", "text": answer[end : mark.start()]}] if mark.start() > end else []
        parts += [{"type": "python", "text": mark[1]}, {"type": "python_output", "text": mark[2]}]
        end = mark.end()
    parts += [{"type": "text", "text": answer[end:]}] if end < len(answer) else []
    return [{"role": "user", "content": row["question"]}, {"role": "assistant", "content": parts}]


def gsm8k_answer(text: str) -> str | None:
    """The number behind the first `####`, without thousands' commas, a currency sign or a full stop.

    >>> gsm8k_answer("so he pays 1,200. #### 1,200")
    '1200'
    """
    found = FINAL_NUMBER.search(text)
    number = found[1].replace(",", "").rstrip(".") if found else ""
    return number if any(letter.isdigit() for letter in number) else None
