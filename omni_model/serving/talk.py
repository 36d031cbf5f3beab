"""A talk with a model: a conversation that keeps to the length of its training, and its answers as text.

Questions go in as text and tokens come out, one by one; `spoken` makes text of them as they come.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator

from omni_model.config import BadInput
from omni_model.serving.conversation import Bookmark, Conversation
from omni_model.serving.engine import Engine
from omni_model.serving.sampling import Sampling
from omni_model.serving.segments import Text
from omni_model.text.conversation import render_prompt
from omni_model.text.tokenizer import SPECIAL_TOKENS, Tokenizer

MAX_ANSWER_TOKENS = 512
BROKEN = "\ufffd"  # stands for bytes that are no character, or not yet
MARKS = {"<|python_start|>": "[", "<|output_start|>": " = ", "<|output_end|>": "]"}


class Talk:
    """A conversation within the length that its model was trained on; it can be taken back, turn by turn.

    `num_tokens` and `stopped` are of the last answer: its length, and whether the model itself ended it.
    """

    def __init__(self, engine: Engine, sampling: Sampling) -> None:
        self.engine, self.sampling, self.tokenizer = engine, sampling, engine.tokenizer
        self.capacity = engine.gpt.config.sequence_len
        self.reserve = min(MAX_ANSWER_TOKENS, self.capacity // 4)  # what an answer may count on
        self.num_tokens, self.stopped, self._num_asked = 0, False, 0
        self.begin()

    def begin(self) -> None:
        """Forget everything that was said."""
        self._conversation = Conversation(self.engine, self.capacity)
        self._used = 0
        self._past: list[tuple[Bookmark, int]] = []

    def go_back(self) -> bool:
        """Take back the last question and its answer; False where there is none."""
        if not self._past:
            return False
        place, self._used = self._past.pop()
        self._conversation.go_back(place)
        return True

    def is_full(self, question: str) -> bool:
        """Whether the question has to begin a new conversation."""
        return self._used > 0 and self._room(self._turn(question)) < self.reserve

    def ask(self, question: str) -> Iterator[int]:
        """The tokens of the answer, as they come.

        Raises:
            BadInput: the question leaves no room for an answer; `is_full` says whether a new talk would help.
        """
        turn = self._turn(question)
        room = self._room(turn)
        if room < self.reserve:
            most = max(0, self.capacity - self._used - self.reserve)
            raise BadInput(
                f"that is {len(turn)} tokens long, and {most} are the most that can be read here; shorten it"
            )
        self._past.append((self._conversation.bookmark(), self._used))
        # Another seed each time, so that what is asked again may be answered differently.
        sampling = dataclasses.replace(self.sampling, seed=self.sampling.seed + self._num_asked)
        steps = self._conversation.ask([Text(turn)], sampling, max_tokens=min(room, MAX_ANSWER_TOKENS))
        self._num_asked, self._used = self._num_asked + 1, self._used + len(turn) + 1
        self.num_tokens, self.stopped = 0, False
        for step in steps:
            (token,) = step.tokens
            self.stopped = token in self.engine.stop
            if token is not None and not self.stopped:
                self.num_tokens, self._used = self.num_tokens + 1, self._used + 1
                yield token

    def _turn(self, question: str) -> list[int]:
        ids = render_prompt(self.tokenizer, question)
        return ids[1:] if self._used else ids  # <|bos|> begins the conversation and no other turn

    def _room(self, turn: list[int]) -> int:
        return self.capacity - self._used - len(turn)


def spoken(tokens: Iterable[int], tokenizer: Tokenizer) -> Iterator[tuple[str, bool]]:
    """What tokens say, as they come, and whether it belongs to a tool call: [sum = value].

    A character whose bytes have not all come yet is held back.
    """
    special = {tokenizer.special(name): name for name in SPECIAL_TOKENS}
    ids: list[int] = []  # since the last special token
    told, in_tool, calculated = 0, False, False
    for token in tokens:
        name = special.get(token)
        if calculated and name != "<|output_start|>":  # the sum has no value
            yield "]", True
            in_tool = False
        calculated = in_tool and name == "<|python_end|>"
        if name is None:
            ids.append(token)
            text = tokenizer.decode(ids).rstrip(BROKEN)
            yield text[told:], in_tool
            told = max(told, len(text))
            continue
        yield tokenizer.decode(ids)[told:], in_tool
        ids, told = [], 0
        if name in MARKS:
            yield MARKS[name], True
            in_tool = name != "<|output_end|>"
    yield tokenizer.decode(ids)[told:], in_tool
    if in_tool:
        yield "]", True
