"""One contender of `python -m tests.bench text --only loader`, in a process of its own.

    python -m tests.bench.text_worker '{"side": "background", "corpus": "...", ...}'

It prepares and greets with the sha256 of the rows it would begin with, where it makes rows. Then every line
of standard input is a repetition, answered with the tokens it made and how long it took.
"""

import hashlib
import itertools
import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from omni_model.text.corpus import read_texts
from omni_model.text.loader import BATCH_DOCUMENTS, STEPS_AHEAD, BackgroundRows, PackedRows
from omni_model.text.packing import Batch, Packer
from omni_model.text.quick_encoding import quick_encoder
from omni_model.text.tokenizer import Tokenizer, load_tokenizer

CHECKED_STEPS = 3


@dataclass(frozen=True)
class Job:
    """What one contender does; T tokens a row, `steps` steps a repetition."""

    side: str
    corpus: str
    tokenizer: str
    tokens: int
    rows: int
    steps: int
    threads: int = 1

    def shape(self) -> dict[str, Any]:
        """The loaders' arguments."""
        where = {"corpus": Path(self.corpus), "split": "train", "tokenizer": Path(self.tokenizer)}
        return where | {"row_tokens": self.tokens + 1, "rows_per_step": self.rows, "threads": self.threads}


Step = Callable[[], np.ndarray]  # the rows (B, T+1) of the next one


def rows(job: Job) -> Step:
    """Reading, tokenising and packing, here."""
    stream = PackedRows(**job.shape())
    return lambda: stream.next()[0]


def background(job: Job) -> Step:
    """The same in its own process."""
    stream = BackgroundRows(**job.shape()).__enter__()  # it ends with this process
    return lambda: stream.next()[0]


def packing(job: Job) -> Step:
    """Rows of documents that are tokens already."""
    words = load_tokenizer(Path(job.tokenizer))
    encoded = quick_encoder(Path(job.tokenizer), words, 1)(_texts(job))
    documents = [np.array([words.bos_id, *ids], np.int32) for ids in encoded]
    endless = itertools.cycle(documents)
    batches: Iterator[Batch] = (
        [(next(endless), None) for _ in range(BATCH_DOCUMENTS)] for _ in itertools.count()
    )
    made = Packer(job.tokens + 1).rows(batches)
    return lambda: np.stack(list(itertools.islice(made, job.rows)))


def nanochat(job: Job) -> Step:
    """Upstream's loader on the same files, with a tokenizer object that calls tiktoken as upstream's does."""
    from nanochat import dataloader  # type: ignore[import-not-found]

    words = load_tokenizer(Path(job.tokenizer))
    loader = dataloader.tokenizing_distributed_data_loader_bos_bestfit(
        _Tiktoken(job, words), job.rows, job.tokens, "train", tokenizer_threads=job.threads, device="cpu"
    )

    def step() -> np.ndarray:
        inputs, targets = next(loader)
        return np.concatenate([inputs.numpy(), targets[:, -1:].numpy()], axis=1)

    return step


class _Tiktoken:
    """What upstream's loader asks of a tokenizer."""

    def __init__(self, job: Job, words: Tokenizer) -> None:
        import tiktoken

        from omni_model.text.nanochat_tokenizer import ranks_of
        from omni_model.text.tokenizer import SPECIAL_TOKENS, SPLIT_PATTERN

        special = {name: words.special(name) for name in SPECIAL_TOKENS}
        self._encoding = tiktoken.Encoding(
            "theirs",
            pat_str=SPLIT_PATTERN,
            mergeable_ranks=ranks_of(Path(job.tokenizer)),
            special_tokens=special,
        )

    def get_bos_token_id(self) -> int:
        return int(self._encoding.encode_single_token("<|bos|>"))

    def encode(self, texts: list[str], prepend: int, num_threads: int) -> list[list[int]]:
        encoded: list[list[int]] = self._encoding.encode_ordinary_batch(texts, num_threads=num_threads)
        for ids in encoded:
            ids.insert(0, prepend)
        return encoded


SIDES: dict[str, Callable[[Job], Step]] = {
    "rows": rows,
    "background": background,
    "packing": packing,
    "nanochat": nanochat,
}


def stepping(job: Job) -> tuple[str, Callable[[], int]]:
    """sha256 of the first rows, and a repetition, which tells how many tokens it made."""
    step = SIDES[job.side](job)
    first = np.concatenate([step() for _ in range(CHECKED_STEPS)]).astype("<i4")

    def repeat() -> int:
        for _ in range(job.steps):
            step()
        return job.steps * job.rows * job.tokens

    return hashlib.sha256(first.tobytes()).hexdigest(), repeat


def tokenising(job: Job) -> tuple[str, Callable[[], int]]:
    """Documents to ids, nothing else; by tiktoken or by the tokenizers library."""
    words = load_tokenizer(Path(job.tokenizer))
    quick = quick_encoder(Path(job.tokenizer), words, job.threads)
    encode = words.encode_batch if job.side == "tokenizers" else quick
    texts = _texts(job)
    starts: Iterator[int] = itertools.cycle(range(0, len(texts), BATCH_DOCUMENTS))

    def repeat() -> int:
        made = 0
        while made < job.steps * job.rows * job.tokens:
            start = next(starts)
            made += sum(map(len, encode(texts[start : start + BATCH_DOCUMENTS])))
        return made

    return "", repeat


def _texts(job: Job) -> list[str]:
    return list(read_texts(Path(job.corpus), "train"))


def main() -> None:
    """Serve one job until standard input ends."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever the contender prints is no answer
    job = Job(**json.loads(sys.argv[1]))
    sha256, repeat = (stepping if job.side in SIDES else tokenising)(job)
    print(json.dumps({"sha256": sha256}), file=answers, flush=True)
    for _ in sys.stdin:
        if job.side == "background":  # what it made while others were timed does not count
            for _ in range((STEPS_AHEAD + 2) // job.steps + 1):
                repeat()
        wall, cpu = time.perf_counter(), time.process_time()
        tokens = repeat()
        seconds = {"wall": time.perf_counter() - wall, "cpu": time.process_time() - cpu}
        print(json.dumps({"tokens": tokens, **seconds}), file=answers, flush=True)


if __name__ == "__main__":
    main()
