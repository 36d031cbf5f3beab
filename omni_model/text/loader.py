"""Rows of packed text for a language model, from a corpus of any size.

Documents are read a row group at a time, tokenised in batches, each beginning with `<|bos|>`, and packed
(`omni_model.text.packing`). That is one stream, the same for every number of ranks: a step takes the next
`rows_per_step` rows, of which each rank has its part. After the last document the corpus begins again.

A *cursor* says where the stream stands: the batch to be read next and the places of the documents that wait
to be packed. Their tokens are made again when the stream goes on from a cursor, bit for bit as it would have.

`PackedRows` does the work, `BackgroundRows` has it done by a process of its own, a few steps ahead. That
process is a fresh interpreter that runs this module. It is told what to do in a line of JSON; for every step
it answers with a line of JSON and the bytes of the rows. When nobody is there to read an answer, it ends.

Legend: R rows of a step that a rank gets, T+1 tokens a row.
"""

import contextlib
import json
import os
import queue
import signal
import subprocess
import sys
import threading
import traceback
from collections.abc import Iterator, Mapping, Sequence
from io import BufferedReader
from itertools import islice
from pathlib import Path
from types import TracebackType
from typing import Any, Self, cast

import numpy as np

from omni_model.artifacts import canonical_json, sha256_file, sha256_text
from omni_model.config import JSON, BadInput
from omni_model.text.corpus import group_sizes, read_group, shard_paths
from omni_model.text.packing import Batch, Packer, Place
from omni_model.text.quick_encoding import quick_encoder
from omni_model.text.tokenizer import TOKENIZER_FILE, load_tokenizer

BATCH_DOCUMENTS = 128  # tokenised, and added to those that wait, at once; a row group ends its last batch
STEPS_AHEAD = 4
# What a cursor belongs to; with anything else it would be another stream.
STREAM = {
    "row_tokens": "rows of another length",
    "corpus": "another corpus",
    "tokenizer": "another tokenizer",
}


class _Documents:
    """The documents of a split as token ids, each with its place."""

    def __init__(self, corpus: Path, split: str, tokenizer: Path, threads: int = 1) -> None:
        self._paths = shard_paths(corpus, split)
        words = load_tokenizer(tokenizer)
        self._bos_id, self._encode = words.bos_id, quick_encoder(tokenizer, words, threads)
        sizes = [group_sizes(path) for path in self._paths]  # now, so that a damaged file is found now
        self._groups = [(file, group) for file, groups in enumerate(sizes) for group in range(len(groups))]
        if not any(map(sum, sizes)):
            raise BadInput(f"{corpus} holds {split} files without a document; write the text corpus again")
        names: list[JSON] = [[path.name, path.stat().st_size] for path in self._paths]
        self.identity = {
            "corpus": sha256_text(canonical_json(names))[:16],
            "tokenizer": sha256_file(tokenizer / TOKENIZER_FILE)[:16],
        }

    def batches(self, start: Place = (0, 0, 0)) -> Iterator[tuple[Place, Batch]]:
        """From `start` to the end of the corpus: each batch, with where the next one begins."""
        for file, group in self._groups:
            if (file, group) < start[:2]:
                continue
            texts = read_group(self._paths[file], group)
            for row in range(start[2] if (file, group) == start[:2] else 0, len(texts), BATCH_DOCUMENTS):
                rows = range(row, min(row + BATCH_DOCUMENTS, len(texts)))
                yield (file, group, rows.stop), self._tokenise(file, group, rows, texts)

    def pick(self, places: Sequence[tuple[int, int, Sequence[int]]]) -> Iterator[Batch]:
        """Some documents again: of each (file, row group), these rows."""
        for file, group, rows in places:
            yield self._tokenise(file, group, rows, read_group(self._paths[file], group))

    def _tokenise(self, file: int, group: int, rows: Sequence[int], texts: Sequence[str]) -> Batch:
        encoded = self._encode([texts[row] for row in rows])
        return [
            (np.array([self._bos_id, *ids], np.int32), (file, group, row))
            for row, ids in zip(rows, encoded, strict=True)
        ]


class PackedRows:
    """The stream of a split, made where it is asked for.

    Args:
        corpus: payload directory of a text corpus.
        tokenizer: payload directory of a tokenizer.
        row_tokens: T+1.
        rows_per_step: of all ranks together.
        part: which of them are wanted here.
        cursor: where to go on; None begins at the first document.
        threads: that tokenise; their number changes no row.

    Raises:
        BadInput: the corpus is damaged or empty, or the cursor is of another stream.
    """

    def __init__(
        self,
        corpus: Path,
        split: str,
        tokenizer: Path,
        *,
        row_tokens: int,
        rows_per_step: int,
        part: slice = slice(None),
        cursor: JSON = None,
        threads: int = 1,
    ) -> None:
        self._documents = _Documents(corpus, split, tokenizer, threads)
        self._stream: dict[str, JSON] = {"row_tokens": row_tokens, **self._documents.identity}
        self._rows_per_step, self._part = rows_per_step, part
        self._packer = Packer(row_tokens)
        self._epoch, self._next = 1, (0, 0, 0)
        if cursor is not None:
            self._go_to(cursor)
        self._rows = self._packer.rows(self._batches())

    def next(self) -> tuple[np.ndarray, JSON]:
        """This part of the next step, (R, T+1) int32, and the cursor after the step, alike on all ranks."""
        rows = list(islice(self._rows, self._rows_per_step))
        return np.stack(rows[self._part]), self._cursor()

    def _batches(self) -> Iterator[Batch]:
        while True:
            for following, batch in self._documents.batches(self._next):
                self._next = following
                yield batch
            self._epoch, self._next = self._epoch + 1, (0, 0, 0)

    def _cursor(self) -> JSON:
        waiting: list[Any] = []
        for place in self._packer.places():
            assert place
            file, group, row = place
            if not waiting or waiting[-1][:2] != [file, group]:
                waiting.append([file, group, []])
            waiting[-1][2].append(row)
        return {**self._stream, "epoch": self._epoch, "next": list(self._next), "waiting": waiting}

    def _go_to(self, cursor: Any) -> None:
        for name, what in STREAM.items():
            if cursor.get(name) != self._stream[name]:
                raise BadInput(
                    f"the checkpoint was reading {what}; give it back what it was reading, "
                    "or delete the checkpoint to begin anew"
                )
        self._epoch, self._next = cursor["epoch"], tuple(cursor["next"])
        for batch in self._documents.pick(cursor["waiting"]):
            for tokens, place in batch:
                self._packer.add(tokens, place)


class BackgroundRows:
    """`PackedRows` in a process of its own, for as long as the `with` block lasts: the same rows."""

    def __init__(
        self,
        corpus: Path,
        split: str,
        tokenizer: Path,
        *,
        row_tokens: int,
        rows_per_step: int,
        part: slice = slice(None),
        cursor: JSON = None,
        threads: int = 1,
    ) -> None:
        self._shape = len(range(rows_per_step)[part]), row_tokens
        self._setup: dict[str, JSON] = {
            "corpus": str(corpus.absolute()),
            "split": split,
            "tokenizer": str(tokenizer.absolute()),
            "row_tokens": row_tokens,
            "rows_per_step": rows_per_step,
            "part": [part.start, part.stop, part.step],
            "cursor": cursor,
            "threads": threads,
        }

    def __enter__(self) -> Self:
        # The tokenizers library reads both when it starts. `env` leaves the rest of the environment alone.
        threads = self._setup["threads"]
        parallel = f"TOKENIZERS_PARALLELISM={'false' if threads == 1 else 'true'}"
        words = ["env", parallel, f"RAYON_NUM_THREADS={threads}", sys.executable, "-m", __name__]
        # Started in the folder that holds the package, so that it is found installed or not.
        home = Path(__file__).resolve().parents[2]
        self._process = subprocess.Popen(words, cwd=home, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        assert self._process.stdin
        with contextlib.suppress(BrokenPipeError):  # where it ended at once, `next` tells why
            self._process.stdin.write(json.dumps(self._setup).encode() + b"\n")
            self._process.stdin.flush()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._process.kill()
        self._process.communicate()

    def next(self) -> tuple[np.ndarray, JSON]:
        """As `PackedRows.next`.

        Raises:
            BadInput: the process refuses the corpus, tokenizer or cursor; the message is its own.
            RuntimeError: it failed or was killed.
        """
        answers = cast(BufferedReader, self._process.stdout)
        line = answers.readline()
        answer = json.loads(line) if line.endswith(b"\n") else {}  # its last line may be cut off
        if "message" in answer:
            raise (BadInput if answer["refused"] else RuntimeError)(answer["message"])
        rows = np.empty(self._shape, np.int32)
        if answers.readinto(rows.data) < rows.nbytes:
            raise RuntimeError(_why_it_ended(self._process.wait()))
        return rows, answer["cursor"]


def _why_it_ended(code: int) -> str:
    if code == -signal.SIGKILL:
        return (
            "the process that reads the text was killed by SIGKILL (out of memory is the usual reason); "
            "run again to continue"
        )
    return f"the process that reads the text ended with code {code}; run again to continue"


def validation_rows(
    corpus: Path, tokenizer: Path, row_tokens: int, num_rows: int, split: str = "validation"
) -> np.ndarray:
    """The first `num_rows` rows (N, T+1) int32 of a split read once; fewer where it holds fewer.

    Raises:
        BadInput: the corpus is damaged, or holds too little for one row.
    """
    batches = (batch for _, batch in _Documents(corpus, split, tokenizer).batches())
    rows = list(islice(Packer(row_tokens).rows(batches), num_rows))
    if not rows:
        raise BadInput(
            f"{corpus} holds less {split} text than one row of {row_tokens} tokens; give it more documents"
        )
    return np.stack(rows)


def _serve() -> None:
    """Be the process behind `BackgroundRows`."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for whoever reads the rows
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # whatever else is printed here is no answer
    setup = json.loads(sys.stdin.readline())
    ready: queue.Queue[tuple[Mapping[str, JSON], bytes]] = queue.Queue(STEPS_AHEAD)
    threading.Thread(target=_produce, args=(setup, ready), daemon=True).start()
    answer: Mapping[str, JSON] = {"cursor": None}
    with contextlib.suppress(BrokenPipeError):  # whoever asked is gone
        while "cursor" in answer:
            answer, rows = ready.get()
            answers.write(json.dumps(answer).encode() + b"\n" + rows)
            answers.flush()
    os._exit(1)  # at once: the other thread may be at work


def _produce(setup: Mapping[str, Any], ready: "queue.Queue[tuple[Mapping[str, JSON], bytes]]") -> None:
    paths = {name: Path(setup[name]) for name in ("corpus", "tokenizer")}
    try:
        stream = PackedRows(**{**setup, **paths, "part": slice(*setup["part"])})
        while True:
            rows, cursor = stream.next()
            ready.put(({"cursor": cursor}, rows.tobytes()))
    except BaseException as error:  # also a panic of a Rust library; whoever waits must hear of it
        if not isinstance(error, BadInput):
            traceback.print_exc()
        message = str(error) or type(error).__name__
        ready.put(({"message": message, "refused": isinstance(error, BadInput)}, b""))


if __name__ == "__main__":
    _serve()
