"""The mix that teaches a listener: so many rows of each kind, written once, read by every stage that teaches.

`instructions.parquet` holds conversations with parts to be heard, by clip key; the clips themselves stay in
the features. Which row comes where follows from the seed and the row's number alone.
"""

import itertools
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from omni_model.artifacts import AudioCorpus, Conversations, Instructions
from omni_model.audio.corpora import read_clips
from omni_model.config import JSON, BadInput, InstructionsRecipe, Runtime
from omni_model.storage import Workspace
from omni_model.text.conversation import Message
from omni_model.text.conversations import read_conversations
from omni_model.training.asking import KINDS, Asker, Clip

FILE = "instructions.parquet"
COLUMNS = ("kind", "split", "messages")
SPLITS = ("train", "validation")  # the test split belongs to the benchmark
GROUP_ROWS = 5_000
REPLAY = "replay"
MAX_REPLAYED_CHARS = 2_000  # about as long as the rows with sound, with which they share a batch


@dataclass(frozen=True)
class Instruction:
    """A row: its kind and its conversation."""

    kind: str
    messages: list[Message]

    @property
    def clips(self) -> list[str]:
        """Keys of the clips that are heard, in order."""
        return [
            part["clip"]
            for message in self.messages
            if isinstance(message["content"], list) and message["role"] == "user"
            for part in message["content"]
            if part["type"] == "audio"
        ]


def build_instructions(
    recipe: InstructionsRecipe, *corpora: AudioCorpus, work: Workspace, runtime: Runtime
) -> dict[str, JSON]:
    """Stage: rows about the train and validation clips; replayed text is about sentences of the grammar.

    Raises:
        BadInput: a kind that is wanted has no clip to ask about.
    """
    return _build(recipe, corpora, None, work)


def mix_instructions(
    recipe: InstructionsRecipe,
    conversations: Conversations,
    *corpora: AudioCorpus,
    work: Workspace,
    runtime: Runtime,
) -> dict[str, JSON]:
    """Stage: the same, with conversations of the chat tuning as replayed text.

    Raises:
        BadInput: a kind that is wanted has no clip to ask about, or there is no conversation.
    """
    return _build(recipe, corpora, conversations, work)


def _build(
    recipe: InstructionsRecipe,
    corpora: Sequence[AudioCorpus],
    conversations: Conversations | None,
    work: Workspace,
) -> dict[str, JSON]:
    clips = [clip for corpus in corpora for clip in read_clips(corpus)]
    counts = {split: shares(recipe, split) for split in SPLITS}
    total = sum(sum(each.values()) for each in counts.values())
    rows: list[tuple[str, str, str]] = []
    for number, split in enumerate(SPLITS):
        asker = Asker.of([clip for clip in clips if clip["split"] == split], recipe.question_first)
        rng = np.random.default_rng([work.seed, number])
        kinds = [kind for kind, count in counts[split].items() for _ in range(count)]
        upcoming = {
            kind: _conversations(asker, kind, split, conversations, [work.seed, number, place])
            for place, (kind, count) in enumerate(counts[split].items())
            if count
        }
        for index in rng.permutation(len(kinds)):
            messages = json.dumps(next(upcoming[kinds[index]]), sort_keys=True, separators=(",", ":"))
            rows.append((kinds[index], split, messages))
            if len(rows) % GROUP_ROWS == 0:
                work.metrics.log(len(rows), total)
    _write(work.out / FILE, rows)
    work.metrics.log(total, total)
    told = {kind: float(count) for kind, count in counts["train"].items() if count}
    work.metrics.summary(num_rows=float(total), **{f"rows_{kind}": count for kind, count in told.items()})
    heard = {clip["key"] for clip in clips if clip["split"] in SPLITS}
    return {"num_rows": total, "num_clips": len(heard)}


def shares(recipe: InstructionsRecipe, split: str) -> dict[str, int]:
    """How many rows of each kind: in proportion to the recipe's parts, in all exactly what is wanted."""
    wanted = recipe.rows if split == "train" else recipe.validation_rows
    parts = np.array([getattr(recipe, kind) for kind in KINDS])
    exact = wanted * parts / parts.sum()
    counts = np.floor(exact).astype(int)
    largest = np.argsort(counts - exact, kind="stable")  # the largest remainders first
    counts[largest[: wanted - counts.sum()]] += 1
    return {kind: int(count) for kind, count in zip(KINDS, counts, strict=True)}


def _conversations(
    asker: Asker, kind: str, split: str, conversations: Conversations | None, seed: Sequence[int]
) -> Iterator[list[Message]]:
    """An endless stream of rows of one kind; each pool of clips is gone through in shuffled passes."""
    if kind == REPLAY and conversations is not None:
        yield from _said_before(conversations, split)
    pools = asker.pools(kind)
    if KINDS[kind].fits is not None and not pools:
        raise BadInput(
            f"no clip of the {split} split can be asked for a row of kind {kind}; set instructions.{kind} "
            "to 0, or give corpora that have what it needs"
        )
    upcoming = [_passes(pool, [*seed, place]) for place, pool in enumerate(pools)]
    for number in itertools.count():
        clip = next(upcoming[number % len(upcoming)]) if upcoming else None
        yield asker.row(kind, clip, np.random.default_rng([*seed, number, 1]))


def _passes(pool: Sequence[Clip], seed: Sequence[int]) -> Iterator[Clip]:
    for epoch in itertools.count():
        for place in np.random.default_rng([*seed, epoch, 0]).permutation(len(pool)):
            yield pool[place]


def _said_before(conversations: Conversations, split: str) -> Iterator[list[Message]]:
    """Short conversations, over and over: every twentieth of all for validation, the others for training."""
    while True:
        found = False
        for number, messages in enumerate(read_conversations(conversations.out)):
            chars = len(json.dumps(messages, ensure_ascii=False))
            if (number % 20 == 0) == (split == "validation") and chars <= MAX_REPLAYED_CHARS:
                found = True
                yield messages
        if not found:
            raise BadInput(
                f"{conversations.uri} holds too few conversations to replay; set instructions.replay to 0"
            )


def _write(path: Path, rows: Sequence[tuple[str, str, str]]) -> None:
    import pyarrow
    import pyarrow.parquet

    table = pyarrow.table(dict(zip(COLUMNS, map(list, zip(*rows, strict=True)), strict=True)))
    pyarrow.parquet.write_table(table, path, compression="zstd", row_group_size=GROUP_ROWS)


def read_instructions(instructions: Instructions, split: str) -> list[Instruction]:
    """The rows of one split, in order.

    Raises:
        BadInput: the file is missing or damaged.
    """
    import pyarrow
    import pyarrow.parquet

    path = instructions.out / FILE
    try:
        table = pyarrow.parquet.read_table(path, columns=list(COLUMNS))
    except (FileNotFoundError, pyarrow.ArrowInvalid) as error:
        raise BadInput(f"{path} is missing or damaged ({error}); delete its artifact and run again") from None
    columns: list[list[Any]] = [table.column(name).to_pylist() for name in COLUMNS]
    return [
        Instruction(kind, json.loads(messages))
        for kind, own, messages in zip(*columns, strict=True)
        if own == split
    ]
