"""Where artifacts live, who may write them, and whether their bytes are still those that were made.

Layout: `{store}/{stage}/{key[:32]}/` holds `out/` (payload), `partial/` (what survives a kill), `job.json`,
`log.txt`, `metrics.jsonl` and, last of all, `manifest.json`. `{store}/runs/{id}/` holds one run's summary and
report, `{store}/latest` links to the newest. Standard library only.

This is one of the two modules that read the environment (`OMNI_STORE`).
"""

import contextlib
import dataclasses
import errno
import fcntl
import json
import os
import shutil
import socket
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from omni_model import config
from omni_model.artifacts import (
    MANIFEST,
    Artifact,
    DamagedManifest,
    Manifest,
    sha256_file,
    write_atomically,
)
from omni_model.config import BadInput, Runtime
from omni_model.plain import from_plain, to_plain
from omni_model.telemetry import Metrics

DIRECTORY_HEX = 32  # of the key's 64: enough to never collide, short enough to read
CHECKED = "checked.json"  # the stat of each payload file when it was last hashed
POLL_S = 0.1
MIN_FREE_BYTES = 200 * 2**20


@dataclass(frozen=True)
class Workspace:
    """What a stage may touch: its artifact's directory, its seed and its metrics."""

    directory: Path
    seed: int
    metrics: Metrics

    @property
    def out(self) -> Path:
        """The payload; empty when an attempt starts."""
        return self.directory / "out"

    @property
    def partial(self) -> Path:
        """Checkpoints and finished shards; survives a kill, gone once the artifact is sealed."""
        return self.directory / "partial"


@dataclass(frozen=True)
class Job:
    """One attempt at one stage, as `job.json` carries it into the stage's own process."""

    stage: str
    key: str
    entrypoint: str
    handle: str
    components: dict[str, Any]
    recipe: Any
    inputs: tuple[Artifact, ...]
    seed: int
    runtime: Runtime
    directory: Path

    def write(self) -> Path:
        """Write `job.json` into the artifact's directory and return its path."""
        path = self.directory / "job.json"
        plain = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)} | {
            "recipe": {"type": type(self.recipe).__name__, "fields": to_plain(self.recipe)},
            "inputs": [handle.to_json() for handle in self.inputs],
            "runtime": to_plain(self.runtime),
            "directory": str(self.directory),
        }
        write_atomically(path, json.dumps(plain, sort_keys=True, indent=1))
        return path

    @classmethod
    def read(cls, path: Path) -> "Job":
        """Undo `write`."""
        plain = json.loads(path.read_text())
        recipe = plain.pop("recipe")
        return cls(
            recipe=from_plain(getattr(config, recipe["type"]), recipe["fields"]),
            inputs=tuple(Artifact.from_json(handle) for handle in plain.pop("inputs")),
            runtime=from_plain(Runtime, plain.pop("runtime")),
            directory=Path(plain.pop("directory")),
            **plain,
        )


@dataclass(frozen=True)
class Damage:
    """One payload file that is not what its manifest says."""

    path: Path
    problem: str

    def __str__(self) -> str:
        return f"{self.path}: {self.problem}"


class Lease(Protocol):
    """The right to write one artifact, held until `release` or until every process that has it is dead."""

    def fileno(self) -> int:
        """A descriptor a child process inherits, so that an orphan keeps its directory to itself."""

    def release(self) -> None:
        """Give the right back."""


class KernelLease:
    """A lease by flock: the kernel drops it with the last process that holds the descriptor."""

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self._path = path
        self._descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)

    def try_acquire(self, purpose: str) -> bool:
        """Take the lease if it is free, and write down who holds it."""
        try:
            fcntl.flock(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        holder = {"pid": os.getpid(), "host": socket.gethostname(), "purpose": purpose, "since": time.time()}
        os.ftruncate(self._descriptor, 0)
        os.pwrite(self._descriptor, json.dumps(holder).encode(), 0)
        return True

    def holder(self) -> str:
        """Who holds it, in words."""
        try:
            found = json.loads(self._path.read_text())
            since = time.strftime("%H:%M:%S", time.localtime(found["since"]))
            return f"process {found['pid']} on {found['host']} ({found['purpose']}, since {since})"
        except (OSError, ValueError, KeyError):
            return "another process"

    def fileno(self) -> int:
        return self._descriptor

    def release(self) -> None:
        os.close(self._descriptor)


class Store:
    """Artifacts below one local directory."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def directory(self, stage: str, key: str) -> Path:
        """Where the artifact of this stage and key is or will be."""
        return self.root / stage / key[:DIRECTORY_HEX]

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
        lease = KernelLease(self.root / ".locks" / f"{stage}-{key[:DIRECTORY_HEX]}")
        try:
            told = False
            while not lease.try_acquire(purpose):
                if not told:
                    waiting(lease.holder())
                    told = True
                if given_up():
                    raise InterruptedError(f"{stage} was given up while it waited")
                time.sleep(POLL_S)
            yield lease
        finally:
            lease.release()

    def require_space(self) -> None:
        """Refuse to start work that the disk cannot hold.

        Raises:
            BadInput: fewer than 200 MiB are free.
        """
        free = shutil.disk_usage(self.root).free
        if free < MIN_FREE_BYTES:
            raise BadInput(f"the store {self.root} has {free // 2**20} MiB left; free some or set OMNI_STORE")

    def artifacts(self, stage: str) -> list[Path]:
        """The directory of every finished artifact of a stage, newest first."""
        found = list((self.root / stage).glob(f"*/{MANIFEST}"))
        found.sort(key=lambda path: path.stat().st_mtime_ns, reverse=True)
        return [path.parent for path in found]

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

    def clear(self, directory: Path) -> None:
        """Ready an artifact's directory for an attempt: no manifest, an empty `out/`, `partial/` kept."""
        (directory / MANIFEST).unlink(missing_ok=True)
        (directory / CHECKED).unlink(missing_ok=True)
        shutil.rmtree(directory / "out", ignore_errors=True)
        (directory / "out").mkdir(parents=True)
        if not (directory / "partial").exists():  # nothing to continue: the curves begin anew
            (directory / "partial").mkdir()
            (directory / "metrics.jsonl").unlink(missing_ok=True)


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
            found.append(Damage(path, "missing"))
            continue
        if stat[0] != file.size:
            found.append(Damage(path, f"{stat[0]} bytes instead of {file.size}"))
        elif checked.get(file.path) != stat and sha256_file(path) != file.sha256:
            found.append(Damage(path, "its bytes have changed"))
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


def default_root() -> str:
    """`OMNI_STORE`, else `runs/` in the checkout that holds this package, else `runs/` here."""
    if chosen := os.environ.get("OMNI_STORE"):
        return chosen
    checkout = Path(__file__).resolve().parent.parent
    return str((checkout if (checkout / "pyproject.toml").exists() else Path.cwd()) / "runs")


@contextlib.contextmanager
def fresh_store(store: Store) -> Iterator[Store]:
    """An empty store inside another, deleted on success; after a failure its logs are worth reading."""
    scratch = Path(tempfile.mkdtemp(prefix="fresh-", dir=store.root))
    yield Store(scratch)
    shutil.rmtree(scratch)


def open_store(root: str) -> Store:
    """The store at `root`, made if it is new.

    Raises:
        BadInput: not a local path, not a directory, or not writable.
    """
    if "://" in root:
        raise BadInput(f"OMNI_STORE {root} is not a local directory; only local stores work in this version")
    path = Path(root).expanduser().absolute()
    try:
        path.mkdir(parents=True, exist_ok=True)
        probe = path / f".probe-{os.getpid()}"
        probe.touch()
        probe.unlink()
    except OSError as error:
        reason = "is full" if error.errno == errno.ENOSPC else f"cannot be written ({error.strerror})"
        raise BadInput(f"the store {path} {reason}; set OMNI_STORE to a directory you can write to") from None
    return Store(path)
