"""Three ways to read an answer out of a model.

*Letters*, the one that counts: every item is asked four times, with its options rotated, and its score is the
mean of the four verdicts, so that a model that always says A gets exactly 25 %. The answer is read from the
logits of the four letters alone. *Likelihood*: the question is asked without options, and the option whose
words gain most from hearing the clip is taken, so that nobody has to know letters. *Text*: what the model
writes, read strictly; whatever is no option is wrong.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from omni_model.evaluation.answering import NOTHING_HEARD, Answerer, Asked, Listener
from omni_model.evaluation.benchmark_item import Item
from omni_model.text.questions import LETTERS

UNREADABLE = -1
SPARE_TOKENS = 4  # that an answer may have beyond its longest option: a letter, a stop


@dataclass(frozen=True)
class Verdicts:
    """What was answered: letter probabilities as shown (items, rotations, letters), and the right letters."""

    shown: np.ndarray
    right: np.ndarray

    @property
    def correct(self) -> np.ndarray:
        """(items, rotations) booleans."""
        return self.shown.argmax(axis=2) == self.right

    @property
    def scores(self) -> np.ndarray:
        """Mean correctness of each item over its rotations, (items,)."""
        return self.correct.mean(axis=1)

    @property
    def strict(self) -> np.ndarray:
        """Whether an item was answered right in every rotation, (items,)."""
        return self.correct.all(axis=1)

    @property
    def consistent(self) -> np.ndarray:
        """Whether an item got the same answer in every rotation, right or wrong, (items,)."""
        turns = np.arange(len(LETTERS))
        options = (self.shown.argmax(axis=2) + turns) % len(LETTERS)
        return (options == options[:, :1]).all(axis=1)

    @property
    def options(self) -> np.ndarray:
        """Probabilities (items, options) in the item's own order, averaged over the rotations."""
        turns = range(len(LETTERS))
        return np.mean([np.roll(self.shown[:, turn], turn, axis=1) for turn in turns], axis=0)

    @property
    def letters(self) -> dict[str, int]:
        """How often each letter was answered, over all rotations."""
        counts = np.bincount(self.shown.argmax(axis=2).ravel(), minlength=len(LETTERS))
        return {letter: int(count) for letter, count in zip(LETTERS, counts, strict=True)}


def ask(items: Sequence[Item], answer: Answerer, clips: Sequence[tuple[str, ...]]) -> Verdicts:
    """Put every item in the four cyclic rotations of its options, hearing `clips` (one tuple per item)."""
    turns = range(len(LETTERS))
    asked = [
        Asked(item, item.options[turn:] + item.options[:turn], heard)
        for item, heard in zip(items, clips, strict=True)
        for turn in turns
    ]
    shown = np.asarray(answer(asked), dtype=np.float64).reshape(len(items), len(LETTERS), len(LETTERS))
    right = np.array([one.right for one in asked]).reshape(len(items), len(LETTERS))
    return Verdicts(shown, right)


def likelihood_gains(items: Sequence[Item], listener: Listener) -> np.ndarray:
    """How much more likely each option becomes by hearing, in nats per token: (items, options).

    The question is asked without options, and each option is scored as the answer, with the clips and
    without. The difference takes out how common a word is.
    """
    answers = [(item.question, option) for item in items for option in item.options]
    clips = [item.clips for item in items for _ in item.options]
    heard = listener.log_likelihoods(answers, clips)
    unheard = listener.log_likelihoods(answers, [NOTHING_HEARD] * len(answers))
    return (heard - unheard).reshape(len(items), len(LETTERS))


def written_answers(items: Sequence[Item], listener: Listener, longest_option: int) -> list[str]:
    """What the model writes when it is asked with the options as they are; their length is in tokens."""
    asked = [Asked(item, item.options, item.clips) for item in items]
    return listener.says(asked, longest_option + SPARE_TOKENS)


def read_answer(text: str, options: Sequence[str]) -> int:
    """Index of the option that a text names; UNREADABLE where it names none, or says anything else.

    A letter, an option, or a letter and its own option: `B`, `blue`, `B blue`, `B. Blue.`
    """
    said = text.strip().rstrip(".").casefold()
    for index, (letter, option) in enumerate(zip(LETTERS.casefold(), options, strict=True)):
        word = option.casefold()
        if said in (letter, word, *(f"{letter}{mark} {word}" for mark in ("", ".", ")", ":"))):
            return index
    return UNREADABLE
