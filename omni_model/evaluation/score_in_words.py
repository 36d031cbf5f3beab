"""What `omni score` prints: a line for one recording, a table and what it comes to for a folder."""

import json
from collections.abc import Mapping
from typing import Any


def in_words(told: Mapping[str, Any]) -> str:
    """What `score` found, for a terminal."""
    if "files" not in told:
        lines = [f"{_plain(told['answer'])}"]
        lines += [f"  {100 * p:5.1f} %  {_plain(option)}" for option, p in told["probabilities"].items()]
        lines += [_distance(told["distance"]), *(told[name] for name in ("why", "cut") if told.get(name))]
        return "\n".join(lines)
    rows = [
        "  ".join(
            (
                f"{_number(each['distance']):>8}",
                "sure    " if each["sure"] else "not sure",
                _plain(f"{each['file']}: {each['answer']}" if "answer" in each else each["file"]),
                *((f"({each['why'].removeprefix('not sure: ')})",) if each["why"] else ()),
            )
        )
        for each in told["files"]
    ]
    rows += [f"{'':8}  not read  {_plain(each['why'])}" for each in told["refused"]]
    for name, share in told.get("categories", {}).items():
        low, high = (100 * end for end in share["ci95"])
        rows.append(
            f"{name}: {100 * share['accuracy']:.0f} % right of {share['questions']} "
            f"(95 %: {low:.0f} to {high:.0f}; guessing gives {100 * share['chance']:.0f})"
        )
    total = told["summary"]
    where = (
        f"the median lies at {total['median_distance']:.2f} of the limit, {total['too_far']} beyond it"
        if total["median_distance"] is not None
        else "nothing tells how far they lie from what was trained"
    )
    return "\n".join(
        [f"{'distance':>8}", *rows, f"{total['files']} recordings, sure about {total['sure']}: {where}"]
    )


def _number(distance: float | None) -> str:
    return "-" if distance is None else f"{distance:.2f}"


def _distance(distance: float | None) -> str:
    if distance is None:
        return "nothing tells how far this lies from what was trained"
    return f"distance from what was trained: {distance:.2f} (1 is the limit)"


def _plain(text: str) -> str:
    """A model's words or a file's name without what would confuse a terminal."""
    return "".join(letter if letter.isprintable() else "?" for letter in text)


def as_json(told: Mapping[str, Any]) -> str:
    """What `score` found as JSON."""
    return json.dumps(told, indent=1, allow_nan=False)
