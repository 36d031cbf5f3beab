"""Conversations as rows to learn from: rendered once, kept on disk, packed whole.

Rendering writes every conversation's ids into one file that is mapped, not read, so that memory does not grow
with the conversations; from their lengths alone follows which of them share a row, so that step s is a pure
function of s. Best fit, as nanochat packs: a row takes the longest of 100 waiting conversations that still
fits; when none fits it is filled with `<|bos|>`, from which nothing is learned.

Every row teaches something. A conversation that is too long is cut to the length of a row, one that then says
nothing of the assistant's is left out, and a row begins with a conversation and holds it whole.

Rows are coded so that one array says what is read and what is learned: a token that is learned is its id, any
other the id's complement ~id, which is negative.

Legend: N conversations, R rows, T+1 tokens a row; inputs are row[:-1] and targets row[1:].
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from omni_model.config import BadInput
from omni_model.text.conversation import render_conversation
from omni_model.text.corpus import group_sizes, read_group
from omni_model.text.tokenizer import Tokenizer, load_tokenizer
from omni_model.workers import Told, Work, serve, spread

CONVERSATIONS_FILE, COLUMN = "conversations.parquet", "messages"
TOKENS_FILE, TABLE_FILE = "tokens.int32", "table.int64"
BUFFER_CONVERSATIONS = 100  # waiting ones to choose from, refilled before every placement
HELD_OUT_SHARE = 0.02


# --- rendering -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Rendered:
    """All conversations: their coded tokens one after the other, in the file's order, and of each (N,) how
    many there are and are `learned`, and a hash of what was said, evenly spread over 0..2^63."""

    tokens: np.ndarray
    lengths: np.ndarray
    learned: np.ndarray
    hashes: np.ndarray

    @classmethod
    def read(cls, place: Path) -> Rendered:
        """What `render_all` wrote."""
        table: np.ndarray = np.fromfile(place / TABLE_FILE, np.int64).reshape(-1, 3)
        tokens: np.ndarray = np.memmap(place / TOKENS_FILE, np.int32, "r")
        return cls(tokens, *table.T)

    def starts(self) -> np.ndarray:
        """Where in `tokens` each begins (N,)."""
        ends: np.ndarray = self.lengths.cumsum()
        return ends - self.lengths

    def divided(self) -> tuple[np.ndarray, np.ndarray]:
        """The numbers of those to learn from, and of those held out: the same words are on one side.

        Raises:
            BadInput: no two different conversations teach anything.
        """
        teaching = np.flatnonzero(self.learned)
        hashes = self.hashes[teaching]
        held_out = hashes < HELD_OUT_SHARE * 2**63
        if len(teaching) and not held_out.any():
            held_out = hashes == hashes.min()
        if held_out.all():
            raise BadInput(
                f"of {len(self.lengths)} conversations too few have an answer within the length of a row; "
                "there must be two different ones, one of them to be held out"
            )
        return teaching[~held_out], teaching[held_out]


def render_all(
    conversations: Path, tokenizer: Path, max_tokens: int, place: Path, num_workers: int, told: Told
) -> Rendered:
    """The conversations of a payload, cut to `max_tokens` each, as files in `place`; finished ones are kept.

    `told` gets the number of conversations whenever some are done.

    Raises:
        BadInput: the file is damaged, or one of its conversations is none.
    """
    sizes = group_sizes(conversations / CONVERSATIONS_FILE)
    groups = range(len(sizes))
    if not sum(sizes):
        raise BadInput(f"{conversations / CONVERSATIONS_FILE} holds no conversation; build it again")
    setup = {"conversations": conversations, "tokenizer": tokenizer, "place": place}
    plain = {name: str(path) for name, path in setup.items()} | {"max_tokens": max_tokens}
    place.mkdir(parents=True, exist_ok=True)
    if not (place / TABLE_FILE).exists():
        jobs = [{"group": group} for group in groups if not _named(place, group, TABLE_FILE).exists()]
        if min(num_workers, len(jobs)) > 1:
            spread(__name__, plain, jobs, min(num_workers, len(jobs)), told)
        else:
            render_group = _renderer(plain)
            for job in jobs:
                render_group(job, told)
        for file in (TOKENS_FILE, TABLE_FILE):  # the latter last: it says that both are whole
            _join(place / file, [_named(place, group, file) for group in groups])
    for leftover in place.glob("group-*"):
        leftover.unlink()
    return Rendered.read(place)


def _named(place: Path, group: int, file: str) -> Path:
    return place / f"group-{group:05d}-{file}"


def _renderer(setup: Mapping[str, Any]) -> Work:
    """A function that renders one row group."""
    source, place = Path(setup["conversations"]) / CONVERSATIONS_FILE, Path(setup["place"])
    tokenizer = load_tokenizer(Path(setup["tokenizer"]))

    def render_group(job: Mapping[str, Any], told: Told) -> None:
        texts = read_group(source, job["group"], COLUMN)
        table = np.zeros((len(texts), 3), dtype=np.int64)

        def rendered() -> Iterator[np.ndarray]:
            for number, text in enumerate(texts):
                coded = _render(tokenizer, text, setup["max_tokens"], f"{source}, row group {job['group']}")
                digest = hashlib.sha256(text.encode()).digest()
                table[number] = len(coded), (coded >= 0).sum(), int.from_bytes(digest[:8], "big") >> 1
                yield coded

        _write(_named(place, job["group"], TOKENS_FILE), rendered())
        _write(_named(place, job["group"], TABLE_FILE), [table])
        told(len(texts))

    return render_group


def _render(tokenizer: Tokenizer, text: str, max_tokens: int, where: str) -> np.ndarray:
    """A conversation's coded tokens; one that cannot be read is named."""
    try:
        ids, mask = render_conversation(tokenizer, json.loads(text), max_tokens)
    except (BadInput, json.JSONDecodeError, AttributeError, TypeError) as error:
        raise BadInput(f"{where} holds {text[:80]!r}, which is no conversation: {error}") from None
    tokens = np.array(ids, dtype=np.int32)
    return np.where(mask, tokens, ~tokens)


def _join(path: Path, parts: Iterable[Path]) -> None:
    """Write the bytes of the files in `parts`, end to end."""
    building = path.with_name(f".{path.name}.building")
    with building.open("wb") as file:
        for part in parts:
            file.write(part.read_bytes())
    os.replace(building, path)


def _write(path: Path, arrays: Iterable[np.ndarray]) -> None:
    building = path.with_name(f".{path.name}.building")
    with building.open("wb") as file:
        for array in arrays:
            file.write(array.tobytes())
    os.replace(building, path)


# --- packing -------------------------------------------------------------------------------------


def reading_order(numbers: np.ndarray, epochs: float, seed: int) -> list[int]:
    """`epochs` times the conversations: first in the order given, then each time in another."""
    count = max(1, round(epochs * len(numbers)))
    orders = [numbers]
    while len(numbers) * len(orders) < count:
        orders.append(np.random.default_rng([seed, len(orders)]).permutation(numbers))
    order: list[int] = np.concatenate(orders)[:count].tolist()
    return order


def pack_whole(order: Iterable[int], lengths: Sequence[int], row_tokens: int) -> list[list[int]]:
    """Which conversations share a row, in which order. None may be longer than `row_tokens`."""
    upcoming = iter(order)
    waiting: list[int] = []
    sizes: list[int] = []  # of those that wait
    rows: list[list[int]] = [[]]
    space = row_tokens
    while True:
        arrived = list(islice(upcoming, BUFFER_CONVERSATIONS - len(waiting)))
        waiting += arrived
        sizes += [lengths[number] for number in arrived]
        longest = max((size for size in sizes if size <= space), default=0)
        if longest:
            place = sizes.index(longest)  # the first of equals
            rows[-1].append(waiting.pop(place))
            space -= sizes.pop(place)
        elif waiting:
            rows.append([])
            space = row_tokens
        else:
            return rows


class ChatRows:
    """Rows (R, T+1) of packed conversations, made when they are asked for."""

    def __init__(self, rendered: Rendered, order: Iterable[int], row_tokens: int, bos_id: int) -> None:
        self._rendered, self._starts = rendered, rendered.starts()
        self._rows = pack_whole(order, rendered.lengths.tolist(), row_tokens)
        self._row_tokens, self._bos_id = row_tokens, bos_id

    def __len__(self) -> int:
        return len(self._rows)

    def num_targets(self, numbers: Iterable[int]) -> int:
        """How many tokens are learned in these rows."""
        return sum(int(self._rendered.learned[self._rows[number]].sum()) for number in numbers)

    def read(self, numbers: Sequence[int]) -> np.ndarray:
        """These rows (B, T+1) int32, coded as in `Rendered`.

        Raises:
            RuntimeError: a row teaches nothing, which would make its loss 0/0.
        """
        rows = np.full((len(numbers), self._row_tokens), ~self._bos_id, dtype=np.int32)
        for row, number in zip(rows, numbers, strict=True):
            said = [self._tokens_of(each) for each in self._rows[number]]
            row[: sum(map(len, said))] = np.concatenate(said)
        if not (rows[:, 1:] >= 0).any(axis=1).all():
            raise RuntimeError("a row of packed conversations teaches nothing, so its loss would be 0/0")
        return rows

    def _tokens_of(self, number: int) -> np.ndarray:
        start = self._starts[number]
        return self._rendered.tokens[start : start + self._rendered.lengths[number]]


if __name__ == "__main__":
    serve(_renderer)
