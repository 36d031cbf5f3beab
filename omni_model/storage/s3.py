"""A store in an S3 bucket. The bucket is the truth; a directory of this machine, the *mirror*, is where
stages compute and what every function that takes a path sees.

Opening brings the manifests into the mirror and nothing else. A payload is fetched when a stage needs it and
sent when a stage has sealed it, the manifest last, so that in the bucket too an artifact without a manifest
is none. Who computes an artifact holds two leases: the kernel's on the mirror's directory, which its child
processes inherit, and an object's in `.locks/` for other machines. The mirror may be deleted at any time; all
that is lost with it is unfinished work (`partial/`), which other machines never see.

Standard library at import; `bucket.py` brings s3fs.
"""

import contextlib
import json
import os
import tempfile
import threading
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

from omni_model.artifacts import MANIFEST, Manifest, PayloadFile, list_payload, sha256_file, write_atomically
from omni_model.storage.bucket import Bucket, Listed, side_by_side
from omni_model.storage.lease import KernelLease, Lease, ObjectLease, wait_for
from omni_model.storage.local import MIN_FREE_BYTES, Damage, Store, damages, remember

NOTE = "remote.json"  # beside a manifest of the mirror: what is known of the bucket's
LATEST, RUNS = "latest", "runs"
BESIDE = ("log.txt", "metrics.jsonl")  # sent with a payload: nothing depends on them, people read them
LEASE_S = 60.0
DOWNLOADS = 3  # of one file, before its bytes are believed to be bad
MANY, FEW = 16, 4  # threads for manifests, for payload files


class S3Store(Store):
    """Artifacts in a bucket, computed and read in a mirror.

    Args:
        lease_s: for how long a killed holder can block other machines.

    Raises:
        BadInput: no credentials, no such bucket, no access, no answer.
    """

    setting = "OMNI_CACHE"

    def __init__(self, bucket: Bucket, mirror: Path, lease_s: float = LEASE_S) -> None:
        super().__init__(mirror)
        self._bucket = bucket
        self.url = bucket.url
        self._lease_s = lease_s
        self._objects: dict[str, Listed] = {}  # as last listed: by name relative to the prefix
        self._mutex = threading.Lock()
        self._look()
        self._bring_latest()

    def uri(self, path: Path) -> str:
        """The object's URL."""
        return f"{self.url}/{self._name(path)}"

    def _name(self, path: Path) -> str:
        return path.relative_to(self.root).as_posix()

    # --- what the bucket has ---------------------------------------------------------------------

    def _look(self, only: Path | None = None) -> None:
        """List the bucket, or one artifact in it, and have the mirror's manifests agree with it.

        Args:
            only: an artifact's directory whose lease is held; else directories in use are left alone.
        """
        below = f"{self._name(only)}/" if only else ""
        found = self._bucket.list(below)
        with self._mutex:
            kept = {name: it for name, it in self._objects.items() if not name.startswith(below)}
            self._objects = kept | found
        deep = (name for name in found if name.count("/") == 2 and not name.startswith("."))
        there = {self.root / name for name in deep if name.endswith(f"/{MANIFEST}")}
        here = {path.with_name(MANIFEST) for path in self.root.glob(f"*/*/{NOTE}")}
        known = [only] if only else [path.parent for path in sorted(there | here)]
        stale = [directory for directory in known if not self._agrees(directory)]
        side_by_side(self._agree if only else self._agree_if_idle, stale, MANY)

    def _agree_if_idle(self, directory: Path) -> None:
        lock = KernelLease(self.root / ".locks" / f"{directory.parent.name}-{directory.name}")
        try:
            if lock.try_acquire("reading its manifest"):
                self._agree(directory)
        finally:
            lock.release()

    def _agrees(self, directory: Path) -> bool:
        listed = self._objects.get(self._name(directory / MANIFEST))
        noted = _read_note(directory)["etag"]
        return (listed.etag if listed else "") == noted and (not noted or (directory / MANIFEST).exists())

    def _agree(self, directory: Path) -> None:
        """Bring one manifest, or drop one that has gone from the bucket. Its directory is ours for now."""
        name = self._name(directory / MANIFEST)
        content = self._bucket.get(name)
        if content is None:
            if (directory / NOTE).exists():  # what was never sent has no note: it is not dropped but sent
                (directory / MANIFEST).unlink(missing_ok=True)
                (directory / NOTE).unlink()
            return
        directory.mkdir(parents=True, exist_ok=True)
        _write_note(directory, content.etag, _read_note(directory)["bad"])
        write_atomically(directory / MANIFEST, content.body.decode(errors="replace"))
        if listed := self._objects.get(name):  # newest first means the same on every machine
            os.utime(directory / MANIFEST, (listed.modified_s, listed.modified_s))

    def _bring_latest(self) -> None:
        """Have `latest` in the mirror, with the record of the run that it names."""
        content = self._bucket.get(LATEST) if LATEST in self._objects else None
        below = f"{RUNS}/{content.body.decode(errors='replace').strip()}/" if content else "-"
        names = [name for name in self._objects if name.startswith(below) and name.count("/") == 2]
        for name in names:
            path, size = self.root / name, self._objects[name].size
            if not (path.exists() and _has_size(size, path)):
                self._bring(name, path, partial(_has_size, size))
        if names:
            super().announce((self.root / names[0]).parent)

    def artifacts(self, stage: str) -> list[Path]:
        """The mirror's directory of every artifact that the bucket has, newest first."""
        return [directory for directory in super().artifacts(stage) if (directory / NOTE).exists()]

    # --- whole or damaged ------------------------------------------------------------------------

    def damages(self, directory: Path, manifest: Manifest, *, trust: bool) -> list[Damage]:
        """Every payload file that the bucket lacks or holds changed.

        Args:
            trust: believe a listing that shows each file with its size, and not with an ETag whose bytes
                were found to be bad; else read and hash every object.
        """
        if not _read_note(directory)["etag"]:
            return [Damage(self.uri(directory / MANIFEST), "sealed here and not sent; the next run sends it")]
        found = []
        bad = _read_note(directory)["bad"]
        for file in manifest.files:
            path = directory / "out" / file.path
            if problem := _problem(file, self._objects.get(self._name(path)), bad.get(file.path)):
                found.append(Damage(self.uri(path), problem))
        return found if found or trust else self._read_all(directory, manifest)

    def _read_all(self, directory: Path, manifest: Manifest) -> list[Damage]:
        def is_bad(file: PayloadFile) -> bool:
            with tempfile.TemporaryDirectory(prefix=".verify-", dir=self.root) as scratch:
                name = self._name(directory / "out" / file.path)
                return not self._bring(name, Path(scratch) / "copy", partial(_holds, file))

        bad = _those(is_bad, manifest.files)
        self._note_bad(directory, bad)
        return [Damage(self.uri(directory / "out" / file.path), "its bytes have changed") for file in bad]

    def _note_bad(self, directory: Path, files: list[PayloadFile]) -> None:
        """Remember which objects not to believe any more: the next run makes their stage again."""
        listed = {file.path: self._objects.get(self._name(directory / "out" / file.path)) for file in files}
        bad = {path: it.etag for path, it in listed.items() if it}
        _write_note(directory, _read_note(directory)["etag"], bad)

    # --- leases ----------------------------------------------------------------------------------

    @contextlib.contextmanager
    def lease(
        self,
        stage: str,
        key: str,
        purpose: str,
        waiting: Callable[[str], None],
        given_up: Callable[[], bool] = lambda: False,
    ) -> Iterator[Lease]:
        """Hold the right to write one artifact, among all machines.

        Once it is held, the mirror knows what others made meanwhile, and what an earlier run sealed here and
        could not send has been sent.
        """
        with self.local_lease(stage, key, purpose, waiting, given_up) as kernel:
            directory = self.directory(stage, key)
            name = f".locks/{directory.parent.name}-{directory.name}"
            lease = ObjectLease(self._bucket, name, kernel, self._lease_s)
            try:
                wait_for(lease, purpose, waiting, given_up, poll_s=min(1.0, self._lease_s / 4))
                self._look(only=directory)
                self._send_left_over(stage, key, lease, given_up)
                yield lease
            finally:
                lease.release()

    def _send_left_over(self, stage: str, key: str, lease: Lease, given_up: Callable[[], bool]) -> None:
        directory, manifest = self.directory(stage, key), self.find(stage, key)
        if manifest is None or _read_note(directory)["etag"]:
            return
        if damages(directory, manifest, trust=True):
            (directory / MANIFEST).unlink()
        else:
            self.publish(manifest, lease, given_up)

    # --- payloads --------------------------------------------------------------------------------

    def fetch(self, stage: str, key: str, given_up: Callable[[], bool] = lambda: False) -> None:
        """Have a payload in the mirror, each file under its name only once its sha256 is the manifest's.

        Raises:
            RuntimeError: an object has gone, or its bytes stay wrong; the next run makes its stage again.
            BadInput: the disk is too small.
        """
        directory = self.directory(stage, key)
        with self.local_lease(stage, key, "fetching it", given_up=given_up):
            manifest = self.find(stage, key)
            if manifest is None:
                raise RuntimeError(f"{self.uri(directory)} has gone during the run; run again to make it")
            places = {damage.place for damage in damages(directory, manifest, trust=True)}
            wanted = [file for file in manifest.files if str(directory / "out" / file.path) in places]
            if not wanted:
                return
            self.require_space(sum(file.size for file in wanted) + MIN_FREE_BYTES)

            def is_bad(file: PayloadFile) -> bool:
                _end_if(given_up)
                path = directory / "out" / file.path
                return not self._bring(self._name(path), path, partial(_holds, file))

            bad = _those(is_bad, wanted)
            if bad:
                self._note_bad(directory, bad)
                place = self.uri(directory / "out" / bad[0].path)
                raise RuntimeError(f"{place} is missing or not what was made; run again to make it again")
            remember(directory, manifest)

    def _bring(self, name: str, path: Path, is_right: Callable[[Path], bool]) -> bool:
        """Put a listed object in place if it can be had as it should be; whether it could."""
        path.parent.mkdir(parents=True, exist_ok=True)
        part = path.with_name(f".{path.name}.{os.getpid()}.part")
        try:
            for _ in range(DOWNLOADS):
                if name not in self._objects or not self._bucket.download(name, part):
                    return False
                if is_right(part):
                    os.replace(part, path)
                    return True
            return False
        finally:
            part.unlink(missing_ok=True)

    def clear(self, directory: Path) -> None:
        """As for a local store; in the bucket the artifact is gone too, its manifest first."""
        if (name := self._name(directory / MANIFEST)) in self._objects:
            self._bucket.delete(name)
        super().clear(directory)
        (directory / NOTE).unlink(missing_ok=True)
        if payload := self._payload(directory):
            side_by_side(self._bucket.delete, payload, MANY)
        self._look(only=directory)

    def _payload(self, directory: Path) -> set[str]:
        return {name for name in self._objects if name.startswith(f"{self._name(directory)}/out/")}

    def publish(self, manifest: Manifest, lease: Lease, given_up: Callable[[], bool] = lambda: False) -> None:
        """Send an artifact that is sealed in the mirror: what the bucket lacks of it, then the manifest."""
        if not lease.renew():
            raise _lost(manifest)
        directory = self.directory(manifest.stage, manifest.key)
        there = self._payload(directory)
        wanted = {self._name(directory / "out" / file.path) for file in manifest.files}
        side_by_side(self._bucket.delete, there - wanted, MANY)

        def send(file: PayloadFile) -> None:
            _end_if(given_up)
            path = directory / "out" / file.path
            if self._name(path) in there and self._bucket.sha256(self._name(path)) == file.sha256:
                return  # an attempt that was killed had come so far
            if not lease.is_held():
                raise _lost(manifest)
            self._bucket.upload(path, self._name(path), file.sha256)

        side_by_side(send, manifest.files, FEW)
        for path in (directory / name for name in BESIDE):
            if path.exists():
                self._bucket.upload(path, self._name(path))
        if not lease.renew():
            raise _lost(manifest)
        name, body = self._name(directory / MANIFEST), (directory / MANIFEST).read_bytes()
        etag = self._bucket.put(name, body, if_absent=True)
        if etag is None:
            found = self._bucket.get(name)
            if found is None or found.body != body:
                raise _lost(manifest)
            etag = found.etag  # our own: the answer to the first try was lost
        _write_note(directory, etag, {})
        self._look(only=directory)

    def announce(self, run: Path) -> None:
        """Send a run's record and have `latest` name it, for everybody."""
        for path in (run / relative for relative in list_payload(run)):
            listed = self._objects.get(self._name(path))
            if listed is None or listed.size != path.stat().st_size:
                self._bucket.upload(path, self._name(path))
        self._bucket.put(LATEST, run.name.encode())
        super().announce(run)


def _those(is_so: Callable[[PayloadFile], bool], files: list[PayloadFile]) -> list[PayloadFile]:
    return [file for file, verdict in zip(files, side_by_side(is_so, files, FEW), strict=True) if verdict]


def _has_size(size: int, path: Path) -> bool:
    return path.stat().st_size == size


def _holds(file: PayloadFile, path: Path) -> bool:
    return _has_size(file.size, path) and sha256_file(path) == file.sha256


def _problem(file: PayloadFile, listed: Listed | None, bad_etag: str | None) -> str:
    if listed is None:
        return "missing"
    if listed.size != file.size:
        return f"{listed.size} bytes instead of {file.size}"
    return "its bytes have changed" if listed.etag == bad_etag else ""


def _read_note(directory: Path) -> dict:  # type: ignore[type-arg]
    """`etag` of the manifest in the bucket, empty where it was never sent; `bad`: path -> ETag."""
    with contextlib.suppress(FileNotFoundError, ValueError):
        note = json.loads((directory / NOTE).read_text())
        return {"etag": note["etag"], "bad": note["bad"]}
    return {"etag": "", "bad": {}}


def _write_note(directory: Path, etag: str, bad: dict[str, str]) -> None:
    write_atomically(directory / NOTE, json.dumps({"etag": etag, "bad": bad}))


def _end_if(given_up: Callable[[], bool]) -> None:
    if given_up():
        raise InterruptedError("the run was stopped; run again to continue")


def _lost(manifest: Manifest) -> RuntimeError:
    return RuntimeError(
        f"{manifest.stage} {manifest.key[:8]} was taken over by another machine while it was computed here; "
        "run again to use what is there"
    )
