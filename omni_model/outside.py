"""A folder that somebody else filled, looked at but never written to: its files and what their bytes are.

Links are followed, for people collect recordings that way; a link back to a folder above is not followed
again. Hidden files do not count: systems and editors leave them behind. Standard library only.
"""

import contextlib
import json
import os
from pathlib import Path
from typing import Any

from omni_model.artifacts import PayloadFile, content_digest, sha256_file, write_atomically
from omni_model.config import BadInput


def digest_folder(folder: Path, memory: Path | None = None) -> str:
    """Hex sha256 over the sorted (path, size, sha256) of a folder's files; see `hash_folder`."""
    return content_digest(hash_folder(folder, memory))


def hash_folder(folder: Path, memory: Path | None = None) -> list[PayloadFile]:
    """Relative path, size and sha256 of every file below a folder, sorted by path.

    Args:
        memory: a file to remember hashes in, so that only files whose size, times or inode changed are read
            the next time.

    Raises:
        BadInput: no such folder, or something in it cannot be read.
    """
    known: dict[str, list[Any]] = {}
    if memory:
        with contextlib.suppress(OSError, ValueError):
            known = json.loads(memory.read_text())
    found, seen = [], {}
    for path in list_folder(folder):
        try:
            stat = (folder / path).stat()
            now = [stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns, stat.st_ino]
            before = known.get(path, [])
            sha256 = before[-1] if before[:-1] == now else sha256_file(folder / path)
        except OSError as error:
            raise _unreadable(folder / path, error) from None
        found.append(PayloadFile(path, stat.st_size, sha256))
        seen[path] = [*now, sha256]
    if memory and seen != known:
        with contextlib.suppress(OSError):  # it only saves time
            memory.parent.mkdir(parents=True, exist_ok=True)
            write_atomically(memory, json.dumps(seen))
    return found


def list_folder(folder: Path) -> list[str]:
    """Relative paths of all files below a folder, with slashes, sorted.

    Raises:
        BadInput: no such folder, a broken link, or a folder below it that cannot be read.
    """
    if not folder.is_dir():
        raise BadInput(f"{folder} is not a folder; name one that exists.")
    found: list[str] = []
    pending: list[tuple[str, frozenset[tuple[int, int]]]] = [("", frozenset())]
    while pending:
        inside, above = pending.pop()
        place = folder / inside
        try:
            stat = place.stat()
            if (stat.st_dev, stat.st_ino) in above:
                continue
            above |= {(stat.st_dev, stat.st_ino)}
            with os.scandir(place) as entries:
                for entry in entries:
                    place = Path(entry.path)
                    if entry.name.startswith("."):
                        continue
                    if entry.is_dir():
                        pending.append((f"{inside}{entry.name}/", above))
                    elif entry.is_file():
                        found.append(inside + entry.name)
                    elif entry.is_symlink():
                        raise BadInput(f"{place} is a link that leads nowhere; mend or remove it.")
        except OSError as error:
            raise _unreadable(place, error) from None
    return sorted(found)


def _unreadable(path: Path, error: OSError) -> BadInput:
    return BadInput(f"{path} cannot be read ({error.strerror}); make it readable or move it away.")
