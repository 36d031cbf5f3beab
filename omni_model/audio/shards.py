"""Feature shards on disk: tars that webdataset reads, and an index that says where each clip's array lies.

A tar gets its name only when it is whole: it is written beside its place, brought to the disk, read back and
counted first. So whatever has a name can be kept when a run is killed, and lent to a later run. The index is
one JSON document with a line per shard, so that it is written and read a shard at a time, however many there
are.

A tar holds, clip by clip, `<key>.feat.npy` (frames (T, D) float16) and `<key>.json` (the clip's metadata).

Axes: T encoder frames, D frame width.
"""

import contextlib
import errno
import hashlib
import io
import json
import os
import tarfile
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from omni_model.artifacts import canonical_json, sha256_file, write_atomically
from omni_model.config import BadInput

INDEX = "index.json"
ARRAY_SUFFIX, METADATA_SUFFIX = ".feat.npy", ".json"
TAR_OWNER = "omni"
BUFFER_BYTES = 2**20
NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
SHARDS_FOLLOW = ',"shards":['
END_OF_INDEX = "]}"

Record = dict[str, Any]


@contextlib.contextmanager
def full_disk_told(directory: Path) -> Iterator[None]:
    """Turn the errors of a full disk into one sentence."""
    try:
        yield
    except OSError as error:
        if error.errno not in NO_ROOM:
            raise
        raise BadInput(
            f"{directory} could not take more ({error.strerror}); free some space and run again: "
            "what is finished there is kept."
        ) from None


# --- one shard -----------------------------------------------------------------------------------


def write_shard(
    target: Path, made_from: str, clips: Iterable[tuple[str, np.ndarray, Mapping[str, Any]]]
) -> Record:
    """Write one tar of (key, frames (T, D) float16, metadata), and beside it what the index says about it.

    Returns name, sha256, bytes, num_clips, num_frames, made_from and clips of the tar; the same is in a JSON
    file of the tar's name. Whatever goes wrong in `clips` leaves no tar.
    """
    from webdataset.writer import TarWriter

    temporary, written = target.with_suffix(".tmp"), 0
    try:
        with temporary.open("wb", buffering=BUFFER_BYTES) as file:
            # Time and owner are fixed: the same features must be the same bytes.
            with TarWriter(
                file, user=TAR_OWNER, group=TAR_OWNER, mtime=0, encoder=False, compress=False
            ) as tar:
                for key, frames_TD, metadata in clips:
                    row = json.dumps({**metadata, "num_frames": len(frames_TD)}, sort_keys=True)
                    sample = {ARRAY_SUFFIX[1:]: _npy(frames_TD), METADATA_SUFFIX[1:]: row.encode()}
                    tar.write({"__key__": key, **sample})
                    written += 1
            file.flush()
            os.fsync(file.fileno())
        record = {**_look_into(temporary), "name": target.name, "made_from": made_from}
        if record["num_clips"] != written:
            found = record["num_clips"]
            raise OSError(f"{temporary} holds {found} clips after {written} were written; is the disk sound?")
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    os.replace(temporary, target)
    write_atomically(record_path(target), canonical_json(record))
    return record


def record_path(shard: Path) -> Path:
    """Where `write_shard` notes what it has written."""
    return shard.with_suffix(".json")


def finished(shard: Path, made_from: str) -> int | None:
    """How many clips a tar of an earlier attempt holds, if it was made from the same and is whole."""
    try:
        record = json.loads(record_path(shard).read_text())
        if record["made_from"] == made_from and record["sha256"] == sha256_file(shard):
            return int(record["num_clips"])
    except (OSError, ValueError, KeyError):
        pass
    return None


def _npy(array: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, array, allow_pickle=False)
    return buffer.getvalue()


def _look_into(path: Path) -> Record:
    """sha256, size and clips of a feature tar; per clip where its array lies, and its metadata."""
    clips, num_frames = [], 0
    with tarfile.open(path, "r:") as tar:
        members = tar.getmembers()
        for array, row in zip(members[::2], members[1::2], strict=True):
            key = array.name.removesuffix(ARRAY_SUFFIX)
            if row.name != key + METADATA_SUFFIX:
                raise OSError(f"{path} holds {array.name} and {row.name} where one clip's pair should be")
            file = tar.extractfile(row)
            assert file is not None
            metadata = json.loads(file.read())
            place = {"offset": array.offset_data, "size": array.size, "num_frames": metadata["num_frames"]}
            clips.append({"key": key, **place, "metadata": metadata})
            num_frames += metadata["num_frames"]
    counts = {"num_clips": len(clips), "num_frames": num_frames}
    return {"sha256": sha256_file(path), "bytes": path.stat().st_size, **counts, "clips": clips}


# --- the index -----------------------------------------------------------------------------------


def write_index(path: Path, facts: Mapping[str, Any], records: Iterable[Record]) -> None:
    """Write `facts` and, as `shards`, every record: one JSON document, a line for each shard."""
    temporary = path.with_suffix(".tmp")
    with temporary.open("w") as file:
        file.write(canonical_json(dict(facts)).removesuffix("}") + SHARDS_FOLLOW)
        for number, record in enumerate(records):
            file.write((",\n" if number else "\n") + canonical_json(record))
        file.write("\n" + END_OF_INDEX + "\n")
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def read_index(path: Path) -> Iterator[dict[str, Any]]:
    """First the facts, then the record of each shard, one at a time.

    Raises:
        BadInput: the file is missing, cut off, or no such index.
    """
    try:
        with path.open() as file:
            yield dict(json.loads(file.readline().rstrip("\n").removesuffix(SHARDS_FOLLOW) + "}"))
            for line in file:
                if line.rstrip("\n") == END_OF_INDEX:
                    return
                yield dict(json.loads(line.rstrip(",\n")))
        raise ValueError("it is cut off")
    except (OSError, ValueError, TypeError) as error:
        raise BadInput(f"{path} cannot be read ({error}); delete its artifact and run again.") from None


# --- shards of earlier runs ----------------------------------------------------------------------


def borrow(
    kin: Iterable[Path], facts: Mapping[str, Any], wanted: Mapping[str, str], partial: Path
) -> dict[str, int]:
    """Take over from other payloads, with equal facts, the tars that were made from the same.

    Args:
        kin: payloads of this stage; see `Workspace.kin`.
        wanted: what a tar would be made from -> the name it is to have in `partial`.

    Returns name -> number of clips of what was found. Each was hashed while it was copied.
    """
    found: dict[str, int] = {}
    for out in kin:
        if len(found) == len(wanted):
            break
        with contextlib.suppress(BadInput):  # a damaged index lends nothing
            records = read_index(out / INDEX)
            if next(records) != facts:
                continue
            for record in records:
                name = wanted.get(record["made_from"], "")
                if name and name not in found and _copy(out / record["name"], record, partial / name):
                    found[name] = record["num_clips"]
    return found


def _copy(source: Path, record: Record, target: Path) -> bool:
    """Copy a tar if its bytes are those of its record."""
    temporary, digest = target.with_suffix(".tmp"), hashlib.sha256()
    if not source.exists():
        return False
    try:
        with source.open("rb") as old, temporary.open("wb") as new:
            while chunk := old.read(BUFFER_BYTES):
                digest.update(chunk)
                new.write(chunk)
            new.flush()
            os.fsync(new.fileno())
        if digest.hexdigest() != record["sha256"]:
            temporary.unlink()
            return False
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    os.replace(temporary, target)
    write_atomically(record_path(target), canonical_json({**record, "name": target.name}))
    return True
