"""One file from the network, whole or not at all.

A download goes to `<name>.part` beside its target and is renamed once its length and digest are right, so a
file that is in place is a good one. What was fetched before a kill or a broken line is kept: the next attempt
asks for the rest by Range, from the same server or, where a digest will tell, from another one. Servers that
ignore Range, changed files, short bodies and web pages in place of the file are all told apart.
Standard library only.
"""

import hashlib
import http.client
import json
import os
import re
import shutil
import socket
import ssl
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from http import HTTPStatus
from pathlib import Path
from typing import Any

from omni_model.artifacts import write_atomically
from omni_model.config import BadInput

CHUNK_BYTES = 1 << 20
TOLD_EVERY_S = 0.5
MAX_PAUSE_S = 30.0
TRY_AGAIN = (408, 425, 429)  # and everything from 500: the server says that it may do better later
PAGE_STARTS = (b"<!doctype html", b"<html")


@dataclass(frozen=True)
class Fetched:
    """A file that is whole.

    Attributes:
        url: where its last byte came from; empty where it was there already.
        md5: hex, or empty where none was expected.
        failures: `URL (reason)` of each server that was given up on the way.
    """

    path: Path
    url: str
    size: int
    sha256: str
    md5: str
    failures: tuple[str, ...] = ()


class DownloadFailed(BadInput):
    """No server had the file. `reasons` holds `URL (reason)` for each."""

    def __init__(self, name: str, reasons: Sequence[str]) -> None:
        tried = "; ".join(reasons) or "there is no server to ask"
        super().__init__(f"{name} could not be downloaded: {tried}; check the network and run again")
        self.reasons = tuple(reasons)


def fetch(
    urls: Sequence[str],
    target: Path,
    *,
    size: int = 0,
    sha256: str = "",
    md5: str = "",
    progress: Callable[[int, int], None] | None = None,
    timeout_s: float = 30.0,
    retries: int = 4,
    pause_s: float = 1.0,
) -> Fetched:
    """The file at `target`, from the first of the servers that has it whole.

    A target that is there already and is what is expected is left as it is. Without a digest, what an
    earlier attempt left behind is continued only while the server's ETag is the same.

    Args:
        urls: the same file at several servers, best first.
        size: bytes expected; 0 where nobody knows.
        sha256: hex digest expected, or empty; `md5` likewise.
        progress: told (bytes so far, bytes in all; 0 where the server does not say) twice a second.
        timeout_s: how long a server may be silent.
        retries: failures in a row without a byte gained before the next server is tried.
        pause_s: wait after the first failure; doubles with each, up to 30 s.

    Raises:
        DownloadFailed: no server had it; the sentence names each and why. What was fetched is kept.
        BadInput: a URL that is not http(s), or no room on the disk.
    """
    expected = _Expected(size, sha256.lower(), md5.lower())
    if target.exists():
        found = _measure(target, expected)
        if not expected.difference(found):
            return found
    target.parent.mkdir(parents=True, exist_ok=True)
    download = _Download(_Part(target), expected, progress, timeout_s, retries, pause_s)
    reasons: list[str] = []
    for url in urls:
        if not url.startswith(("http://", "https://")):
            raise BadInput(f"{url!r} is no address of a file; give one that begins with http:// or https://")
        if reason := download.complete(url):
            reasons.append(f"{url} ({reason})")
            continue
        found = _measure(download.part.path, expected)
        download.part.finish(target)
        return Fetched(target, url, found.size, found.sha256, found.md5, tuple(reasons))
    raise DownloadFailed(target.name, reasons)


def looks_like_page(start: bytes) -> bool:
    """Whether a file that begins so is a web page: a login, an error or a list, never what was asked for."""
    return start.removeprefix(b"\xef\xbb\xbf").lstrip()[:16].lower().startswith(PAGE_STARTS)


@dataclass(frozen=True)
class _Expected:
    size: int
    sha256: str
    md5: str

    @property
    def has_digest(self) -> bool:
        return bool(self.sha256 or self.md5)

    def difference(self, found: Fetched) -> str:
        """In what a file is not what was expected; empty where nothing speaks against it."""
        if self.size and found.size != self.size:
            return f"it has {found.size} bytes, not {self.size}"
        for name, want, have in (("sha256", self.sha256, found.sha256), ("md5", self.md5, found.md5)):
            if want and want != have:
                return f"its {name} is {have}, not {want}"
        return ""


def _measure(path: Path, expected: _Expected) -> Fetched:
    sha256, md5 = hashlib.sha256(), hashlib.md5(usedforsecurity=False)
    with path.open("rb") as file:
        while chunk := file.read(CHUNK_BYTES):
            sha256.update(chunk)
            if expected.md5:
                md5.update(chunk)
    return Fetched(path, "", path.stat().st_size, sha256.hexdigest(), md5.hexdigest() if expected.md5 else "")


class _Failed(Exception):
    """One request came to nothing; `again`: the same server may do better."""

    def __init__(self, reason: str, *, again: bool) -> None:
        super().__init__(reason)
        self.again = again


class _Part:
    """The unfinished file, and beside it which server its bytes are from."""

    def __init__(self, target: Path) -> None:
        self.path = target.with_name(f"{target.name}.part")
        self._note = target.with_name(f"{target.name}.part.json")
        self.url, self.etag, self.total = "", "", 0
        try:
            note = json.loads(self._note.read_text())
            self.url, self.etag, self.total = str(note["url"]), str(note["etag"]), int(note["total"])
        except (OSError, ValueError, KeyError, TypeError):
            pass  # bytes of unknown origin: worth something only where a digest will judge them

    @property
    def size(self) -> int:
        return self.path.stat().st_size if self.path.exists() else 0

    def begin(self, at: int, url: str, etag: str, total: int) -> None:
        """Keep the first `at` bytes; what follows comes from `url`."""
        self.path.touch()
        os.truncate(self.path, at)
        self.url, self.etag, self.total = url, etag, total
        write_atomically(self._note, json.dumps({"url": url, "etag": etag, "total": total}))

    def require_space(self, size: int) -> None:
        free = shutil.disk_usage(self.path.parent).free
        if size > free:
            raise BadInput(
                f"{self.path.name} needs {size >> 20} MiB more and {self.path.parent} has {free >> 20} left; "
                "make room and run again"
            )

    def discard(self) -> None:
        self.path.unlink(missing_ok=True)
        self._note.unlink(missing_ok=True)
        self.url, self.etag, self.total = "", "", 0

    def finish(self, target: Path) -> None:
        with self.path.open("rb") as file:
            os.fsync(file.fileno())
        os.replace(self.path, target)
        self._note.unlink(missing_ok=True)


@dataclass(frozen=True)
class _Download:
    """How to fill a part; see `fetch` for what the fields mean."""

    part: _Part
    expected: _Expected
    progress: Callable[[int, int], None] | None
    timeout_s: float
    retries: int
    pause_s: float

    def complete(self, url: str) -> str:
        """Fill the part from one server; returns why that failed, or nothing."""
        failures, furthest, begun_anew = 0, self.part.size, False
        while True:
            try:
                asked_from = self._transfer(url)
                reason = self.expected.difference(_measure(self.part.path, self.expected))
                if not reason:
                    return ""
                self.part.discard()
                # Bytes of another attempt may be at fault: this server gets one chance with its own alone.
                again = asked_from > 0 and not begun_anew
                begun_anew = True
            except _Failed as failure:
                reason, again = str(failure), failure.again
            failures = 0 if self.part.size > furthest else failures + 1
            furthest = max(furthest, self.part.size)
            if not again or failures > self.retries:
                return f"{reason}, {failures} times" if again and failures > 1 else reason
            time.sleep(min(self.pause_s * 2 ** max(failures - 1, 0), MAX_PAUSE_S))

    def _transfer(self, url: str) -> int:
        """One request for all that the part still lacks. Returns the byte it was asked from."""
        part, expected = self.part, self.expected
        offset = part.size if expected.has_digest or (part.etag and part.url == url) else 0
        if expected.size and offset == expected.size:  # killed between the last byte and the rename
            return offset
        if expected.size and offset > expected.size:
            part.discard()
            offset = 0
        with self._open(url, offset) as response:
            if response.status == HTTPStatus.REQUESTED_RANGE_NOT_SATISFIABLE:
                return offset  # nothing is missing
            begin, total = self._place(response, url, offset)
            first = self._read(response, begin, total)
            if response.headers.get_content_type() == "text/html" or (begin == 0 and looks_like_page(first)):
                raise _Failed("a web page came instead of the file", again=False)
            if expected.size and total and total != expected.size:
                raise _Failed(f"its file has {total} bytes, not {expected.size}", again=False)
            part.require_space((total or expected.size) - begin)
            part.begin(begin, url, response.headers.get("ETag", ""), total)
            self._pour(response, first, begin, total)
        return offset

    def _open(self, url: str, offset: int) -> Any:
        headers = {"User-Agent": "nanochat-omni", "Accept-Encoding": "identity"}
        if offset:
            headers["Range"] = f"bytes={offset}-"
            if self.part.url == url and self.part.etag.startswith('"'):  # a weak one may not be used here
                headers["If-Range"] = self.part.etag
        try:
            return urllib.request.urlopen(
                urllib.request.Request(url, headers=headers), timeout=self.timeout_s
            )
        except urllib.error.HTTPError as error:
            if error.code == HTTPStatus.REQUESTED_RANGE_NOT_SATISFIABLE and offset:
                if error.headers.get("Content-Range", "").strip() == f"bytes */{offset}":
                    return error
                self.part.discard()
                raise _Failed("its file is shorter than what was fetched before", again=True) from None
            error.close()
            again = error.code in TRY_AGAIN or error.code >= HTTPStatus.INTERNAL_SERVER_ERROR
            raise _Failed(f"HTTP {error.code}", again=again) from None
        except (OSError, http.client.HTTPException) as error:  # URLError is an OSError
            reason = error.reason if isinstance(error, urllib.error.URLError) else error
            raise _unreachable(reason, self.timeout_s) from None

    def _place(self, response: Any, url: str, offset: int) -> tuple[int, int]:
        """Where in the file the body begins, and how long the file is (0: unknown)."""
        part, etag = self.part, response.headers.get("ETag", "")
        begin, total = 0, response.length or 0
        if response.status == HTTPStatus.PARTIAL_CONTENT:
            told = response.headers.get("Content-Range", "").strip()
            found = re.fullmatch(r"bytes (\d+)-\d+/(\d+|\*)", told)
            begin, total = (int(found[1]), int(found[2].replace("*", "0"))) if found else (-1, 0)
            if begin != offset:
                part.discard()
                raise _Failed("another range was sent than was asked for", again=True)
            other_tag = part.url == url and part.etag and etag and part.etag != etag
            if other_tag or (total and part.total and total != part.total):
                part.discard()
                raise _Failed("its file is another one than before", again=True)
        return begin, total

    def _read(self, response: Any, done: int, total: int) -> bytes:
        so_far = f"{done} of {total} bytes" if total else f"{done} bytes"
        try:
            chunk: bytes = response.read1(CHUNK_BYTES)
        except TimeoutError:
            raise _Failed(f"silent for {self.timeout_s:g} s after {so_far}", again=True) from None
        except (OSError, http.client.HTTPException):
            raise _Failed(f"broke off after {so_far}", again=True) from None
        if not chunk and done < total:
            raise _Failed(f"broke off after {so_far}", again=True)
        return chunk

    def _pour(self, response: Any, chunk: bytes, done: int, total: int) -> None:
        told = 0.0
        with self.part.path.open("r+b") as file:
            file.seek(done)
            while chunk:
                try:
                    file.write(chunk)
                    file.flush()
                except OSError as error:
                    raise BadInput(
                        f"{self.part.path} cannot be written ({error.strerror}); make room and run again"
                    ) from None
                done += len(chunk)
                if self.progress and (time.monotonic() - told > TOLD_EVERY_S or done == total):
                    told = time.monotonic()
                    self.progress(done, total)
                chunk = self._read(response, done, total)


def _unreachable(reason: BaseException | str, timeout_s: float) -> _Failed:
    if isinstance(reason, TimeoutError):
        return _Failed(f"no answer in {timeout_s:g} s", again=True)
    if isinstance(reason, socket.gaierror):
        return _Failed("no such host can be found", again=False)
    if isinstance(reason, ConnectionRefusedError):
        return _Failed("nobody answers there", again=False)
    if isinstance(reason, ssl.SSLCertVerificationError):
        return _Failed(f"its certificate is not valid: {reason.verify_message}", again=False)
    told = reason.strerror if isinstance(reason, OSError) and reason.strerror else str(reason)
    return _Failed(f"the connection failed: {told or type(reason).__name__}", again=True)
