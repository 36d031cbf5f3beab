"""The calculator a model may call between <|python_start|> and <|python_end|>.

It understands what nanochat's models were taught to write: arithmetic such as `1,200 * (3 + 4.5)`, and the
count of a string in a string, `"strawberry".count("r")`. What a model writes is never run as a program: an
expression is parsed, and its tree is walked over a handful of allowed operations. Everything else has no
value, and neither has what is too long, too deep or too large to be an honest sum.
"""

from __future__ import annotations

import ast
import operator
import re
from collections.abc import Callable

MAX_LENGTH = 256  # characters
MAX_DEPTH = 64  # operations inside operations
MAX_MAGNITUDE = 10**100

_OPERATIONS: dict[type[ast.AST], Callable[..., int | float]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv,
    ast.UAdd: operator.pos,
    ast.USub: operator.neg,
}
_ARITHMETIC = re.compile(r"[0-9*+\-/.() ]+")
_STRING = r"""("[^"\\\n]*"|'[^'\\\n]*')"""
_COUNT = re.compile(rf" *{_STRING} *\.count\( *{_STRING} *\) *")


def calculate(expression: str) -> str | None:
    """The value of an expression, spelled as Python spells it ("7", "0.5"); None when it has none.

    Commas inside arithmetic are thousands separators. `/` always gives a decimal number, `//` a whole one.
    """
    if len(expression) > MAX_LENGTH:
        return None
    if count := _COUNT.fullmatch(expression):
        text, part = (quoted[1:-1] for quoted in count.groups())
        return str(text.count(part))
    arithmetic = expression.replace(",", "").strip(" ")
    if not _ARITHMETIC.fullmatch(arithmetic):
        return None
    try:
        return str(_value(ast.parse(arithmetic, mode="eval").body, MAX_DEPTH))
    except (ArithmeticError, ValueError, SyntaxError, RecursionError, MemoryError):
        return None


def _value(node: ast.AST, depth: int) -> int | float:
    """The number that a tree of at most `depth` levels stands for; ValueError when it stands for none."""
    if depth == 0:
        raise ValueError("nested too deeply")
    match node:
        case ast.Constant(value=int() | float() as number):
            value = number
        case ast.UnaryOp(op=op, operand=operand) if type(op) in _OPERATIONS:
            value = _OPERATIONS[type(op)](_value(operand, depth - 1))
        case ast.BinOp(left=left, op=op, right=right) if type(op) in _OPERATIONS:
            value = _OPERATIONS[type(op)](_value(left, depth - 1), _value(right, depth - 1))
        case _:
            raise ValueError(f"{type(node).__name__} is not arithmetic")
    if abs(value) > MAX_MAGNITUDE:
        raise ValueError("too large")
    return value
