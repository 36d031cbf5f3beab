"""ClimbMix: web text that others filtered, mixed and shuffled, as 6543 parquet files of about 100 MB.

Diao and others 2025, "CLIMB: clustering-based iterative data mixture bootstrapping", arXiv 2504.13161; the
files are those of the data set `karpathy/climbmix-400b-shuffle` at Hugging Face. The first ones are read for
training and the last one for validation, whatever their number, so that scores of all depths compare.

Large files at Hugging Face are known by their sha256, which its servers tell before the first byte. It is
pinned when a file is first used; another file under the same name is refused from then on. Where no server
tells, a file must at least be whole parquet with a column of strings.
"""

import contextlib
import http.client
import json
import re
import shutil
import threading
import time
import urllib.error
import urllib.request
from concurrent.futures import CancelledError, ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from http import HTTPStatus
from pathlib import Path
from typing import Any
from urllib.parse import urljoin, urlsplit

from omni_model import hardware
from omni_model.artifacts import sha256_file, write_atomically
from omni_model.config import JSON, BadInput, ClimbMixRecipe, Runtime
from omni_model.downloads import DownloadFailed, fetch
from omni_model.storage import Workspace
from omni_model.text.corpus import BadShard, check_shard

DATASET = "karpathy/climbmix-400b-shuffle"
LAST_SHARD = 6542  # the one for validation
TYPICAL_BYTES = 93_000_000  # of a file whose size nobody has told yet
LOCK = "shards.lock.json"  # file -> sha256, beside the artifacts of this stage
CONNECTIONS = 4
TIMEOUT_S = 30.0
RETRIES = 3
PAUSE_S = 1.0
TOLD_EVERY_S = 1.0
MAX_REDIRECTS = 3
SHA256 = re.compile(r"[0-9a-f]{64}")


def fetch_climbmix(recipe: ClimbMixRecipe, *, work: Workspace, runtime: Runtime) -> dict[str, JSON]:
    """Stage: the first `num_shards` files for training and the last one for validation.

    Files are taken from earlier artifacts of this stage where those have them, else fetched, several at once,
    from the Hugging Face servers of `hardware.network`, best first. What was fetched before a kill is kept.

    Raises:
        BadInput: no or too many shards, or a file that no server has as it should be; the sentence names each
            attempt.
    """
    if not 0 < recipe.num_shards <= LAST_SHARD:
        raise BadInput(
            f"climbmix.num_shards is {recipe.num_shards}; give 1 to {LAST_SHARD}, or leave it to the depth"
        )
    shards = {f"train-{n:05d}.parquet": _published(n) for n in range(recipe.num_shards)}
    shards["validation-00000.parquet"] = _published(LAST_SHARD)
    sources = _Sources(work, _Pins(work.directory.parent / LOCK), _Progress(work, len(shards)))
    documents = 0
    with ThreadPoolExecutor(CONNECTIONS) as pool:
        try:
            for done in as_completed([pool.submit(sources.bring, *each) for each in shards.items()]):
                documents += done.result()
        except BaseException:
            sources.progress.stopped = True  # what the other threads have so far is kept
            pool.shutdown(cancel_futures=True)
            raise
    for name in shards:
        work.deliver(name)
    num_bytes = sum(path.stat().st_size for path in work.out.iterdir())
    work.metrics.summary(num_documents=documents, megabytes=round(num_bytes / 1e6, 1), shards=len(shards))
    return {"num_documents": documents, "num_bytes": num_bytes}


def _published(number: int) -> str:
    return f"shard_{number:05d}.parquet"


class _Pins:
    """The sha256 that each file had when it was first used."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._lock = threading.Lock()
        self._known = self._read()

    def _read(self) -> dict[str, str]:
        try:
            return dict(json.loads(self.path.read_text()))
        except FileNotFoundError:
            return {}
        except (ValueError, TypeError):
            raise BadInput(f"{self.path} cannot be read; delete it to have the shards pinned anew") from None

    def get(self, shard: str) -> str:
        return self._known.get(shard, "")

    def add(self, shard: str, sha256: str) -> None:
        with self._lock:
            if self._known.get(shard) != sha256:
                self._known = {**self._read(), shard: sha256}  # another run may have added to it
                write_atomically(self.path, json.dumps(self._known, indent=1, sort_keys=True) + "\n")


class _Progress:
    """Bytes of all files together, told about once a second; cancels whoever tells once it is stopped."""

    stopped = False

    def __init__(self, work: Workspace, num_shards: int) -> None:
        self._work, self._num_shards = work, num_shards
        self._lock, self._told = threading.Lock(), 0.0
        self._files: dict[str, tuple[int, int]] = {}

    def tell(self, shard: str, done: int, total: int) -> None:
        if self.stopped:
            raise CancelledError
        with self._lock:
            self._files[shard] = (done, total or max(done, TYPICAL_BYTES))
            if time.monotonic() - self._told < TOLD_EVERY_S:
                return
            self._told = time.monotonic()
            unseen = self._num_shards - len(self._files)
            totals = sum(total for _, total in self._files.values())
            expected = totals + unseen * (totals // len(self._files))
            self._work.metrics.log(sum(done for done, _ in self._files.values()), expected)


@dataclass(frozen=True)
class Told:
    """What a server says about a file before it sends it; empty and 0 where it says nothing."""

    sha256: str = ""
    size: int = 0


class _Sources:
    """Where files come from: what is here already, earlier artifacts, servers."""

    def __init__(self, work: Workspace, pins: _Pins, progress: _Progress) -> None:
        network = hardware.network()
        self.work, self.pins, self.progress = work, pins, progress
        self._kin = work.kin()
        self._servers = [] if network.offline else list(network.hugging_face)
        self._lock = threading.Lock()

    def bring(self, name: str, shard: str) -> int:
        """Have a published file in `partial/` under the name of the payload; returns its documents."""
        target, pinned = self.work.partial / name, self.pins.get(shard)
        if pinned and not target.exists():
            self._copy(target, pinned)
        if target.exists():
            sha256 = sha256_file(target)
            if pinned in ("", sha256):
                with contextlib.suppress(BadInput):
                    return self._accept(target, shard, sha256)
            target.unlink(missing_ok=True)
        return self._fetch(target, shard, pinned)

    def _copy(self, target: Path, pinned: str) -> None:
        """Take a file from an earlier artifact: as a copy, for one file in two would be damaged in both."""
        copied = target.with_name(f"{target.name}.copy")
        for found in (directory / target.name for directory in self._kin):
            if found.exists() and sha256_file(found) == pinned:
                shutil.copyfile(found, copied)
                copied.replace(target)
                return

    def _accept(self, target: Path, shard: str, sha256: str) -> int:
        documents = check_shard(target)
        self.pins.add(shard, sha256)
        size = target.stat().st_size
        self.progress.tell(shard, size, size)
        return documents

    def _fetch(self, target: Path, shard: str, pinned: str) -> int:
        reasons = [] if self._servers else ["nobody was asked, because OMNI_OFFLINE or HF_HUB_OFFLINE is set"]
        claimed = ""  # by a server before, for one that says nothing itself
        for server in tuple(self._servers):
            url = f"{server}/datasets/{DATASET}/resolve/main/{shard}"
            told = ask(url)
            if pinned and told.sha256 not in ("", pinned):
                wrong = f"its sha256 is {told.sha256}, not {pinned}, to which {self.pins.path} pins it"
                reasons.append(f"{url} ({wrong})")
                continue
            claimed = told.sha256 or claimed
            try:
                found = self._download(url, target, shard, pinned or claimed, told.size)
                return self._accept(target, shard, found)
            except DownloadFailed as failed:
                reasons += failed.reasons
            except BadShard as failed:
                target.unlink()
                reasons.append(f"{url} ({failed.reason})")
            self._demote(server)
        raise DownloadFailed(f"{shard} of {DATASET}", reasons)

    def _download(self, url: str, target: Path, shard: str, sha256: str, size: int) -> str:
        """Fetch from one server; returns the sha256 of what came."""
        fetched = fetch(
            [url],
            target,
            size=size,
            sha256=sha256,
            progress=lambda done, total: self.progress.tell(shard, done, total),
            timeout_s=TIMEOUT_S,
            retries=RETRIES,
            pause_s=PAUSE_S,
        )
        return fetched.sha256

    def _demote(self, server: str) -> None:
        """Ask a server that failed last for the files to come."""
        with self._lock:
            self._servers.sort(key=lambda each: each == server)


class _Stay(urllib.request.HTTPRedirectHandler):
    """What a hub knows of a file is in its own answer, not in that of the storage it points to."""

    def redirect_request(self, *args: Any) -> None:
        return None


def ask(url: str) -> Told:
    """What a Hugging Face server says about a large file, without fetching it.

    Nothing where it cannot be reached or says nothing: why, the download will tell.
    """
    opener = urllib.request.build_opener(_Stay)
    for _ in range(MAX_REDIRECTS):
        request = urllib.request.Request(url, method="HEAD", headers={"User-Agent": "nanochat-omni"})
        try:
            with opener.open(request, timeout=TIMEOUT_S) as response:
                headers = response.headers
        except urllib.error.HTTPError as error:
            headers = error.headers
            error.close()
            if error.code >= HTTPStatus.BAD_REQUEST:
                return Told()
        except (OSError, http.client.HTTPException):
            return Told()
        sha256 = (headers.get("X-Linked-ETag") or "").removeprefix("W/").strip('"').lower()
        if SHA256.fullmatch(sha256):
            size = headers.get("X-Linked-Size") or ""
            return Told(sha256, int(size) if size.isdigit() else 0)
        moved = urljoin(url, headers.get("Location") or url)
        if moved == url or urlsplit(moved).netloc != urlsplit(url).netloc:
            return Told()
        url = moved
    return Told()
