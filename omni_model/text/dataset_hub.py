"""Parquet files of data sets from Hugging Face's servers: listed with their sha256, fetched side by side.

The first server whose listing can be used says what there is; every file may then come from any server, for
its sha256 tells whether it is the one. What a killed attempt has fetched is kept.
"""

import json
import re
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import CancelledError, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote

from omni_model.config import BadInput
from omni_model.downloads import fetch
from omni_model.telemetry import Metrics

DOWNLOADS = 4  # at a time
TIMEOUT_S = 20.0
RETRIES = 4  # of a file; a listing is asked for twice at most
PARTS = re.compile(r"(?P<split>\w+)-(?P<number>\d{5})-of-(?P<count>\d{5})\.parquet")
SHA256 = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True)
class HubFile:
    """One part of a split of a data set.

    Attributes:
        path: inside the repository.
        size: bytes.
    """

    repository: str
    path: str
    split: str
    number: int
    size: int
    sha256: str


def list_splits(
    repository: str, folder: str, splits: Sequence[str], servers: Sequence[str], scratch: Path
) -> list[HubFile]:
    """Every part `SPLIT-NNNNN-of-NNNNN.parquet` of some splits in a folder of a repository.

    Args:
        servers: addresses without a slash at the end, best first.
        scratch: a directory for the listing.

    Raises:
        BadInput: no server has a listing that holds them all; the sentence names each and why.
    """
    reasons = []
    for server in servers:
        try:
            return _list(server, repository, folder, splits, scratch)
        except BadInput as error:
            reasons.append(f"{server} ({error})")
    tried = "; ".join(reasons) or "there is no server to ask"
    raise BadInput(f"the data set {repository} could not be listed: {tried}; check the network and run again")


def _list(server: str, repository: str, folder: str, splits: Sequence[str], scratch: Path) -> list[HubFile]:
    path = scratch / f"listing-{repository.replace('/', '-')}-{folder}.json"
    path.unlink(missing_ok=True)
    url = f"{server}/api/datasets/{quote(repository)}/tree/main/{quote(folder)}"
    fetch([url], path, timeout_s=TIMEOUT_S, retries=1)
    try:
        files = [_read(each, repository) for each in json.loads(path.read_text()) if each["type"] == "file"]
    except (ValueError, KeyError, TypeError, AttributeError):
        raise BadInput("what it says about its files cannot be read") from None
    finally:
        path.unlink(missing_ok=True)
    found = []
    for split in splits:
        parts = sorted((file for file, _ in files if file.split == split), key=lambda file: file.number)
        counts = {count for file, count in files if file.split == split}
        if not parts or counts != {len(parts)}:
            raise BadInput(f"it lists {len(parts)} parts of {folder}/{split}, of {max(counts, default=1)}")
        found += parts
    return found


def _read(listed: dict[str, Any], repository: str) -> tuple[HubFile, int]:
    """A listed file, and of how many parts it is one; of other files the split is empty."""
    path, lfs = str(listed["path"]), listed.get("lfs") or {}
    name = PARTS.fullmatch(path.rpartition("/")[2])
    if name is None:
        return HubFile(repository, path, "", 0, 0, ""), 0
    sha256 = str(lfs.get("oid", ""))
    if not SHA256.fullmatch(sha256):
        raise ValueError(f"{path} has no sha256")
    size = int(lfs.get("size") or listed["size"])
    return HubFile(repository, path, name["split"], int(name["number"]), size, sha256), int(name["count"])


def fetch_files(
    wanted: Sequence[tuple[HubFile, Path]],
    servers: Sequence[str],
    metrics: Metrics,
    check: Callable[[Path], object],
) -> None:
    """Fetch files to their targets, DOWNLOADS at a time; `check` sees each as soon as it is whole.

    The first failure stops the others where they are.

    Raises:
        BadInput: no server has a file, or whatever `check` raises.
    """
    told = _Told(metrics, sum(file.size for file, _ in wanted))

    def bring(item: tuple[HubFile, Path]) -> None:
        file, target = item
        urls = [
            f"{each}/datasets/{quote(file.repository)}/resolve/main/{quote(file.path)}" for each in servers
        ]
        told(file, 0)
        try:
            fetch(
                urls,
                target,
                size=file.size,
                sha256=file.sha256,
                progress=lambda done, _: told(file, done),
                timeout_s=TIMEOUT_S,
                retries=RETRIES,
            )
            check(target)
        except BaseException:
            told.stopped = True
            raise
        told(file, file.size)

    with ThreadPoolExecutor(DOWNLOADS) as pool:
        pending = [pool.submit(bring, item) for item in wanted]
    failures = [error for each in pending if (error := each.exception())]
    for error in sorted(failures, key=lambda error: isinstance(error, CancelledError)):
        raise error


class _Told:
    """Bytes of all files together, as they come in; cancels whoever tells after a failure."""

    def __init__(self, metrics: Metrics, total: int) -> None:
        self.stopped = False
        self._metrics, self._total = metrics, total
        self._done: dict[HubFile, int] = {}
        self._lock = threading.Lock()

    def __call__(self, file: HubFile, done: int) -> None:
        if self.stopped:
            raise CancelledError
        with self._lock:
            self._done[file] = done
            self._metrics.log(sum(self._done.values()), self._total)
