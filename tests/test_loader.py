"""The stream of packed rows: nanochat's, token for token; the same in any process, from any step."""

import hashlib
import json
import os
import select
import signal
import subprocess
import sys
import tracemalloc
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest

from omni_model.config import JSON, BadInput
from omni_model.text.loader import BackgroundRows, PackedRows, validation_rows
from omni_model.text.packing import Batch, Packer, pack
from omni_model.text.quick_encoding import quick_encoder
from omni_model.text.tokenizer import load_tokenizer, train_bpe

ROOT = Path(__file__).resolve().parent.parent
GOLDEN = json.loads((ROOT / "tests" / "golden" / "text_stream.json").read_text())
# Row groups of two files to train on and one to validate with: neither their ends nor those of batches meet.
TRAIN_GROUPS, VALIDATION_GROUPS = ((300, 129), (1024, 128, 47)), ((900, 1100),)
ROW_TOKENS = 33
BOS = 256


def text(number: int) -> str:
    """A short document, a fifth of them longer than a row, some empty, one in fifty very long."""
    return (f"{number}." * 40)[: 150 if number % 50 == 7 else number * 7919 % 41]


def write_split(corpus: Path, split: str, files: Sequence[Sequence[int]], first: int = 0) -> int:
    """Files of `text`, by the sizes of their row groups; the number of the next document."""
    for number, groups in enumerate(files):
        schema = pyarrow.schema([("text", pyarrow.string())])
        with pyarrow.parquet.ParquetWriter(corpus / f"{split}-{number:05d}.parquet", schema) as file:
            for size in groups:
                texts = [text(i) for i in range(first, first + size)]
                file.write_table(pyarrow.table({"text": texts}, schema))
                first += size
    return first


def write_bytes_tokenizer(folder: Path) -> Path:
    folder.mkdir()
    (folder / "tokenizer.json").write_text('{"kind":"bytes"}')
    return folder


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("corpus")
    write_split(folder, "validation", VALIDATION_GROUPS, write_split(folder, "train", TRAIN_GROUPS))
    return folder


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_bytes_tokenizer(tmp_path_factory.mktemp("bytes") / "tokenizer")


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Fewer documents than wait: several epochs are in the buffer at once."""
    folder = tmp_path_factory.mktemp("tiny")
    write_split(folder, "train", ((70,), (130, 40)))
    return folder


def shown(rows: np.ndarray) -> list[str]:
    return ["".join("|" if i == BOS else chr(i) for i in row) for row in rows]


def steps(stream: PackedRows | BackgroundRows, count: int) -> tuple[list[np.ndarray], list[JSON]]:
    rows, cursors = zip(*(stream.next() for _ in range(count)), strict=True)
    return list(rows), list(cursors)


def through_json(cursor: JSON) -> Any:
    return json.loads(json.dumps(cursor))


# --- packing -------------------------------------------------------------------------------------


def literally_packed(batches: Iterator[list[list[int]]], row_tokens: int) -> Iterator[list[int]]:
    """The rule as it is told, a look at every waiting document for every choice."""
    waiting: list[list[int]] = []
    row: list[int] = []
    while True:
        while len(waiting) < 1000 and (batch := next(batches, None)) is not None:
            waiting += batch
        if not waiting:
            return
        space, best = row_tokens - len(row), None
        for document in waiting:
            if len(document) <= space and (best is None or len(document) > len(best)):
                best = document
        if best is None:
            for document in waiting:
                if best is None or len(document) < len(best):
                    best = document
        assert best is not None
        del waiting[next(i for i, document in enumerate(waiting) if document is best)]
        row = row + best[:space]
        if len(row) == row_tokens:
            yield row
            row = []


LENGTHS = {
    "many of one length": lambda rng: rng.choice([3, 5, 8], 1500),
    "tiny": lambda rng: rng.integers(1, 4, 3000),
    "mostly too long": lambda rng: rng.integers(60, 300, 1800),
    "web-like": lambda rng: np.maximum(1, rng.lognormal(3.5, 1, 2000).astype(int)),
    "none but too long": lambda rng: rng.integers(65, 70, 1200),
    "few": lambda rng: rng.integers(1, 90, 40),
}


@pytest.mark.parametrize("name", LENGTHS)
@pytest.mark.parametrize("row_tokens", [64, 65])
def test_rows_are_those_of_the_rule_told_literally(name: str, row_tokens: int) -> None:
    rng = np.random.default_rng(len(name))
    documents = [list(rng.integers(0, 30_000, length)) for length in LENGTHS[name](rng)]
    batches = [documents[i : i + 128] for i in range(0, len(documents), 128)]
    expected = list(literally_packed(iter(batches), row_tokens))
    arrays: Iterator[Batch] = (
        [(np.array(document, np.int32), None) for document in batch] for batch in batches
    )
    found = np.stack(list(Packer(row_tokens).rows(arrays)))
    assert found.dtype == np.int32
    assert found.tolist() == expected

    masks = [[int(i) % 2 for i in document] for document in documents]
    ids, learned = pack(list(zip(documents, masks, strict=True)), row_tokens)
    assert ids.tolist() == list(literally_packed(([document] for document in documents), row_tokens))
    assert (learned == ids % 2).all()


# --- the stream ----------------------------------------------------------------------------------


def test_the_stream_is_that_of_nanochat(corpus: Path, tokenizer: Path) -> None:
    stream = PackedRows(corpus, "train", tokenizer, row_tokens=ROW_TOKENS, rows_per_step=4)
    found, cursors = steps(stream, GOLDEN["num_rows"] // 4)
    rows = np.concatenate(found)
    assert shown(rows[: len(GOLDEN["rows"])]) == GOLDEN["rows"]
    assert hashlib.sha256(rows.astype("<i4").tobytes()).hexdigest() == GOLDEN["sha256"]
    assert through_json(cursors[-1])["epoch"] == GOLDEN["epoch"] == 4


def test_validation_rows_are_the_first_ones_once(corpus: Path, tokenizer: Path, tiny: Path) -> None:
    expected = GOLDEN["validation"]
    assert shown(validation_rows(corpus, tokenizer, ROW_TOKENS, len(expected))) == expected
    every = validation_rows(corpus, tokenizer, ROW_TOKENS, 10**6)
    assert shown(every[: len(expected)]) == expected
    starts = [row[1:].split(".")[0] for row in shown(every)]
    first = sum(map(sum, TRAIN_GROUPS))
    assert len(set(starts)) > 0.9 * len(starts), "documents come once"
    assert all(first <= int(start) < first + 2000 for start in starts if start.isdigit() and int(start) > 99)
    assert len(validation_rows(tiny, tokenizer, ROW_TOKENS, 20, "train")) == 20
    with pytest.raises(BadInput, match="holds less train text than one row of 100000 tokens"):
        validation_rows(tiny, tokenizer, 100_000, 20, "train")


def test_a_process_of_its_own_makes_the_same_rows_for_any_rank(corpus: Path, tokenizer: Path) -> None:
    shape: Any = {"row_tokens": ROW_TOKENS, "rows_per_step": 7}
    whole, cursors = steps(PackedRows(corpus, "train", tokenizer, **shape), 40)
    parts = [slice(0, 3), slice(3, 5), slice(5, None)]
    found = []
    for part in parts:
        with BackgroundRows(corpus, "train", tokenizer, part=part, threads=part.start + 1, **shape) as stream:
            rows, theirs = steps(stream, 40)
        assert theirs == through_json(cursors)
        assert rows[0].dtype == np.int32
        assert rows[0].flags.writeable
        found.append(rows)
    dealt = [np.concatenate(parts) for parts in zip(*found, strict=True)]
    assert all((one == other).all() for one, other in zip(dealt, whole, strict=True))
    again = PackedRows(corpus, "train", tokenizer, part=slice(5, None), **shape)
    assert all((again.next()[0] == rows).all() for rows in found[2])


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A byte-pair tokenizer as the stage writes it."""
    folder = tmp_path_factory.mktemp("pairs")
    model = train_bpe([text(i) for i in range(500)] + [ENGLISH] * 3, 400)
    (folder / "tokenizer.json").write_text(model.to_str())
    return folder


ENGLISH = "They say 1234 cats' tails aren't 5 cm long.\n\n  Grüße,\t「猫」 <|bos|> \U0001f431\u0301!!\r\n x"


def test_threads_and_processes_do_not_change_what_byte_pairs_spell(corpus: Path, pairs: Path) -> None:
    how: Any = {"row_tokens": 65, "rows_per_step": 16}
    rows, _ = steps(PackedRows(corpus, "train", pairs, **how), 30)
    assert all((each[:, 0] == load_tokenizer(pairs).bos_id).all() for each in rows)
    for threads in (1, 3):
        with BackgroundRows(corpus, "train", pairs, threads=threads, **how) as stream:
            assert all((stream.next()[0] == each).all() for each in rows)


def test_the_quick_way_makes_the_same_ids(pairs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(5)
    pieces = [*ENGLISH.split(" "), *ENGLISH, "  ", "a" * 50, "\n\n\n", "'LL", "\u00a0", "12345678901"]
    texts = ["".join(rng.choice(pieces, rng.integers(40))) for _ in range(1500)]
    texts += [ENGLISH, "", " " * 1_000_001, "ab" * 60_000]
    words = load_tokenizer(pairs)
    quick = quick_encoder(pairs, words, 2)
    expected = words.encode_batch(texts)
    assert quick != words.encode_batch
    assert quick(texts) == expected
    monkeypatch.setitem(sys.modules, "tiktoken", None)
    assert quick_encoder(pairs, words, 2) == words.encode_batch


# --- going on ------------------------------------------------------------------------------------


@pytest.mark.parametrize("which", ["corpus", "tiny"])
def test_a_stream_goes_on_from_any_step_of_any_epoch(
    which: str, tokenizer: Path, request: pytest.FixtureRequest
) -> None:
    folder = request.getfixturevalue(which)
    how: Any = {"row_tokens": ROW_TOKENS, "rows_per_step": 5}
    count = 250
    rows, cursors = steps(PackedRows(folder, "train", tokenizer, **how), count)
    assert through_json(cursors[-1])["epoch"] > 2
    picked = range(count - 1) if which == "tiny" else range(0, count - 1, 9)
    for step in list(picked)[:: 5 if which == "tiny" else 1]:
        again = PackedRows(folder, "train", tokenizer, **how, cursor=through_json(cursors[step]))
        ahead = min(step + 12, count)
        found, theirs = steps(again, ahead - step - 1)
        assert all((one == other).all() for one, other in zip(found, rows[step + 1 :], strict=False))
        assert theirs == cursors[step + 1 : ahead]


def test_a_cursor_is_good_for_other_ranks_and_batches(corpus: Path, tokenizer: Path) -> None:
    whole = PackedRows(corpus, "train", tokenizer, row_tokens=ROW_TOKENS, rows_per_step=6)
    _, cursors = steps(whole, 30)
    expected = np.concatenate(steps(whole, 4)[0])
    how: Any = {"row_tokens": ROW_TOKENS, "rows_per_step": 8, "cursor": cursors[-1]}
    found = []
    for part in (slice(0, 4), slice(4, 8)):
        with BackgroundRows(corpus, "train", tokenizer, part=part, **how) as stream:
            found.append(steps(stream, 3)[0])
    dealt = np.concatenate([np.concatenate(parts) for parts in zip(*found, strict=True)])
    assert (dealt == expected).all()


def test_a_cursor_is_small_and_belongs_to_one_stream(corpus: Path, tokenizer: Path, tmp_path: Path) -> None:
    how: Any = {"row_tokens": ROW_TOKENS, "rows_per_step": 8}
    cursor = through_json(steps(PackedRows(corpus, "train", tokenizer, **how), 200)[1][-1])
    assert sum(len(rows) for _, _, rows in cursor["waiting"]) < 1000 + 128
    assert len(json.dumps(cursor)) < 20_000
    other = write_bytes_tokenizer(tmp_path / "other")
    (other / "tokenizer.json").write_text('{"kind": "bytes"}\n')
    for says, place, words, row_tokens in (
        ("rows of another length", corpus, tokenizer, 65),
        ("another tokenizer", corpus, other, ROW_TOKENS),
        ("another corpus", tmp_path / "corpus", tokenizer, ROW_TOKENS),
    ):
        if not place.exists():
            place.mkdir()
            write_split(place, "train", ((300, 128), (1024, 128, 47)))
        changed: Any = {"row_tokens": row_tokens, "rows_per_step": 8, "cursor": cursor}
        with pytest.raises(BadInput, match=f"was reading {says}; "):
            PackedRows(place, "train", words, **changed)


# --- what can go wrong ---------------------------------------------------------------------------


def test_damage_is_named_and_the_run_goes_on_after_the_repair(tokenizer: Path, tmp_path: Path) -> None:
    corpus = tmp_path / "corpus"
    how: Any = {"row_tokens": ROW_TOKENS, "rows_per_step": 2}

    def refused() -> str:
        with BackgroundRows(corpus, "train", tokenizer, **how) as stream:
            with pytest.raises(BadInput) as caught:
                stream.next()
            return str(caught.value)

    corpus.mkdir()
    assert "holds no train-" in refused()
    write_split(corpus, "train", ((0,),))
    assert "train files without a document" in refused()
    write_split(corpus, "train", ((40,), (40, 30)))
    damaged = corpus / "train-00001.parquet"
    whole = damaged.read_bytes()
    damaged.write_bytes(whole[: len(whole) // 2])
    assert "train-00001.parquet cannot be used" in refused()
    pyarrow.parquet.write_table(pyarrow.table({"words": ["a"]}), damaged)
    assert "train-00001.parquet cannot be used: it has no column 'text'" in refused()
    damaged.write_bytes(whole)
    with BackgroundRows(corpus, "train", tokenizer, **how) as stream:
        assert stream.next()[0].shape == (2, ROW_TOKENS)


def test_death_of_the_process_is_told(corpus: Path, tokenizer: Path) -> None:
    with BackgroundRows(corpus, "train", tokenizer, row_tokens=2049, rows_per_step=64) as stream:
        stream.next()
        os.kill(stream._process.pid, signal.SIGKILL)
        with pytest.raises(RuntimeError, match="SIGKILL .*run again to continue"):
            steps(stream, 50)  # what was under way may still arrive


@pytest.mark.parametrize("busy", [False, True])
def test_the_process_ends_with_whoever_asked_for_the_rows(corpus: Path, tokenizer: Path, busy: bool) -> None:
    """While it waits for its rows to be taken, and while it is not yet that far."""
    reader, writer = os.pipe()
    script = f"""if True:
        import os, pathlib, subprocess, sys, time
        from omni_model.text import loader
        popen = subprocess.Popen
        subprocess.Popen = lambda *words, **how: popen(*words, **how, pass_fds=({writer},))
        corpus, tokenizer = map(pathlib.Path, sys.argv[1:])
        with loader.BackgroundRows(corpus, "train", tokenizer, row_tokens=2049, rows_per_step=64) as stream:
            {"pass" if busy else "stream.next()"}
            os.write({writer}, b"x")
            time.sleep(600)
    """
    words = [sys.executable, "-c", script, str(corpus), str(tokenizer)]
    parent = subprocess.Popen(words, cwd=ROOT, pass_fds=(writer,))
    os.close(writer)
    assert select.select([reader], [], [], 60)[0]
    assert os.read(reader, 1) == b"x"
    parent.kill()
    parent.wait()
    assert select.select([reader], [], [], 20)[0], "the process is left"
    assert not os.read(reader, 1)
    os.close(reader)


def test_memory_does_not_grow_with_the_corpus(tokenizer: Path, tmp_path: Path) -> None:
    """Twelve row groups of a hundred documents of 700 characters each, and ten times as many."""
    peaks = []
    for files in (2, 20):
        corpus = tmp_path / str(files)
        corpus.mkdir()
        schema = pyarrow.schema([("text", pyarrow.string())])
        for number in range(files):
            with pyarrow.parquet.ParquetWriter(corpus / f"train-{number:05d}.parquet", schema) as file:
                for group in range(6):
                    texts = [f"{number} {group} {row} " + "x" * 700 for row in range(100)]
                    file.write_table(pyarrow.table({"text": texts}, schema))
        stream = PackedRows(corpus, "train", tokenizer, row_tokens=33, rows_per_step=100)
        tracemalloc.start()
        for _, cursor in iter(stream.next, None):
            if through_json(cursor)["epoch"] > 1:
                break
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert max(peaks) < 1.2 * min(peaks), peaks
    assert max(peaks) < 3_000_000, "of a long document that waits, only what a row can take is kept"
