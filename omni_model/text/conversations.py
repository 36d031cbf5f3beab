"""What a base model is taught to chat with: rows of public sets and words about itself, thoroughly mixed.

`conversations.parquet` has a column `messages`, a conversation as JSON, and `source`, the set that it is
from, in the order of training. The order is a random permutation of all rows, which no memory has to hold: a
set is read once from front to back, each row is put in the file of the stretch where its place is, and the
stretches are put in order one by one.
"""

import itertools
import json
import os
import shutil
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from omni_model.artifacts import PublicSets
from omni_model.config import JSON, BadInput, ConversationsRecipe, Runtime
from omni_model.storage import Workspace
from omni_model.text.chat_formats import choice_messages, gsm8k_messages
from omni_model.text.conversation import SPEAKERS, Message
from omni_model.text.corpus import group_sizes, read_group
from omni_model.text.public_sets import num_rows, read_numbered_rows

CONVERSATIONS_FILE = "conversations.parquet"
MESSAGES, SOURCE = "messages", "source"
GROUP_ROWS = 1024
STRETCH_ROWS = 8 * GROUP_ROWS  # that are put in order in memory
TOLD_EVERY = 2000
IDENTITY = "identity"

# What each number of the recipe is of: the splits that are read, one after the other.
SOURCES = {
    "smoltalk_rows": (("smoltalk", "train"),),
    "mmlu_rows": (("mmlu", "auxiliary_train"),),
    "arc_rows": (("arc-easy", "train"), ("arc-challenge", "train")),
    "gsm8k_rows": (("gsm8k", "train"),),
}


def build_conversations(
    recipe: ConversationsRecipe, sets: PublicSets, *, work: Workspace, runtime: Runtime
) -> dict[str, JSON]:
    """Stage: `conversations.parquet`, as many rows of each set as the recipe says.

    A set with fewer rows is read as often as it takes; of the last time, and of a set with more rows, a
    random part. Rows with nothing to learn (an empty message, no answer at the end) are left out and counted.

    Raises:
        BadInput: no rows at all, a set that is missing, or a row that is no conversation, by file and number.
    """
    total = sum(getattr(recipe, field) for field in SOURCES) + recipe.identity_rows
    if not total:
        raise BadInput("conversations has no rows of any set; raise one of its numbers")
    places = np.random.default_rng([work.seed, 0]).permutation(total)
    stretches = _Stretches(work.partial / "stretches")
    left_out = 0
    for done, (source, messages) in enumerate(_rows(recipe, sets.out, work.seed)):
        if _teaches(messages):
            stretches.put(int(places[done]), source, messages)
        else:
            left_out += 1
        if done % TOLD_EVERY == 0:
            work.metrics.log(done, total)
    counts = stretches.write_ordered(work.out / CONVERSATIONS_FILE)
    work.metrics.log(total, total)
    work.metrics.summary(num_conversations=float(counts.total()), left_out=float(left_out))
    work.metrics.summary(**{f"{source}_rows": float(count) for source, count in sorted(counts.items())})
    return {"num_conversations": counts.total()}


def read_conversations(directory: Path, first: int = 0) -> Iterator[list[Message]]:
    """The conversations of a payload directory in order, from number `first` on, a group in memory at a time.

    Raises:
        BadInput: no such file, or it is damaged.
    """
    path = directory / CONVERSATIONS_FILE
    for group, size in enumerate(group_sizes(path)):
        if first < size:
            yield from (json.loads(each) for each in read_group(path, group, MESSAGES)[first:])
        first = max(0, first - size)


def num_conversations(directory: Path) -> int:
    """How many there are.

    Raises:
        BadInput: no such file, or it is damaged.
    """
    return sum(group_sizes(directory / CONVERSATIONS_FILE))


# --- rows ----------------------------------------------------------------------------------------


def _rows(recipe: ConversationsRecipe, sets: Path, seed: int) -> Iterator[tuple[str, list[Message]]]:
    """Every row that is wanted, as often as it is, set by set: the set's name and the conversation."""
    for number, (field, splits) in enumerate(SOURCES.items(), start=1):
        count: int = getattr(recipe, field)
        if count:
            yield from _chosen(sets, splits, count, np.random.default_rng([seed, number]))
    for index in range(recipe.identity_rows):
        rng = np.random.default_rng([seed, len(SOURCES) + 1, index])
        yield IDENTITY, identity_conversation(rng)


def _chosen(
    sets: Path, splits: Sequence[tuple[str, str]], count: int, rng: np.random.Generator
) -> Iterator[tuple[str, list[Message]]]:
    available = sum(num_rows(sets, name, split) for name, split in splits)
    whole, rest = divmod(count, available)
    times = np.full(available, whole)
    times[rng.permutation(available)[:rest]] += 1
    upcoming = iter(times)
    for name, split in splits:
        for where, row in read_numbered_rows(sets, name, split):
            for _ in range(next(upcoming)):
                yield name, _conversation(name, row, where)


def _conversation(name: str, row: Mapping[str, Any], where: str) -> list[Message]:
    try:
        if name == "smoltalk":
            messages = row["messages"]
        else:
            messages = gsm8k_messages(row) if name == "gsm8k" else choice_messages(name, row)
    except BadInput as error:
        raise BadInput(f"{where} cannot be taught: {error}") from None
    turns = messages[1:] if messages and messages[0]["role"] == "system" else messages
    wrong = [i for i, each in enumerate(turns) if each["role"] != SPEAKERS[i % 2]]
    if wrong or not turns:
        raise BadInput(
            f"{where} is no conversation: user and assistant do not take turns, the user first; "
            "mend it or leave it out"
        )
    return list(messages)


def _teaches(messages: Sequence[Message]) -> bool:
    """Whether somebody answers, and nobody says nothing."""
    said = [each["content"] for each in messages]
    return messages[-1]["role"] == "assistant" and all(
        content.strip() if isinstance(content, str) else content for content in said
    )


def identity_conversation(rng: np.random.Generator) -> list[Message]:
    """One or two questions about who the model is, from `identity.json`, with one of their answers each."""
    plain = json.loads(Path(__file__).with_name("identity.json").read_text(encoding="utf-8"))
    topics = plain["topics"]
    messages: list[Message] = []
    for topic in rng.permutation(len(topics))[: rng.integers(1, 3)]:
        question, answer = (str(rng.choice(topics[topic][which])) for which in ("questions", "answers"))
        messages += [
            {"role": "user", "content": question},
            {"role": "assistant", "content": answer.format(name=plain["name"])},
        ]
    return messages


# --- order ---------------------------------------------------------------------------------------


class _Stretches:
    """Conversations on their way to their places, in a file for every STRETCH_ROWS places."""

    def __init__(self, directory: Path) -> None:
        shutil.rmtree(directory, ignore_errors=True)  # of an attempt that was killed
        directory.mkdir(parents=True)
        self._directory = directory
        self._waiting: dict[int, list[bytes]] = {}
        self._num_waiting = 0

    def put(self, place: int, source: str, messages: Sequence[Message]) -> None:
        text = json.dumps(messages, sort_keys=True, ensure_ascii=False, separators=(",", ":"))
        line = f"{place}\t{source}\t{text}\n".encode()  # JSON has no line feed and no tab in it
        self._waiting.setdefault(place // STRETCH_ROWS, []).append(line)
        self._num_waiting += 1
        if self._num_waiting == STRETCH_ROWS:
            self._put_away()

    def _put_away(self) -> None:
        for stretch, lines in self._waiting.items():
            with (self._directory / f"{stretch:06d}").open("ab") as file:
                file.writelines(lines)
        self._waiting, self._num_waiting = {}, 0

    def _ordered(self) -> Iterator[tuple[str, str]]:
        """Source and text of every conversation, in the order of their places."""
        self._put_away()
        for path in sorted(self._directory.iterdir()):
            with path.open("rb") as file:
                rows = [line.decode().rstrip("\n").split("\t", 2) for line in file]
            path.unlink()
            for _, source, text in sorted(rows, key=lambda row: int(row[0])):
                yield source, text

    def write_ordered(self, path: Path) -> Counter[str]:
        """Write all of them as parquet, whole or not at all; returns how many of each source there are."""
        import pyarrow
        import pyarrow.parquet

        schema = pyarrow.schema({MESSAGES: pyarrow.string(), SOURCE: pyarrow.string()})
        building = path.with_name(f".{path.name}.building")
        counts: Counter[str] = Counter()
        rows = self._ordered()
        with pyarrow.parquet.ParquetWriter(building, schema, compression="zstd") as file:
            while group := list(itertools.islice(rows, GROUP_ROWS)):
                sources, texts = zip(*group, strict=True)
                file.write_table(pyarrow.table([texts, sources], schema=schema))
                counts.update(sources)
        os.replace(building, path)
        self._directory.rmdir()
        return counts
