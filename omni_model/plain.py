"""Trees of dataclasses as plain JSON and back, and single fields set by a dotted path. Stdlib only."""

import dataclasses
import difflib
import types
import typing
from typing import Any, TypeVar

from omni_model.config import JSON, BadInput

T = TypeVar("T")


def to_plain(value: Any) -> JSON:
    """A recipe (or any tree of dataclasses, tuples and literals) as plain JSON; anything else is refused."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: to_plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, dict):
        return {str(k): to_plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [to_plain(v) for v in value]
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    raise TypeError(
        f"{type(value).__name__} has no stable JSON form; use numbers, strings, tuples, dataclasses"
    )


def identity(recipe: Any) -> JSON:
    """What enters a key: `to_plain` without unkeyed fields and later ones at their "as before" value."""
    if dataclasses.is_dataclass(recipe) and not isinstance(recipe, type):
        return {
            f.name: identity(getattr(recipe, f.name))
            for f in dataclasses.fields(recipe)
            if f.metadata.get("identity", True)
            and ("as_before" not in f.metadata or getattr(recipe, f.name) != f.metadata["as_before"])
        }
    return to_plain(recipe)


def from_plain(cls: type[T], plain: Any, path: str = "") -> T:
    """Rebuild a dataclass from `to_plain`'s output, converting strings where a field is typed otherwise.

    Raises:
        BadInput: an unknown field (with the nearest name) or a value of the wrong type.
    """
    hints = typing.get_type_hints(cls)
    known = {f.name for f in dataclasses.fields(cls)}  # type: ignore[arg-type]
    for name in plain:
        if name not in known:
            raise BadInput(f"{join(path, name)} is not a field of {cls.__name__}{nearest(name, known)}")
    values = {name: _convert(hints[name], value, join(path, name)) for name, value in plain.items()}
    return cls(**values)


def override(tree: T, path: str, text: str) -> T:
    """A copy of a dataclass tree with the field at the dotted `path` parsed from `text`.

    Raises:
        BadInput: no such field (with the nearest one), a path that stops at a group, or a value that does
            not parse.
    """
    changed: T = _override(tree, path.split("."), text, path)
    return changed


def _override(tree: Any, parts: list[str], text: str, path: str) -> Any:
    names = {f.name for f in dataclasses.fields(tree)}
    head, *rest = parts
    if head not in names:
        raise BadInput(f"{path} is not a field: {type(tree).__name__} has no {head!r}{nearest(head, names)}")
    value = getattr(tree, head)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        if not rest:
            inside = ", ".join(f.name for f in dataclasses.fields(value))
            raise BadInput(f"{path} is a group of fields; set one of: {inside}")
        return dataclasses.replace(tree, **{head: _override(value, rest, text, path)})
    if rest:
        raise BadInput(f"{path} goes too deep: {head} is a single value")
    return dataclasses.replace(tree, **{head: _convert(typing.get_type_hints(type(tree))[head], text, path)})


def _convert(kind: Any, value: Any, path: str) -> Any:
    origin, options = typing.get_origin(kind), typing.get_args(kind)
    if dataclasses.is_dataclass(kind):
        if dataclasses.is_dataclass(value):
            return value
        return from_plain(typing.cast("type[Any]", kind), value, path)
    if origin is tuple:
        parts = [p for p in value.split(",") if p] if isinstance(value, str) else value
        return tuple(_convert(options[0], part, path) for part in parts)
    if origin in (types.UnionType, typing.Union):
        return value if value is None or value == "none" else _convert(options[0], value, path)
    try:
        if kind is bool:
            return {"true": True, "false": False}[str(value).lower()]
        if kind is int and isinstance(value, float):
            raise ValueError
        return kind(value) if kind in (int, float, str) else value
    except (ValueError, TypeError, KeyError):
        raise BadInput(f"{path} wants {kind.__name__}, not {value!r}") from None


def nearest(name: str, known: typing.Iterable[str]) -> str:
    """`; did you mean X?` for the closest known name, else the list of names."""
    names = sorted(known)
    close = difflib.get_close_matches(name, names, n=1)
    return f"; did you mean {close[0]!r}?" if close else f"; choose from {', '.join(names)}"


def join(path: str, name: str) -> str:
    """Dotted path of a field."""
    return f"{path}.{name}" if path else name
