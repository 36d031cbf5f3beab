"""Artifacts below one local directory, and whether their bytes are still those that were made.

The hooks `fetch`, `publish`, `announce` and `uri` do nothing here: what is in a local directory is where it
should be. `s3.py` makes a bucket of it. Standard library only.
"""

import contextlib
import json
import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from omni_model.artifacts import MANIFEST, DamagedManifest, Manifest, sha256_file, write_atomically
from omni_model.config import BadInput
from omni_model.storage.lease import KernelLease, Lease, wait_for

DIRECTORY_HEX = 32  # of the key's 64: enough to never collide, short enough to read
CHECKED = "checked.json"  # the stat of each payload file when it was last hashed
POLL_S = 0.1
MIN_FREE_BYTES = 200 * 2**20


@dataclass(frozen=True)
class Damage:
    """One payload file that is not what its manifest says, and where it is."""

    place: str
    problem: str

    def __str__(self) -> str:
        return f"{self.place}: {self.problem}"


class Store:
    """Artifacts below one local directory, `root`. `url` is what people call the store."""

    setting = "OMNI_STORE"  # what to change when the disk is full

    def __init__(self, root: Path) -> None:
        self.root = root
        self.url = str(root)

    def directory(self, stage: str, key: str) -> Path:
        """Where the artifact of this stage and key is or will be."""
        return self.root / stage / key[:DIRECTORY_HEX]

    def uri(self, path: Path) -> str:
        """What others who use the store call a path below its root."""
        return str(path)

    @contextlib.contextmanager
    def local_lease(
        self,
        stage: str,
        key: str,
        purpose: str,
        waiting: Callable[[str], None] = lambda _: None,
        given_up: Callable[[], bool] = lambda: False,
    ) -> Iterator[KernelLease]:
        """Hold a directory among the processes of this machine; arguments as for `lease`."""
        lease = KernelLease(self.root / ".locks" / f"{stage}-{key[:DIRECTORY_HEX]}")
        try:
            wait_for(lease, purpose, waiting, given_up, POLL_S)
            yield lease
        finally:
            lease.release()

    @contextlib.contextmanager
    def lease(
        self,
        stage: str,
        key: str,
        purpose: str,
        waiting: Callable[[str], None],
        given_up: Callable[[], bool] = lambda: False,
    ) -> Iterator[Lease]:
        """Hold the right to write one artifact; while another process has it, wait.

        Args:
            purpose: what to tell others who wait.
            waiting: called once with the holder, in words, when it has to wait.
            given_up: asked while it waits; True ends the wait with InterruptedError.
        """
        with self.local_lease(stage, key, purpose, waiting, given_up) as lease:
            yield lease

    def require_space(self, needed_bytes: int = MIN_FREE_BYTES) -> None:
        """Refuse to start work that the disk cannot hold.

        Raises:
            BadInput: fewer bytes are free; by default 200 MiB.
        """
        free = shutil.disk_usage(self.root).free
        if free < needed_bytes:
            raise BadInput(
                f"{self.root} has {free // 2**20} MiB left where {needed_bytes // 2**20} are needed; "
                f"free some or set {self.setting}"
            )

    def artifacts(self, stage: str) -> list[Path]:
        """The directory of every finished artifact of a stage, newest first."""
        return finished(self.root / stage)

    def manifests(self, stage: str) -> list[Manifest]:
        """The manifests of a stage that this version can read, newest first."""
        readable = []
        for directory in self.artifacts(stage):
            with contextlib.suppress(BadInput):
                readable.append(Manifest.read(directory))
        return readable

    def find(self, stage: str, key: str) -> Manifest | None:
        """The manifest of a finished artifact, its payload whole or damaged, or None.

        Raises:
            BadInput: the directory belongs to another key or an unknown schema.
        """
        directory = self.directory(stage, key)
        try:
            manifest = Manifest.read(directory)
        except (FileNotFoundError, DamagedManifest):
            return None
        if manifest.key != key:
            raise BadInput(
                f"{directory / MANIFEST} is about key {manifest.key[:8]}, not {key[:8]}; delete {directory}"
            )
        return manifest

    def damages(self, directory: Path, manifest: Manifest, *, trust: bool) -> list[Damage]:
        """Every payload file of an artifact that is missing or changed; see the function of this name."""
        return damages(directory, manifest, trust=trust)

    def fetch(self, stage: str, key: str, given_up: Callable[[], bool] = lambda: False) -> None:
        """Have a finished artifact's payload in its directory, every byte as it was made.

        Args:
            given_up: asked between files; True ends it with InterruptedError.
        """

    def clear(self, directory: Path) -> None:
        """Ready an artifact's directory for an attempt: no manifest, an empty `out/`, `partial/` kept."""
        (directory / MANIFEST).unlink(missing_ok=True)
        (directory / CHECKED).unlink(missing_ok=True)
        shutil.rmtree(directory / "out", ignore_errors=True)
        (directory / "out").mkdir(parents=True)
        if not (directory / "partial").exists():  # nothing to continue: the curves begin anew
            (directory / "partial").mkdir()
            (directory / "metrics.jsonl").unlink(missing_ok=True)

    def publish(self, manifest: Manifest, lease: Lease, given_up: Callable[[], bool] = lambda: False) -> None:
        """Let others have an artifact that has just been sealed; the manifest last.

        Args:
            given_up: asked between files; True ends it with InterruptedError.

        Raises:
            RuntimeError: the lease was lost, so that the artifact may be another's by now.
        """

    def announce(self, run: Path) -> None:
        """Make `latest` a link to the directory of a recorded run, in one step."""
        link = self.root / "latest"
        temporary = self.root / f".latest-{os.getpid()}"
        temporary.unlink(missing_ok=True)
        temporary.symlink_to(run.relative_to(self.root))
        os.replace(temporary, link)


def finished(stage_directory: Path) -> list[Path]:
    """The directory of every finished artifact of one stage, newest first."""
    found = list(stage_directory.glob(f"*/{MANIFEST}"))
    found.sort(key=lambda path: path.stat().st_mtime_ns, reverse=True)
    return [path.parent for path in found]


def damages(directory: Path, manifest: Manifest, *, trust: bool) -> list[Damage]:
    """Every payload file that is missing or changed.

    Args:
        trust: skip hashing files whose (size, mtime, ctime, inode) are those of their last good hash.
    """
    checked: dict[str, list[int]] = {}
    if trust:
        with contextlib.suppress(FileNotFoundError, ValueError):
            checked = json.loads((directory / CHECKED).read_text())
    found, stats = [], {}
    for file in manifest.files:
        path = directory / "out" / file.path
        try:
            stat = _stat(path)
        except FileNotFoundError:
            found.append(Damage(str(path), "missing"))
            continue
        if stat[0] != file.size:
            found.append(Damage(str(path), f"{stat[0]} bytes instead of {file.size}"))
        elif checked.get(file.path) != stat and sha256_file(path) != file.sha256:
            found.append(Damage(str(path), "its bytes have changed"))
        else:
            stats[file.path] = stat
    if found:
        (directory / CHECKED).unlink(missing_ok=True)
    elif stats != checked:
        with contextlib.suppress(OSError):  # a read-only store is still a readable one
            write_atomically(directory / CHECKED, json.dumps(stats))
    return found


def remember(directory: Path, manifest: Manifest) -> None:
    """Note the stat of a payload that has just been hashed, so that the next look need not hash it again."""
    stats = {file.path: _stat(directory / "out" / file.path) for file in manifest.files}
    write_atomically(directory / CHECKED, json.dumps(stats))


def _stat(path: Path) -> list[int]:
    stat = path.stat()
    return [stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns, stat.st_ino]
