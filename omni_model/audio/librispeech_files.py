"""LibriSpeech as it lies on disk: one tar of FLAC files and transcripts, or parquet files of both.

A tar that is cut off ends without an error, and a flipped bit passes through `tarfile`'s own gzip reader: so
the compressed stream is read to its very end, where its checksum is, and every transcript must find its
recording. The tar is read as a stream and never unpacked.
"""

import contextlib
import gzip
import re
import tarfile
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from omni_model.config import BadInput
from omni_model.downloads import looks_like_page

SPEAKERS = "SPEAKERS.TXT"
UTTERANCE = re.compile(r"(\d+-\d+)-\d+")  # speaker-chapter, then the utterance's number
MAX_HELD_BYTES = 1 << 29  # recordings that wait for their transcripts; a chapter is below 30 MB
CHUNK_BYTES = 1 << 20
COLUMNS = ("id", "text", "audio")


@dataclass(frozen=True)
class Utterance:
    """What one person reads in one go: `speaker-chapter-number`, the words, the recording if there is one."""

    name: str
    text: str
    flac: bytes | None


def refuse_page(path: Path) -> None:
    """Raises BadInput where a login or error page was saved in place of a file."""
    with path.open("rb") as file:
        if looks_like_page(file.read(64)):
            raise BadInput(f"{path} is a web page that was saved in place of the file; download it again")


# --- tar -----------------------------------------------------------------------------------------


@contextlib.contextmanager
def _members(archive: Path) -> Iterator[Iterator[tuple[str, tarfile.TarFile, tarfile.TarInfo]]]:
    """The plain files of the archive by name, in order; after the last, its checksum has been checked."""

    def members() -> Iterator[tuple[str, tarfile.TarFile, tarfile.TarInfo]]:
        while (member := tar.next()) is not None:
            tar.members.clear()  # tarfile would remember them all
            if member.isfile():
                yield PurePosixPath(member.name).name, tar, member
        while unpacked.read(CHUNK_BYTES):  # the checksum comes last, behind the end of the tar
            pass

    try:
        with gzip.open(archive) as unpacked, tarfile.open(fileobj=unpacked, mode="r|") as tar:
            yield members()
    except (EOFError, gzip.BadGzipFile, zlib.error, tarfile.TarError) as error:
        raise BadInput(f"{archive} is damaged or cut off ({error}); download it again") from None


def _content(tar: tarfile.TarFile, member: tarfile.TarInfo) -> bytes:
    file = tar.extractfile(member)
    return file.read() if file else b""


def read_speakers(archive: Path) -> str:
    """SPEAKERS.TXT, which is needed before the first recording. It lies near the start; "" if nowhere.

    Raises:
        BadInput: the archive is damaged or cut off, or no tar.gz.
    """
    with _members(archive) as members:
        for name, tar, member in members:
            if name == SPEAKERS:
                return _content(tar, member).decode(errors="replace")
    return ""


def read_tar(archive: Path) -> Iterator[Utterance]:
    """Every utterance, once its recording and its transcript have both come by, in whatever order.

    Raises:
        BadInput: the archive is damaged or cut off, or has a recording or a transcript without the other.
    """
    texts: dict[str, dict[str, str]] = {}
    held: dict[str, dict[str, bytes]] = {}
    with _members(archive) as members:
        for name, tar, member in members:
            if name.endswith(".trans.txt"):
                chapter = name.removesuffix(".trans.txt")
                texts[chapter] = _transcripts(_content(tar, member).decode(errors="replace"))
            elif name.endswith(".flac") and (found := UTTERANCE.fullmatch(name.removesuffix(".flac"))):
                chapter = found[1]
                held.setdefault(chapter, {})[found[0]] = _content(tar, member)
            else:
                continue
            if chapter in texts:
                for key, flac in held.pop(chapter, {}).items():
                    yield Utterance(key, _text(texts[chapter], key, archive), flac)
            elif sum(len(flac) for flacs in held.values() for flac in flacs.values()) > MAX_HELD_BYTES:
                raise BadInput(
                    f"{archive} has its transcripts too far from its recordings; use openslr's own"
                )
    _require_pairs(archive, texts, held)


def _transcripts(text: str) -> dict[str, str]:
    return {key: words for key, _, words in (line.partition(" ") for line in text.splitlines()) if key}


def _text(texts: dict[str, str], key: str, archive: Path) -> str:
    if key not in texts:
        raise BadInput(f"{archive} has the recording {key} twice or without a transcript; download it again")
    return texts.pop(key)


def _require_pairs(
    archive: Path, texts: Mapping[str, Mapping[str, str]], held: Mapping[str, Mapping[str, bytes]]
) -> None:
    for what, lacking, left in (("transcripts", "recordings", texts), ("recordings", "transcripts", held)):
        names = [key for chapter in left.values() for key in chapter]
        if names:
            raise BadInput(
                f"{archive} has {len(names)} {what} without their {lacking}, such as {names[0]}; "
                "download it again"
            )


# --- parquet -------------------------------------------------------------------------------------


def num_parquet_rows(path: Path) -> int:
    """How many utterances a parquet file holds. Its last bytes tell, so half a file is noticed.

    Raises:
        BadInput: damaged, cut off, or without a column that is needed.
    """
    import pyarrow
    import pyarrow.parquet

    refuse_page(path)
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            schema, num_rows = file.schema_arrow, int(file.metadata.num_rows)
    except (pyarrow.ArrowException, OSError) as error:
        raise damaged(path, error) from None
    audio = schema.field("audio").type if "audio" in schema.names else None
    has_bytes = pyarrow.types.is_struct(audio) and audio.get_field_index("bytes") >= 0 if audio else False
    missing = [name for name in COLUMNS if name not in schema.names]
    if audio is not None and not has_bytes:
        missing.append("audio.bytes")
    if missing:
        raise BadInput(f"{path} lacks the column {missing[0]}; give LibriSpeech as Hugging Face publishes it")
    return num_rows


def read_parquet(path: Path) -> Iterator[Utterance]:
    """Every utterance of one file, in order.

    Raises:
        BadInput: damaged, or an id that is none of LibriSpeech's.
    """
    import pyarrow
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            for batch in file.iter_batches(batch_size=8, columns=list(COLUMNS)):
                for row in batch.to_pylist():
                    yield _utterance(row, path)
    except (pyarrow.ArrowException, OSError) as error:
        raise damaged(path, error) from None


def _utterance(row: Mapping[str, Any], path: Path) -> Utterance:
    name = str(row["id"])
    if not UTTERANCE.fullmatch(name):
        raise BadInput(f"{path} has the id {name!r}, and LibriSpeech's are speaker-chapter-number")
    return Utterance(name, row["text"] or "", (row["audio"] or {}).get("bytes"))


def damaged(path: Path, error: Exception) -> BadInput:
    """The one sentence for a parquet file that is not whole."""
    first = str(error).strip().splitlines()[0].rstrip(".")
    return BadInput(f"{path} is damaged or cut off ({first}); download it again")
