"""Tool use: the engine answers for the calculator while the model speaks.

    sampled  <|python_start|> 12*3 <|python_end|>
    forced                                        <|output_start|> 36 <|output_end|>
    sampled                                                                           and so on

An expression without a value is answered by nothing: the model goes on by itself.
"""

from __future__ import annotations

from collections import deque

from omni_model.serving.calculator import calculate
from omni_model.text.tokenizer import Tokenizer


class ToolUse:
    """What one row has said of an expression, and what is to be put into its mouth next."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        names = ("<|python_start|>", "<|python_end|>", "<|output_start|>", "<|output_end|>")
        self._python_start, self._python_end, self._output_start, self._output_end = map(
            tokenizer.special, names
        )
        self._tokenizer = tokenizer
        self._expression: list[int] | None = None  # None: not inside an expression
        self._forced: deque[int] = deque()

    def next(self, sampled: int) -> tuple[int, bool]:
        """The row's next token, and whether it was forced: `sampled`, unless an answer is being given."""
        forced = bool(self._forced)
        token = self._forced.popleft() if forced else sampled
        if token == self._python_start:
            self._expression = []
        elif token == self._python_end and self._expression is not None:
            self._answer(self._expression)
            self._expression = None
        elif self._expression is not None:
            self._expression.append(token)
        return token, forced

    def _answer(self, expression: list[int]) -> None:
        value = calculate(self._tokenizer.decode(expression))
        if value is not None:
            self._forced += [self._output_start, *self._tokenizer.encode(value), self._output_end]
