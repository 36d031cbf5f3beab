"""What a recipe is: literals that bear identity, checked when they are made. Standard library only."""

import math
from dataclasses import field
from typing import Any, ClassVar

JSON = None | bool | int | float | str | list["JSON"] | dict[str, "JSON"]


class BadInput(ValueError):
    """Something a person gave is wrong. The message is one sentence that names it and says what to do."""


def added(default: Any, *, as_before: Any) -> Any:
    """A recipe field that came later; the key leaves it out while it equals `as_before`."""
    return field(default=default, metadata={"as_before": as_before})


def unkeyed(default: Any) -> Any:
    """A recipe field that is no part of the key."""
    return field(default=default, metadata={"identity": False})


class Recipe:
    """Literals that bear identity. Numbers are positive, and zero only where a recipe says it may be."""

    may_be_zero: ClassVar[tuple[str, ...]] = ("seed", "warmup_steps")
    choices: ClassVar[dict[str, tuple[str, ...]]] = {}
    told_by: ClassVar[str] = ""  # the field by which uses of one stage are told apart in a plan

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            where = f"{type(self).__name__}.{name}"
            if isinstance(value, (int, float)) and not isinstance(value, bool):
                least = "zero or more" if name in self.may_be_zero else "more than zero"
                if not (0 <= value < math.inf) or (value == 0 and name not in self.may_be_zero):
                    raise BadInput(f"{where} must be {least}, not {value}")
            if name in self.choices and value not in self.choices[name]:
                raise BadInput(f"{where} must be one of {', '.join(self.choices[name])}, not {value!r}")
