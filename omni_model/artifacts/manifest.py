"""The manifest that says an artifact is finished, and what hashes it. Standard library only."""

import dataclasses
import hashlib
import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from omni_model.config import JSON, BadInput

SCHEMA = 1
MANIFEST = "manifest.json"


def canonical_json(value: JSON) -> str:
    """One text per value: sorted keys, no spaces, ASCII. NaN and infinity raise ValueError."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False)


def sha256_text(text: str) -> str:
    """Hex sha256 of a text's UTF-8 bytes."""
    return hashlib.sha256(text.encode()).hexdigest()


def sha256_file(path: Path) -> str:
    """Hex sha256 of a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@dataclass(frozen=True)
class PayloadFile:
    """One file of a payload: path relative to `out/`, size in bytes, sha256 in hex."""

    path: str
    size: int
    sha256: str


def content_digest(files: list[PayloadFile]) -> str:
    """Hex sha256 over the sorted (path, size, sha256) of a payload."""
    return sha256_text(canonical_json([[f.path, f.size, f.sha256] for f in sorted(files, key=_path)]))


def _path(file: PayloadFile) -> str:
    return file.path


def list_payload(out: Path) -> list[Path]:
    """Every file below `out`, as sorted relative paths."""
    return sorted(p.relative_to(out) for p in out.rglob("*") if p.is_file())


def hash_payload(out: Path) -> list[PayloadFile]:
    """Size and sha256 of every file below `out`."""
    return [
        PayloadFile(path.as_posix(), (out / path).stat().st_size, sha256_file(out / path))
        for path in list_payload(out)
    ]


class DamagedManifest(BadInput):
    """A `manifest.json` that cannot be read: its artifact counts as unfinished."""


@dataclass(frozen=True)
class Manifest:
    """What was made, from what, and what it measured. Everything but the payload files may vary freely."""

    stage: str
    key: str
    handle: str
    components: dict[str, Any]
    files: list[PayloadFile]
    facts: dict[str, Any]
    metrics: dict[str, Any]
    timings: dict[str, float]
    versions: dict[str, str]
    schema: int = SCHEMA

    @property
    def digest(self) -> str:
        """The payload's content digest."""
        return content_digest(self.files)

    def write(self, directory: Path) -> None:
        """Put `manifest.json` in place in one step; a crash leaves either none or a whole one."""
        write_atomically(directory / MANIFEST, json.dumps(dataclasses.asdict(self), sort_keys=True, indent=1))

    @classmethod
    def read(cls, directory: Path) -> "Manifest":
        """The manifest of a finished artifact.

        Raises:
            FileNotFoundError: the artifact is not finished.
            DamagedManifest: the file is not a manifest.
            BadInput: it is one of another schema, which is never guessed at.
        """
        path = directory / MANIFEST
        text = path.read_text()
        try:
            plain = json.loads(text)
            found = plain["schema"]
        except (json.JSONDecodeError, KeyError, TypeError):
            raise DamagedManifest(f"{path} is not a manifest; the stage will be made again") from None
        if found != SCHEMA:
            raise BadInput(
                f"{path} has schema {found} and this version reads schema {SCHEMA}; "
                f"run the version that wrote it, or delete {directory}"
            )
        files = [PayloadFile(**f) for f in plain.pop("files")]
        return cls(files=files, **plain)


def write_atomically(path: Path, text: str) -> None:
    """Write a text file so that readers see the old bytes or the new ones, never a part, crash or not."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with temporary.open("w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)
