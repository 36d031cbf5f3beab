"""The right to write one artifact: held by one process at a time, and by nobody once that process is dead.

On one machine the kernel keeps it (flock). Between machines an object in a bucket stands for it: whoever
creates it with `If-None-Match: *` has it, renews it with `If-Match`, and deletes it in the end. An object
that was not renewed for as long as its holder promised may be replaced, again by `If-Match`, so that of two
who try one is refused. Its age is told by the bucket's clock, never by two machines' clocks.
"""

import contextlib
import fcntl
import json
import os
import socket
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from omni_model.config import BadInput

BOOT_ID = Path("/proc/sys/kernel/random/boot_id")


class Lease(Protocol):
    """The right to write one artifact, held until `release` or until every process that has it is dead."""

    def try_acquire(self, purpose: str) -> bool:
        """Take it if it is free; `purpose` is what others who wait are told."""

    def holder(self) -> str:
        """Who holds it, in words."""

    def fileno(self) -> int:
        """A descriptor a child process inherits, so that an orphan keeps its directory to itself."""

    def is_held(self) -> bool:
        """Whether it is still held, as far as this process knows."""

    def renew(self) -> bool:
        """Whether it is still held, by a look at what decides it; once False, another may have it."""

    def release(self) -> None:
        """Give the right back."""


def wait_for(
    lease: Lease, purpose: str, waiting: Callable[[str], None], given_up: Callable[[], bool], poll_s: float
) -> None:
    """Acquire a lease, however long that takes.

    Args:
        waiting: called once with the holder, in words, when it has to wait.
        given_up: asked while it waits; True ends the wait with InterruptedError.
    """
    told = False
    while not lease.try_acquire(purpose):
        if not told:
            waiting(lease.holder())
            told = True
        if given_up():
            raise InterruptedError(f"{purpose} was given up while it waited")
        time.sleep(poll_s)


def _describe(purpose: str) -> dict[str, Any]:
    return {"pid": os.getpid(), "host": socket.gethostname(), "purpose": purpose, "since": time.time()}


def _in_words(text: str | bytes) -> str:
    try:
        found = json.loads(text)
        since = time.strftime("%H:%M:%S", time.localtime(found["since"]))
        return f"process {found['pid']} on {found['host']} ({found['purpose']}, since {since})"
    except (ValueError, KeyError, TypeError):
        return "another process"


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
        os.ftruncate(self._descriptor, 0)
        os.pwrite(self._descriptor, json.dumps(_describe(purpose)).encode(), 0)
        return True

    def holder(self) -> str:
        """Who holds it, in words."""
        try:
            return _in_words(self._path.read_text())
        except OSError:
            return "another process"

    def identity(self) -> str:
        """Equal for two leases only if they exclude each other by one kernel's lock; or empty."""
        try:
            boot = BOOT_ID.read_text().strip()
        except OSError:
            return ""
        stat = os.fstat(self._descriptor)
        return f"{boot}:{stat.st_dev}:{stat.st_ino}"

    def fileno(self) -> int:
        return self._descriptor

    def is_held(self) -> bool:
        """True: the kernel gives it to nobody else while a holder lives."""
        return True

    def renew(self) -> bool:
        """True, as above."""
        return True

    def release(self) -> None:
        os.close(self._descriptor)


@dataclass(frozen=True)
class Content:
    """An object as it was read: bytes, ETag, and seconds since it was written, by the bucket's clock."""

    body: bytes
    etag: str
    age_s: float


class Objects(Protocol):
    """What a lease asks of a bucket. A refused condition is an answer, not an error."""

    def get(self, name: str) -> Content | None:
        """The object, or None."""

    def put(self, name: str, body: bytes, *, if_absent: bool = False, if_match: str = "") -> str | None:
        """Write the object and return its ETag, or None where the condition does not hold."""

    def delete(self, name: str, *, if_match: str = "") -> None:
        """Delete the object if it is still the one with this ETag."""


class ObjectLease:
    """A lease by conditional writes of one object, renewed by a thread. Its holder has the kernel's too.

    Args:
        name: of the object.
        kernel: the lease of this machine, already held.
        lease_s: after how many seconds without renewal another may take it.
    """

    def __init__(self, objects: Objects, name: str, kernel: KernelLease, lease_s: float) -> None:
        self._objects = objects
        self._name = name
        self._kernel = kernel
        self._lease_s = lease_s
        self._token = os.urandom(16).hex()  # tells our own object when the answer to a write was lost
        self._body = b""
        self._etag = ""  # empty while it is not ours
        self._mutex = threading.Lock()
        self._released = threading.Event()
        self._seen: Content | None = None

    def try_acquire(self, purpose: str) -> bool:
        """Take the lease if it is free, over, or left by a dead process of this machine.

        Raises:
            BadInput: the bucket ignores conditions, so that nothing could be held.
        """
        terms = {"token": self._token, "lease_s": self._lease_s, "flock": self._kernel.identity()}
        self._body = self._body or json.dumps(_describe(purpose) | terms).encode()
        etag = self._objects.put(self._name, self._body, if_absent=True)
        if etag is None:
            self._seen = self._objects.get(self._name)
            if self._seen is not None and self._is_ours(self._seen):
                etag = self._seen.etag
            elif self._seen is not None and self._is_over(self._seen):
                etag = self._objects.put(self._name, self._body, if_match=self._seen.etag)
        if etag is None:
            return False
        if self._objects.put(self._name, self._body, if_absent=True) is not None:
            raise BadInput(
                f"the bucket ignores If-None-Match, so that two machines could write {self._name} at once; "
                "use one that honours conditional writes"
            )
        self._etag = etag
        threading.Thread(target=self._keep, daemon=True, name=f"renew {self._name}").start()
        return True

    def _is_ours(self, found: Content) -> bool:
        return self._terms(found).get("token") == self._token

    def _is_over(self, found: Content) -> bool:
        terms = self._terms(found)
        ours = self._kernel.identity()
        if ours and terms.get("flock") == ours:  # its holder had this machine's lock, which we have now
            return True
        return found.age_s > float(terms.get("lease_s", self._lease_s))

    @staticmethod
    def _terms(found: Content) -> dict[str, Any]:
        try:
            return dict(json.loads(found.body))
        except (ValueError, TypeError):
            return {}

    def holder(self) -> str:
        """Who was found to hold it, in words."""
        return _in_words(self._seen.body) if self._seen else "another process"

    def fileno(self) -> int:
        return self._kernel.fileno()

    def _keep(self) -> None:
        while not self._released.wait(self._lease_s / 3):
            with contextlib.suppress(Exception):  # a bucket that does not answer now may do so in time
                if not self.renew():
                    return

    def is_held(self) -> bool:
        """Whether nobody was found to have replaced it."""
        return bool(self._etag)

    def renew(self) -> bool:
        """Write the object again, if nobody has replaced it. Late is not lost: only a successor ends it."""
        with self._mutex:
            if not self._etag:
                return False
            etag = self._objects.put(self._name, self._body, if_match=self._etag)
            if etag is None:  # replaced, or our last write got through and only its answer did not
                self._seen = self._objects.get(self._name)
                etag = self._seen.etag if self._seen and self._is_ours(self._seen) else ""
            self._etag = etag
            return bool(etag)

    def release(self) -> None:
        """Give it back if it is still ours. Where the bucket does not answer it ends by itself."""
        self._released.set()
        with contextlib.suppress(RuntimeError, BadInput):
            if self.renew():
                with self._mutex:
                    etag, self._etag = self._etag, ""
                    self._objects.delete(self._name, if_match=etag)
