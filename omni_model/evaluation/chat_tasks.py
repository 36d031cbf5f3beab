"""What a chat model can do, asked as it was taught: letters, sums and programs.

Three kinds of task. A *choice* (ARC, MMLU) is answered by the likeliest of its letters as the first token of
the answer, so nothing has to be parsed and no reply can miss the form. A *sum* (GSM8K) is written out, with
the calculator at hand, and the number behind `####` counts. A *program* (HumanEval) is written and run
against its test in a sandbox. Every answer is greedy: the same model always says the same.

Legend: B rows, T tokens, V vocabulary.
"""

import random
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from decimal import Decimal, InvalidOperation
from pathlib import Path

import torch

from omni_model.config import BadInput
from omni_model.evaluation.sandbox import run_program
from omni_model.model.gpt import GPT
from omni_model.serving.engine import Engine
from omni_model.serving.sampling import Sampling
from omni_model.serving.segments import Text, padded
from omni_model.text.chat_formats import ChoiceQuestion, choice_row, gsm8k_answer, multiple_choice
from omni_model.text.conversation import render_prompt
from omni_model.text.public_sets import Row, read_rows, splits_of
from omni_model.text.tokenizer import Tokenizer

CHOICE, SUM, PROGRAM = "choice", "sum", "program"
TASKS = {"arc-easy": CHOICE, "arc-challenge": CHOICE, "mmlu": CHOICE, "gsm8k": SUM, "humaneval": PROGRAM}
SPLIT = "test"
ORDER_SEED = 1337  # of the items, before they are cut to as many as wanted

# At once: positions read to choose a letter; rows that write, and bytes of their keys and values.
MAX_POSITIONS, MAX_WRITERS, MAX_CACHE_BYTES = 2**14, 64, 2**31
OPENING = 2  # <|bos|><|user_start|>: stays where the beginning of a question is cut off

FENCE = re.compile(r"```[^\n`]*\n(.*?)(?:```|\Z)", re.DOTALL)
SOLUTION = "__solution__"  # what the function is called in the test, whatever builtin has its name

Progress = Callable[[float], None]


@dataclass(frozen=True)
class Answer:
    """One item: its row in the set, what was asked, what would be right, what was said, and the verdict.

    `chance` is the share that guessing gets right.
    """

    index: int
    question: str
    expected: str
    said: str
    right: bool
    chance: float


def tasks_of(sets: Path) -> list[str]:
    """The tasks whose sets a payload directory has, in the order of TASKS."""
    return [name for name in TASKS if SPLIT in splits_of(sets, name)]


def in_order(sets: Path, name: str, count: int) -> list[tuple[int, Row]]:
    """The first `count` rows (0: all) of a set, with their numbers, in an order that is always the same.

    Raises:
        BadInput: a file is damaged or lacks a column, or a row is not what its set promises.
    """
    rows = list(enumerate(read_rows(sets, name, SPLIT)))
    random.Random(ORDER_SEED).shuffle(rows)
    return rows[:count] if count else rows


class Examinee:
    """A chat model that answers questions, each one the first of a conversation.

    `num_shortened` questions were longer than the model can read, and lost their beginning.

    Raises:
        BadInput: the answers would leave no room for a question.
    """

    def __init__(self, gpt: GPT, tokenizer: Tokenizer, max_answer_tokens: int) -> None:
        self.num_shortened = 0
        self._gpt, self._tokenizer, self._most = gpt, tokenizer, max_answer_tokens
        self._engine = Engine(gpt, tokenizer)
        self._positions = len(gpt.cos)
        if max_answer_tokens >= self._positions - OPENING:
            raise BadInput(
                f"chat_evaluation.max_answer_tokens {max_answer_tokens} leaves no room for a question in the "
                f"{self._positions} positions of the GPT; lower it"
            )

    @torch.inference_mode()
    def choose(self, asked: Sequence[ChoiceQuestion], progress: Progress = lambda _: None) -> list[str]:
        """The likeliest letter of each question as the first token of its answer; of equals the first."""
        ids = {letter: self._letter_id(letter) for one in asked for letter in one.letters}
        prompts = [
            self._prompt(multiple_choice(one.question, one.letters, one.choices), self._positions)
            for one in asked
        ]
        chosen = [""] * len(asked)
        for rows in _batches(prompts, lambda longest: MAX_POSITIONS // longest, progress):
            tokens, lengths = padded([torch.tensor(prompts[row]) for row in rows])
            logits = self._gpt(tokens.to(self._gpt.cos.device), text_lengths=lengths, logits="last")[
                :, 0
            ].cpu()  # (B, V)
            for row, told in zip(rows, logits, strict=True):
                letters = asked[row].letters
                chosen[row] = letters[int(told[[ids[letter] for letter in letters]].argmax())]
        return chosen

    def write(self, questions: Sequence[str], progress: Progress = lambda _: None) -> list[str]:
        """What the model replies to each question, calculator included, special tokens by their names."""
        prompts = [self._prompt(question, self._positions - self._most) for question in questions]
        config = self._gpt.config
        bytes_per_position = (
            2 * config.n_layer * config.n_kv_head * config.head_dim * self._gpt.cos.element_size()
        )

        def writers(longest: int) -> int:
            return min(MAX_WRITERS, MAX_CACHE_BYTES // ((longest + self._most) * bytes_per_position))

        said = [""] * len(questions)
        for rows in _batches(prompts, writers, progress):
            replies = self._engine.generate(
                [[Text(prompts[row])] for row in rows],
                sampling=Sampling(temperature=0),
                max_tokens=self._most,
            )
            for row, reply in zip(rows, replies, strict=True):
                said[row] = reply.text
        return said

    def _letter_id(self, letter: str) -> int:
        ids = self._tokenizer.encode(letter)
        if len(ids) != 1:
            raise BadInput(
                f"the tokenizer cuts the letter {letter} into {len(ids)} tokens, so no token is the answer "
                f"{letter}; train another tokenizer"
            )
        return ids[0]

    def _prompt(self, question: str, room: int) -> list[int]:
        ids = render_prompt(self._tokenizer, question)
        if len(ids) <= room:
            return ids
        self.num_shortened += 1
        return [*ids[:OPENING], *ids[len(ids) - room + OPENING :]]


def _batches(
    prompts: Sequence[Sequence[int]], rows_at_once: Callable[[int], int], progress: Progress
) -> Iterator[list[int]]:
    """Numbers of prompts of similar length, the longest first: what does not fit a memory fails at once."""
    order = sorted(range(len(prompts)), key=lambda number: (-len(prompts[number]), number))
    first = 0
    while first < len(order):
        end = first + max(1, rows_at_once(len(prompts[order[first]])))
        yield order[first:end]
        first = end
        progress(min(first, len(order)) / len(order))


# -- what is right ------------------------------------------------------------------------------------------


def examine(
    examinee: Examinee, name: str, items: Sequence[tuple[int, Row]], progress: Progress
) -> list[Answer]:
    """Put the items of a task.

    Raises:
        BadInput: an item has no right answer, or programs cannot be run here.
    """
    return {CHOICE: _choices, SUM: _sums, PROGRAM: _programs}[TASKS[name]](examinee, name, items, progress)


def _choices(
    examinee: Examinee, name: str, items: Sequence[tuple[int, Row]], progress: Progress
) -> list[Answer]:
    asked = [choice_row(name, row) for _, row in items]
    letters = examinee.choose(asked, progress)
    return [
        Answer(
            index,
            multiple_choice(one.question, one.letters, one.choices),
            one.answer,
            letter,
            letter == one.answer,
            1 / len(one.letters),
        )
        for (index, _), one, letter in zip(items, asked, letters, strict=True)
    ]


def _sums(
    examinee: Examinee, name: str, items: Sequence[tuple[int, Row]], progress: Progress
) -> list[Answer]:
    expected = []
    for index, row in items:
        number = gsm8k_answer(row["answer"])
        if number is None:
            raise BadInput(
                f"{name}, {SPLIT} row {index}: its answer has no number behind ####; mend or remove it"
            )
        expected.append(number)
    questions = [row["question"] for _, row in items]
    said = examinee.write(questions, progress)
    return [
        Answer(index, question, number, text, same_number(gsm8k_answer(text), number), 0.0)
        for (index, _), question, number, text in zip(items, questions, expected, said, strict=True)
    ]


def same_number(said: str | None, expected: str) -> bool:
    """Whether two numerals are of one value: 18 and 18.0 are, and what is no numeral is not."""
    try:
        return said is not None and Decimal(said) == Decimal(expected)
    except InvalidOperation:
        return False


def _programs(
    examinee: Examinee, name: str, items: Sequence[tuple[int, Row]], progress: Progress
) -> list[Answer]:
    said = examinee.write([row["prompt"] for _, row in items], lambda share: progress(share / 2))
    answers = []
    for number, ((index, row), text) in enumerate(zip(items, said, strict=True)):
        right = passes(row, text)
        answers.append(Answer(index, row["prompt"], row["canonical_solution"], text, right, 0.0))
        progress((1 + (number + 1) / len(items)) / 2)
    return answers


def passes(row: Row, said: str) -> bool:
    """Whether the program in a reply passes the test of a row of HumanEval.

    Raises:
        BadInput: no program can be run on this machine.
    """
    name = row["entry_point"]
    program = f"{program_of(row['prompt'], said, name)}\n{SOLUTION} = {name}\n"
    try:
        return run_program(program, f"{row['test']}\ncheck({SOLUTION})\n").passed
    except RuntimeError as error:
        raise BadInput(f"{error}; leave humaneval out of sets.names to do without programs") from None


def program_of(prompt: str, said: str, entry_point: str) -> str:
    """The whole program of a reply: its first fenced block, or all of it where there is none.

    With a function `entry_point` of its own it stands behind what the prompt has in front of that function
    (imports, helpers); without, it goes on where the prompt ends.
    """
    fenced = FENCE.search(said)
    code = fenced[1] if fenced else said
    head = re.compile(rf"^def {re.escape(entry_point)}\b", re.MULTILINE)
    if not head.search(code):
        return prompt + code
    stub = head.search(prompt)
    return f"{prompt[: stub.start()] if stub else ''}\n{code}"
