"""Where artifacts live: what a stage is given, how it is told, and which store is meant.

Layout: `{store}/{stage}/{key[:32]}/` holds `out/` (payload), `partial/` (what survives a kill), `job.json`,
`log.txt`, `metrics.jsonl` and, last of all, `manifest.json`. `{store}/runs/{id}/` holds one run's summary and
report, `{store}/latest` links to the newest. The store itself is in `local.py`, and for `s3://` in
`s3.py`. Standard library only.

This is one of the two modules that read the environment: `OMNI_STORE`, and for `s3://` `OMNI_CACHE`.
"""

import contextlib
import dataclasses
import errno
import hashlib
import json
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from omni_model import config
from omni_model.artifacts import Artifact, Manifest, write_atomically
from omni_model.config import BadInput, Runtime
from omni_model.plain import from_plain, to_plain
from omni_model.storage.local import Store as Store
from omni_model.storage.local import damages as damages
from omni_model.storage.local import finished as finished
from omni_model.telemetry import Metrics

SAME_MAKING = ("stage", "code", "packages", "seed")  # components of a key that kin share
CACHE = "nanochat-omni"  # directory of mirrors below the user's caches


@dataclass(frozen=True)
class Workspace:
    """What a stage may touch: its artifact's directory, its seed and its metrics.

    `components` is what the stage's key was made of; empty where nobody keyed it.
    """

    directory: Path
    seed: int
    metrics: Metrics
    components: Mapping[str, Any] = field(default_factory=dict)

    @property
    def out(self) -> Path:
        """The payload; empty when an attempt starts."""
        return self.directory / "out"

    @property
    def partial(self) -> Path:
        """Checkpoints and finished shards; survives a kill, gone once the artifact is sealed."""
        return self.directory / "partial"

    def deliver(self, name: str) -> None:
        """Make a finished file of `partial/` part of the payload.

        It stays in `partial/` too (one file with two names) until the artifact is sealed, so that a kill in
        between loses nothing. Where a disk cannot do that, it is moved.
        """
        try:
            os.link(self.partial / name, self.out / name)
        except OSError:
            os.replace(self.partial / name, self.out / name)

    def kin(self) -> list[Path]:
        """Payloads of finished artifacts made by the same stage, code, packages and seed, newest first.

        Only recipe and inputs may differ, so a part whose own recipe and inputs are equal is equal: a stage
        may copy it, once its bytes are verified, instead of making it again. An artifact whose files are not
        on this machine is left out.
        """
        if not self.components:
            return []
        found = []
        for directory in finished(self.directory.parent):
            with contextlib.suppress(BadInput, FileNotFoundError):
                theirs = Manifest.read(directory)
                same = all(theirs.components.get(name) == self.components.get(name) for name in SAME_MAKING)
                if same and all((directory / "out" / file.path).exists() for file in theirs.files):
                    found.append(directory / "out")
        return found


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


def default_root() -> str:
    """`OMNI_STORE`, else `runs/` in the checkout that holds this package, else `runs/` here."""
    if chosen := os.environ.get("OMNI_STORE"):
        return chosen
    checkout = Path(__file__).resolve().parents[2]
    return str((checkout if (checkout / "pyproject.toml").exists() else Path.cwd()) / "runs")


@contextlib.contextmanager
def fresh_store(store: Store) -> Iterator[Store]:
    """An empty store inside another, deleted on success; after a failure its logs are worth reading."""
    scratch = Path(tempfile.mkdtemp(prefix="fresh-", dir=store.root))
    yield Store(scratch)
    shutil.rmtree(scratch)


def open_store(root: str) -> Store:
    """The store at `root`, a directory, made if it is new, or `s3://bucket/prefix`.

    Raises:
        BadInput: it cannot be written or, on S3, reached.
    """
    if "://" not in root:
        return Store(_writable(Path(root).expanduser().absolute(), "OMNI_STORE"))
    scheme, _, rest = root.rstrip("/").partition("://")
    bucket, _, prefix = rest.partition("/")
    if scheme != "s3" or not bucket:
        raise BadInput(f"OMNI_STORE {root} is neither a directory nor s3://bucket/prefix")
    from omni_model.storage.bucket import Bucket
    from omni_model.storage.s3 import S3Store

    mirror = _writable(mirror_of(root.rstrip("/")), "OMNI_CACHE")
    return S3Store(Bucket(bucket, prefix), mirror)


def mirror_of(url: str) -> Path:
    """The directory of this machine where a remote store's artifacts are computed and kept for use.

    Below `OMNI_CACHE`, else the user's caches; two endpoints with equal buckets have two mirrors.
    """
    caches = os.environ.get("XDG_CACHE_HOME")
    if not caches:
        caches = str(Path.home() / ("Library/Caches" if sys.platform == "darwin" else ".cache"))
    root = Path(os.environ.get("OMNI_CACHE") or Path(caches) / CACHE).expanduser().absolute()
    endpoint = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL") or ""
    bucket = url.partition("://")[2].partition("/")[0]
    return root / f"{bucket}-{hashlib.sha256(f'{endpoint} {url}'.encode()).hexdigest()[:12]}"


def _writable(path: Path, setting: str) -> Path:
    try:
        path.mkdir(parents=True, exist_ok=True)
        probe = path / f".probe-{os.getpid()}"
        probe.touch()
        probe.unlink()
    except OSError as error:
        reason = "is full" if error.errno == errno.ENOSPC else f"cannot be written ({error.strerror})"
        raise BadInput(f"the store {path} {reason}; set {setting} to a directory you can write to") from None
    return path
