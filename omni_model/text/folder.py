"""A folder of somebody's own texts as a text corpus.

Every .txt is a document; every line of a .jsonl and every row of a .parquet is one. The documents are laid in
the order of their sha256: a shuffle that needs no seed, does not care how the files are called, and is done
with little memory. A first pass drops each document into one of many bins by its hash, a second sorts a bin
at a time; a bin becomes a file of the corpus. The first documents in this order are for validation, so a
document's own hash decides where it belongs, and a text that occurs twice cannot be on both sides.

A packed row takes the start of a document and drops what does not fit. So that a book is not one start, a
.txt longer than a usual row is cut, at an empty line where there is one.
"""

import codecs
import hashlib
import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

from omni_model.artifacts import content_digest
from omni_model.config import JSON, BadInput, Runtime, TextFolderRecipe
from omni_model.outside import hash_folder
from omni_model.storage import Workspace
from omni_model.text.corpus import SPLITS, TEXT, read_column, text_bytes, write_shard

SUFFIXES = (".txt", ".jsonl", ".parquet")
MAX_TXT_CHARS = 8192  # about 2000 tokens
BIN_BYTES = 32_000_000  # of text in a bin, so in a file of the corpus
HELD_BYTES = 16_000_000  # of documents that wait to be written to their bins
READ_BYTES = 1 << 16
BREAKS = (re.compile(r"\n\s*\n"), re.compile(r"\n"), re.compile(r"\s"))  # where to cut a .txt, best first
HASH_SPAN = 1 << 32  # the first 8 hex digits of a sha256 are a number below this


def import_text(recipe: TextFolderRecipe, *, work: Workspace, runtime: Runtime) -> dict[str, JSON]:
    """Stage: the texts below a folder, shuffled, as parquet files; empty documents are left out and counted.

    About `validation_share` of the documents go to validation: at least one, and never all.

    Raises:
        BadInput: the folder is not what it was when the run was planned or holds no two different texts, or
            one of its files is empty, not UTF-8, broken or without the column.
    """
    if not recipe.folder.path or not recipe.folder.digest:
        raise BadInput("texts.folder has no path or no digest; name a folder and plan the run anew")
    if recipe.validation_share >= 1:
        raise BadInput(f"texts.validation_share is {recipe.validation_share:g}; give a share below 1")
    folder = Path(recipe.folder.path).expanduser()
    paths = _unchanged(recipe, folder, work)
    if not paths:
        raise BadInput(f"{folder} holds no {', '.join(SUFFIXES)}; name a folder of texts")
    bins = _Bins(work.partial / "bins", sum(_num_bytes(path, recipe.column) for path in paths))
    for number, path in enumerate(paths, start=1):
        for document in read_documents(path, recipe.column):
            bins.add(document)
        work.metrics.log(number, len(paths))
    bins.flush()
    _unchanged(recipe, folder, work)
    counts = _write(bins, work.out, recipe.validation_share)
    shutil.rmtree(bins.directory)
    if not counts["train"]:
        raise BadInput(
            f"{folder} holds no two different texts, and there must be one to train and one to test"
        )
    num_bytes = sum(path.stat().st_size for path in work.out.iterdir())
    work.metrics.summary(
        num_documents=sum(counts.values()),
        validation_documents=counts["validation"],
        empty_documents=bins.num_empty,
        files=len(paths),
        megabytes=round(num_bytes / 1e6, 2),
    )
    return {"num_documents": sum(counts.values()), "num_bytes": num_bytes}


def _unchanged(recipe: TextFolderRecipe, folder: Path, work: Workspace) -> list[Path]:
    """The texts below the folder, sorted, once it is sure that everything there is as it was planned with."""
    files = hash_folder(folder, work.partial / "hashes.json")
    if content_digest(files) != recipe.folder.digest:
        raise BadInput(f"{folder} has changed since the run was planned; run again to take it as it is now")
    return [folder / file.path for file in files if Path(file.path).suffix.lower() in SUFFIXES]


# --- the shuffle ---------------------------------------------------------------------------------


class _Bins:
    """Documents on disk, in files by the start of their hash, a JSON string a line."""

    def __init__(self, directory: Path, num_bytes: int) -> None:
        self.directory = directory
        self.number = 1 + num_bytes // BIN_BYTES
        self.num_empty = 0
        self._held: dict[int, list[bytes]] = {}
        self._held_bytes = 0
        shutil.rmtree(directory, ignore_errors=True)  # of an attempt that was killed
        directory.mkdir(parents=True)

    def add(self, document: str) -> None:
        if not document.strip():
            self.num_empty += 1
            return
        line = json.dumps(document, ensure_ascii=False).encode() + b"\n"
        place = _start(_hash(document)) * self.number // HASH_SPAN
        self._held.setdefault(place, []).append(line)
        self._held_bytes += len(line)
        if self._held_bytes >= HELD_BYTES:
            self.flush()

    def flush(self) -> None:
        for place, lines in self._held.items():
            with self._path(place).open("ab") as file:
                file.writelines(lines)
        self._held, self._held_bytes = {}, 0

    def sorted(self) -> Iterator[list[tuple[str, str]]]:
        """The (hash, document) of each bin that holds any, in the order of all hashes."""
        for path in (self._path(place) for place in range(self.number)):
            if path.exists():
                yield self._read(path)

    def last_hash(self) -> str:
        """The largest hash; empty where there is no document."""
        places = [place for place in range(self.number) if self._path(place).exists()]
        return self._read(self._path(places[-1]))[-1][0] if places else ""

    def _read(self, path: Path) -> list[tuple[str, str]]:
        with path.open("rb") as file:
            documents = [str(json.loads(line)) for line in file]
        return sorted((_hash(document), document) for document in documents)

    def _path(self, place: int) -> Path:
        return self.directory / f"{place:06d}.jsonl"


def _hash(document: str) -> str:
    return hashlib.sha256(document.encode()).hexdigest()


def _start(hash: str) -> int:
    return int(hash[:8], 16)


def _write(bins: _Bins, out: Path, validation_share: float) -> dict[str, int]:
    """A bin's documents to validation while hashes are small, then to training; how many went where.

    The very first document is for validation whatever its hash, and the very last one for training.
    """
    last = bins.last_hash()
    first, counts, shards = "", dict.fromkeys(SPLITS, 0), dict.fromkeys(SPLITS, 0)
    for documents in bins.sorted():
        first = first or documents[0][0]
        parts: dict[str, list[str]] = {split: [] for split in SPLITS}
        for hash, document in documents:
            held_out = hash == first or (_start(hash) < validation_share * HASH_SPAN and hash != last)
            parts["validation" if held_out else "train"].append(document)
        for split, texts in parts.items():
            if texts:
                write_shard(out / f"{split}-{shards[split]:05d}.parquet", {TEXT: texts})
                shards[split] += 1
                counts[split] += len(texts)
    return counts


# --- the files -----------------------------------------------------------------------------------


def read_documents(path: Path, column: str) -> Iterator[str]:
    """Every document of a .txt, .jsonl or .parquet file, in order; at most a line of it in memory.

    Raises:
        BadInput: the file is broken, or lacks the column somewhere.
    """
    suffix = path.suffix.lower()
    if suffix == ".parquet":
        return read_column(path, column)
    return _pieces(path) if suffix == ".txt" else _lines(path, column)


def _num_bytes(path: Path, column: str) -> int:
    """About how much text a file holds."""
    if path.stat().st_size == 0:
        raise BadInput(f"{path} is empty; fill or remove it")
    return text_bytes(path, column) if path.suffix.lower() == ".parquet" else path.stat().st_size


def _pieces(path: Path) -> Iterator[str]:
    """The text of a file, whole if it is short, else cut so that the pieces make up the whole."""
    rest = ""
    for text in _decoded(path):
        rest += text
        while len(rest) > MAX_TXT_CHARS:
            cut = _cut(rest[:MAX_TXT_CHARS])
            yield rest[:cut]
            rest = rest[cut:]
    yield rest


def _cut(text: str) -> int:
    for pattern in BREAKS:
        ends = [found.end() for found in pattern.finditer(text, len(text) // 2)]
        if ends:
            return ends[-1]
    return len(text)


def _decoded(path: Path) -> Iterator[str]:
    decoder = codecs.getincrementaldecoder("utf-8")()
    begun = 0  # bytes before those that the decoder holds back or is given
    with path.open("rb") as file:
        while True:
            chunk = file.read(READ_BYTES)
            try:
                text = decoder.decode(chunk, final=not chunk)
            except UnicodeDecodeError as error:
                raise _not_utf8(path, begun + error.start) from None
            yield text if begun else text.removeprefix("\ufeff")
            if not chunk:
                return
            begun = file.tell() - len(decoder.getstate()[0])


def _lines(path: Path, field: str) -> Iterator[str]:
    begun = 0
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            try:
                text = line.decode().removeprefix("\ufeff" if number == 1 else "")
            except UnicodeDecodeError as error:
                raise _not_utf8(path, begun + error.start) from None
            begun += len(line)
            if text.strip():
                yield _field(text, field, f"{path}, line {number}")


def _field(line: str, field: str, where: str) -> str:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise BadInput(f"{where}: this is not JSON ({error}); mend the line") from None
    if not isinstance(row, dict):
        raise BadInput(f"{where}: this is no JSON object; write one with the field {field!r}")
    if field not in row:
        names = ", ".join(map(repr, row)) or "none"
        raise BadInput(f"{where}: the field {field!r} is missing among {names}; name the field of texts")
    value = row[field]
    if value is None:
        return ""
    if not isinstance(value, str):
        raise BadInput(f"{where}: the field {field!r} is not a string; name a field of texts")
    try:
        value.encode()
    except UnicodeEncodeError:
        raise BadInput(f"{where}: the text holds half of a surrogate pair; mend the line") from None
    return value


def _not_utf8(path: Path, offset: int) -> BadInput:
    return BadInput(f"{path} is not UTF-8 at byte {offset}; save it as UTF-8 or remove it")
