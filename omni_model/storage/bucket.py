"""A prefix of an S3 bucket: list, read, write on a condition, move whole files; patient, within bounds.

Names are relative to the prefix. Every call is tried again within bounds where trying may help: botocore
does so for each request (HTTP 500, 503, time-outs, refused connections), and this module for what botocore
cannot see, such as a body that broke off. What a person can put right is a BadInput, a bucket that answered
before and keeps failing a RuntimeError. Standard library at import; s3fs, and botocore with it, inside.
"""

import contextlib
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from omni_model.config import BadInput
from omni_model.storage.lease import Content

T = TypeVar("T")

CONNECT_S, SILENCE_S = 5.0, 15.0
TRIES_OF_A_REQUEST = 3  # botocore's
TRIES_OF_A_CALL = 4  # ours, around them
FIRST_PAUSE_S = 0.5
PART_BYTES = 16 * 2**20  # of an upload in parts; four at once bound its memory
PARTS_AT_ONCE = 4
CONNECTIONS = 32
SHA256 = "sha256"  # metadata of an uploaded file

MAY_BE_REFUSED = {"get_object", "put_object", "delete_object", "head_object"}
REFUSED = {"PreconditionFailed", "412", "ConditionalRequestConflict", "409", "NoSuchKey", "404"}
TRY_AGAIN = {
    *("RequestTimeout", "OperationAborted", "NoSuchUpload"),
    *("BadDigest", "IncompleteBody", "XAmzContentSHA256Mismatch"),
}
# Errors of botocore by name, because it is not imported before it is needed.
NO_CREDENTIALS = {
    *("NoCredentialsError", "PartialCredentialsError", "CredentialRetrievalError"),
    *("ProfileNotFound", "TokenRetrievalError", "UnauthorizedSSOTokenError", "SSOTokenLoadError"),
}
NO_ANSWER = {
    *("EndpointConnectionError", "ConnectTimeoutError", "ReadTimeoutError", "ProxyConnectionError"),
    *("SSLError", "ConnectionClosedError"),
}
NOT_SET_UP = {"ParamValidationError", "NoRegionError", "InvalidRegionError", "ValueError"}
BAD_BODY = "FlexibleChecksumError"  # the bytes are not those whose checksum S3 keeps
REMOTE = {"botocore", "aiobotocore", "aiohttp", "fsspec", "s3fs", "urllib3"}


@dataclass(frozen=True)
class Listed:
    """An object as a listing shows it: bytes, ETag, and when it was written (Unix time)."""

    size: int
    etag: str
    modified_s: float


class Bucket:
    """The objects below `prefix` of one bucket.

    Args:
        timeout_s: how long a request may be silent.
    """

    def __init__(self, name: str, prefix: str, timeout_s: float = SILENCE_S) -> None:
        self.name = name
        self.prefix = f"{prefix}/" if prefix else ""
        self.url = f"s3://{name}/{prefix}".rstrip("/")
        self._answered = False
        try:
            import s3fs
        except ImportError:
            raise BadInput(f"{self.url} needs the package s3fs, which is missing; run make setup") from None
        self._files = s3fs.S3FileSystem(
            skip_instance_cache=True,
            use_listings_cache=False,
            config_kwargs={
                "retries": {"mode": "standard", "max_attempts": TRIES_OF_A_REQUEST},
                "connect_timeout": CONNECT_S,
                "read_timeout": timeout_s,
                "max_pool_connections": CONNECTIONS,
            },
        )
        self._files.retries = 2  # s3fs' own, around botocore's: one more suffices, ours come on top

    # --- objects as bytes ------------------------------------------------------------------------

    def list(self, below: str = "") -> dict[str, Listed]:
        """Every object whose name starts with `below` and can be that of a file."""
        found: dict[str, Listed] = {}
        more: dict[str, Any] = {}
        while True:
            page = self._call("list_objects_v2", Prefix=self.prefix + below, **more)
            for item in page.get("Contents", ()):
                name = item["Key"].removeprefix(self.prefix)
                if {"", ".", ".."} & set(name.split("/")):  # such a name could lead out of a directory
                    continue
                found[name] = Listed(item["Size"], item["ETag"].strip('"'), item["LastModified"].timestamp())
            if not page.get("IsTruncated"):
                return found
            more = {"ContinuationToken": page["NextContinuationToken"]}

    def get(self, name: str) -> Content | None:
        """A small object, or None."""
        from fsspec.asyn import sync

        async def read() -> tuple[dict[str, Any], bytes]:
            answer = await self._files._call_s3("get_object", Bucket=self.name, Key=self.prefix + name)
            async with answer["Body"] as body:
                return answer, await body.read()

        with contextlib.suppress(_Refused):
            answer, body = self._patiently("get_object", lambda: sync(self._files.loop, read))
            return Content(body, answer["ETag"].strip('"'), _age_s(answer))
        return None

    def put(self, name: str, body: bytes, *, if_absent: bool = False, if_match: str = "") -> str | None:
        """Write a small object and return its ETag, or None where the condition does not hold.

        A write that is tried again because its answer was lost may find itself, and be refused.
        """
        terms = {"IfNoneMatch": "*"} if if_absent else {"IfMatch": f'"{if_match}"'} if if_match else {}
        with contextlib.suppress(_Refused):
            answer = self._call("put_object", Key=self.prefix + name, Body=body, **terms)
            return str(answer["ETag"]).strip('"')
        return None

    def delete(self, name: str, *, if_match: str = "") -> None:
        """Delete an object; one that is gone, or with `if_match` is another, is left as it is."""
        terms = {"IfMatch": f'"{if_match}"'} if if_match else {}
        with contextlib.suppress(_Refused):
            self._call("delete_object", Key=self.prefix + name, **terms)

    def sha256(self, name: str) -> str | None:
        """The sha256 that an uploaded file was sent with, empty if it had none; None if it is not there."""
        with contextlib.suppress(_Refused):
            answer = self._call("head_object", Key=self.prefix + name)
            return str(answer["Metadata"].get(SHA256, ""))
        return None

    # --- objects as files ------------------------------------------------------------------------

    def upload(self, path: Path, name: str, sha256: str = "") -> None:
        """Send a file, large ones in parts; the object appears when it is whole."""
        key = f"{self.name}/{self.prefix}{name}"
        terms = {"Metadata": {SHA256: sha256}} if sha256 else {}
        self._patiently(
            "upload",
            lambda: self._files.put_file(
                str(path), key, chunksize=PART_BYTES, max_concurrency=PARTS_AT_ONCE, **terms
            ),
        )

    def download(self, name: str, path: Path) -> bool:
        """Write an object into a file; False if there is none, or its bytes stay other than were sent."""
        key = f"{self.name}/{self.prefix}{name}"
        with contextlib.suppress(_Refused):
            self._patiently("get_object", lambda: self._files.get_file(key, str(path), max_concurrency=1))
            return True
        return False

    # --- patience --------------------------------------------------------------------------------

    def _call(self, method: str, **terms: Any) -> Any:
        return self._patiently(method, lambda: self._files.call_s3(method, Bucket=self.name, **terms))

    def _patiently(self, method: str, call: Callable[[], T]) -> T:
        for attempt in range(TRIES_OF_A_CALL):
            try:
                result = call()
                self._answered = True
                return result
            except Exception as error:
                if not _is_remote(error):
                    raise  # a full disk, a file of ours that has gone
                code, status = _code(error)
                if code in REFUSED and method in MAY_BE_REFUSED:
                    raise _Refused from error
                if (sentence := self._for_a_person(method, error, code, status)) is not None:
                    raise BadInput(f"{self.url}: {sentence}") from None
                broken = type(error).__name__ == BAD_BODY
                reason = f"{code or type(error).__name__}: {error}"
            if attempt + 1 < TRIES_OF_A_CALL:
                time.sleep(FIRST_PAUSE_S * 2**attempt)
        if broken:
            raise _Refused
        raise RuntimeError(f"{self.url} keeps failing ({method}: {reason}); run again when it is well")

    def _for_a_person(self, method: str, error: Exception, code: str, status: int) -> str | None:
        """What a person has to put right, or None where another try may help."""
        kind = type(error).__name__
        if kind in NO_CREDENTIALS:
            return "no credentials found; set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_PROFILE"
        if kind in NO_ANSWER:
            if self._answered:  # it was there before: the network may come back
                return None
            return f"no server answers ({error}); check AWS_ENDPOINT_URL and the network"
        if code == "NoSuchBucket":
            return f"there is no bucket {self.name}; create it, or set OMNI_STORE to another"
        if status in (401, 403):
            return (
                f"access is denied ({method}: {code}); the credentials need s3:ListBucket on the bucket and "
                "s3:GetObject, s3:PutObject and s3:DeleteObject below the prefix"
            )
        final = (400 <= status < 500 or status == 501) and status != 429 and code not in TRY_AGAIN
        return f"{method} is refused: {error}" if final or kind in NOT_SET_UP else None


def side_by_side(function: Callable[[Any], T], items: Iterable[Any], threads: int) -> list[T]:
    """`function` of every item, in threads; the first error is raised and keeps the rest from beginning."""
    with ThreadPoolExecutor(threads) as pool:
        futures = [pool.submit(function, item) for item in items]
        try:
            return [future.result() for future in futures]
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise


class _Refused(Exception):
    """A condition did not hold, or there is no such object with good bytes."""


def _code(error: BaseException | None) -> tuple[str, int]:
    """S3's error code and the HTTP status, from the answer behind an error; empty and 0 where none came."""
    while error is not None:
        answer = getattr(error, "response", None)
        if isinstance(answer, dict) and "Error" in answer:
            status = answer.get("ResponseMetadata", {}).get("HTTPStatusCode", 0)
            return str(answer["Error"].get("Code", "")), int(status)
        error = error.__cause__
    return "", 0


def _is_remote(error: Exception) -> bool:
    """Whether the other side, the network or botocore's settings are the reason, not this machine's disk."""
    modules = {kind.__module__.split(".")[0] for kind in type(error).__mro__}
    if isinstance(error, ValueError) and "endpoint" in str(error):  # so botocore refuses AWS_ENDPOINT_URL
        return True
    return bool(_code(error)[0] or modules & REMOTE or isinstance(error, (TimeoutError, ConnectionError)))


def _age_s(answer: dict[str, Any]) -> float:
    """Seconds since an object was written, both times by the server's clock."""
    from email.utils import parsedate_to_datetime

    date = answer["ResponseMetadata"]["HTTPHeaders"].get("date")
    now_s = parsedate_to_datetime(date).timestamp() if date else time.time()
    return float(now_s - answer["LastModified"].timestamp())
