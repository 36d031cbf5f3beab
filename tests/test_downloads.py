"""Downloads from servers that go wrong: what ends up in place is always the whole file, or nothing."""

import hashlib
import random
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from omni_model.config import BadInput
from omni_model.downloads import DownloadFailed, Fetched, fetch, looks_like_page
from tests.loopback import FileServer, dead_url, file_server, stay_at_home

CONTENT = random.Random(0).randbytes(50_000)
OTHER = random.Random(1).randbytes(50_000)
SHA256 = hashlib.sha256(CONTENT).hexdigest()
MD5 = hashlib.md5(CONTENT).hexdigest()


@pytest.fixture(autouse=True)
def _at_home(monkeypatch: pytest.MonkeyPatch) -> None:
    stay_at_home(monkeypatch)


@pytest.fixture
def server() -> Iterator[FileServer]:
    with file_server() as started:
        started.files["/a"] = CONTENT
        yield started


@pytest.fixture
def mirror() -> Iterator[FileServer]:
    with file_server() as started:
        started.files["/a"] = CONTENT
        yield started


def get(target: Path, *servers: FileServer | str, **options: Any) -> Fetched:
    urls = [each if isinstance(each, str) else f"{each.url}/a" for each in servers]
    return fetch(urls, target, **{"timeout_s": 0.3, "retries": 2, "pause_s": 0.005, **options})


def leave_a_part(target: Path, server: FileServer) -> None:
    """Have half of the file fetched, and then the server refuse."""
    server.faults["/a"] = ["cut", 404]
    with pytest.raises(DownloadFailed):
        get(target, server)


def only(target: Path) -> bool:
    """Whether the whole file lies at `target`, and nothing beside it."""
    return target.read_bytes() == CONTENT and list(target.parent.iterdir()) == [target]


def test_a_file_is_put_in_place_and_not_asked_for_twice(server: FileServer, tmp_path: Path) -> None:
    told: list[tuple[int, int]] = []
    target = tmp_path / "deep" / "a"
    got = get(target, server, sha256=SHA256, md5=MD5, progress=lambda *each: told.append(each))
    assert only(target)
    assert got == Fetched(target, f"{server.url}/a", len(CONTENT), SHA256, MD5)
    assert told[-1] == (len(CONTENT), len(CONTENT))
    assert get(target, server, sha256=SHA256.upper(), size=len(CONTENT)).url == ""
    assert len(server.requests) == 1


def test_a_short_body_is_resumed_where_it_broke_off(server: FileServer, tmp_path: Path) -> None:
    server.faults["/a"] = ["cut", "cut", "cut", "cut"]  # more than the retries: each one gains something
    get(tmp_path / "a", server)
    assert only(tmp_path / "a")
    starts = [int(asked[6:-1]) for _, asked in server.requests[1:]]
    assert starts == [25_000, 37_500, 43_750, 46_875]


def test_the_next_attempt_continues_what_the_last_one_left(server: FileServer, tmp_path: Path) -> None:
    leave_a_part(tmp_path / "a", server)
    assert not (tmp_path / "a").exists()
    get(tmp_path / "a", server)
    assert server.requests[-1] == ("/a", "bytes=25000-")
    assert only(tmp_path / "a")


def test_a_killed_process_loses_nothing_that_had_come(server: FileServer, tmp_path: Path) -> None:
    server.files["/a"] = CONTENT * 10
    server.faults["/a"] = ["slow"]
    script = (
        f"from omni_model.downloads import fetch; fetch(['{server.url}/a'], __import__('pathlib').Path('a'))"
    )
    child = subprocess.Popen([sys.executable, "-c", script], cwd=tmp_path)
    part = tmp_path / "a.part"
    deadline = time.monotonic() + 20
    while (not part.exists() or part.stat().st_size < 4096) and time.monotonic() < deadline:
        time.sleep(0.01)
    child.send_signal(signal.SIGKILL)
    child.wait()
    there = part.stat().st_size
    assert 4096 <= there < len(CONTENT) * 10
    get(tmp_path / "a", server)
    assert server.requests[-1] == ("/a", f"bytes={there}-")
    assert (tmp_path / "a").read_bytes() == CONTENT * 10


def test_a_server_without_ranges_sends_all_of_it_again(server: FileServer, tmp_path: Path) -> None:
    server.faults["/a"] = ["cut", "no range"]
    get(tmp_path / "a", server)
    assert only(tmp_path / "a")


def test_a_server_that_never_gets_beyond_a_point_is_given_up(server: FileServer, tmp_path: Path) -> None:
    class AlwaysCut(list[str]):
        def pop(self, index: Any = -1) -> str:
            return "cut"

    server.faults["/a"] = AlwaysCut(["cut"])
    server._start = lambda *_: 0  # type: ignore[method-assign, assignment]
    with pytest.raises(DownloadFailed, match="broke off after 25000 of 50000 bytes, 3 times"):
        get(tmp_path / "a", server)
    assert len(server.requests) == 4


def test_another_range_than_asked_for_is_not_glued_in(server: FileServer, tmp_path: Path) -> None:
    server.faults["/a"] = ["cut", "other range"]
    get(tmp_path / "a", server)
    assert only(tmp_path / "a")


@pytest.mark.parametrize("known", [{}, {"sha256": SHA256}])
def test_a_part_that_was_whole_is_only_renamed(
    server: FileServer, tmp_path: Path, known: dict[str, str]
) -> None:
    get(tmp_path / "a", server)
    leave_a_part(tmp_path / "b", server)  # with a note on where the bytes are from
    (tmp_path / "a").replace(tmp_path / "b.part")
    get(tmp_path / "b", server, **known)
    assert server.requests[-1] == ("/a", "bytes=50000-")  # answered by 416
    assert only(tmp_path / "b")


def test_a_part_that_is_longer_than_the_file_is_dropped(server: FileServer, tmp_path: Path) -> None:
    (tmp_path / "a.part").write_bytes(CONTENT + OTHER)
    get(tmp_path / "a", server, sha256=SHA256)
    assert only(tmp_path / "a")


@pytest.mark.parametrize("fault", ["", "ignore if-range"])
def test_a_file_that_changed_at_the_server_is_never_mixed(
    server: FileServer, tmp_path: Path, fault: str
) -> None:
    server.files["/a"] = OTHER
    leave_a_part(tmp_path / "a", server)
    server.files["/a"] = CONTENT
    server.faults["/a"] = [fault]
    get(tmp_path / "a", server)
    assert only(tmp_path / "a")
    assert len(server.requests) == (4 if fault else 3)  # two of them left the part


def test_a_file_that_became_shorter_has_no_old_tail(server: FileServer, tmp_path: Path) -> None:
    leave_a_part(tmp_path / "a", server)
    server.files["/a"] = CONTENT[:10_000]
    get(tmp_path / "a", server)
    assert (tmp_path / "a").read_bytes() == CONTENT[:10_000]


def test_another_server_continues_only_where_a_digest_can_tell(
    server: FileServer, mirror: FileServer, tmp_path: Path
) -> None:
    for number, known in enumerate(({"md5": MD5}, {})):
        server.faults["/a"] = ["cut", 404]
        got = get(tmp_path / str(number) / "a", server, mirror, **known)
        assert only(got.path)
        assert got.url.startswith(mirror.url)
        assert got.failures == (f"{server.url}/a (HTTP 404)",)
    assert [asked for _, asked in mirror.requests] == ["bytes=25000-", ""]


def test_foreign_bytes_in_front_cost_one_fresh_start(server: FileServer, tmp_path: Path) -> None:
    (tmp_path / "a.part").write_bytes(OTHER[:20_000])
    get(tmp_path / "a", server, sha256=SHA256)
    assert [asked for _, asked in server.requests] == ["bytes=20000-", ""]
    assert only(tmp_path / "a")


def test_a_wrong_file_is_refused_and_the_next_server_asked(
    server: FileServer, mirror: FileServer, tmp_path: Path
) -> None:
    server.files["/a"] = OTHER
    got = get(tmp_path / "a", server, mirror, sha256=SHA256)
    assert only(tmp_path / "a")
    assert "its sha256 is" in got.failures[0]
    assert SHA256 in got.failures[0]
    assert len(server.requests) == 1  # the same again would be as wrong


def test_what_was_in_place_stays_until_something_better_is_whole(server: FileServer, tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(OTHER)
    server.faults["/a"] = ["cut", 404]
    with pytest.raises(DownloadFailed):
        get(tmp_path / "a", server, sha256=SHA256)
    assert (tmp_path / "a").read_bytes() == OTHER
    get(tmp_path / "a", server, sha256=SHA256)
    assert only(tmp_path / "a")


def test_errors_that_may_pass_are_tried_again_and_others_not(
    server: FileServer, mirror: FileServer, tmp_path: Path
) -> None:
    server.faults["/a"] = [503, 429]
    get(tmp_path / "a", server)
    assert len(server.requests) == 3
    del server.files["/a"]
    mirror.faults["/a"] = [500] * 9
    with pytest.raises(DownloadFailed) as failed:
        get(tmp_path / "b", server, mirror)
    assert len(server.requests) == 4
    assert failed.value.reasons == (f"{server.url}/a (HTTP 404)", f"{mirror.url}/a (HTTP 500, 3 times)")


@pytest.mark.parametrize("fault", ["page", "page as data"])
def test_a_web_page_is_no_file_and_costs_nothing_that_had_come(
    server: FileServer, tmp_path: Path, fault: str
) -> None:
    leave_a_part(tmp_path / "a", server)
    server.faults["/a"] = [fault]
    with pytest.raises(DownloadFailed, match="a web page came instead"):
        get(tmp_path / "a", server)
    assert (tmp_path / "a.part").read_bytes() == CONTENT[:25_000]
    assert not (tmp_path / "a").exists()


def test_looks_like_page() -> None:
    assert looks_like_page(b"\xef\xbb\xbf\n <!doctype HTML>")
    assert looks_like_page(b"<html lang='en'>")
    assert not looks_like_page(CONTENT)
    assert not looks_like_page(b'{"a": "<html>"}')
    assert not looks_like_page(b"")


def test_a_silent_server_is_left_and_one_that_falls_silent_asked_again(
    server: FileServer, tmp_path: Path
) -> None:
    server.faults["/a"] = ["silent"]
    with socket.create_server(("127.0.0.1", 0)) as mute:  # takes connections and never answers
        url = f"http://127.0.0.1:{mute.getsockname()[1]}/a"
        got = get(tmp_path / "a", url, server, timeout_s=0.1, retries=1)
    assert only(tmp_path / "a")
    assert got.failures == (f"{url} (no answer in 0.1 s, 2 times)",)
    assert server.requests == [("/a", ""), ("/a", "bytes=25000-")]


def test_the_error_names_every_attempt_in_one_sentence(server: FileServer, tmp_path: Path) -> None:
    server.faults["/a"] = [403]
    dead = f"{dead_url()}/a"
    with pytest.raises(BadInput) as failed:
        get(tmp_path / "a", dead, server)
    assert str(failed.value) == (
        f"a could not be downloaded: {dead} (nobody answers there); {server.url}/a (HTTP 403); "
        "check the network and run again"
    )
    assert list(tmp_path.iterdir()) == []


def test_a_file_of_another_size_is_refused_before_it_is_read(server: FileServer, tmp_path: Path) -> None:
    (tmp_path / "a.part").write_bytes(CONTENT[:100])
    server.files["/a"] = CONTENT + b"!"
    with pytest.raises(DownloadFailed, match="its file has 50001 bytes, not 50000"):
        get(tmp_path / "a", server, size=50_000, sha256=SHA256)
    assert (tmp_path / "a.part").read_bytes() == CONTENT[:100]


def test_a_full_disk_is_said_before_it_is_filled(
    server: FileServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10, 9, 1))  # type: ignore[attr-defined]
    with pytest.raises(BadInput, match="make room"):
        get(tmp_path / "a", server)
    assert list(tmp_path.iterdir()) == []


def test_a_redirect_keeps_the_range(server: FileServer, mirror: FileServer, tmp_path: Path) -> None:
    server.redirects["/a"] = f"{mirror.url}/a"
    mirror.faults["/a"] = ["cut"]
    get(tmp_path / "a", server)
    assert mirror.requests == [("/a", ""), ("/a", "bytes=25000-")]
    assert only(tmp_path / "a")


@pytest.mark.parametrize("url", ["file:///etc/hostname", "ftp://127.0.0.1/a", "a"])
def test_only_web_addresses_are_asked(tmp_path: Path, url: str) -> None:
    with pytest.raises(BadInput, match="http"):
        get(tmp_path / "a", url)


def test_an_empty_file_is_a_file(server: FileServer, tmp_path: Path) -> None:
    server.files["/a"] = b""
    assert get(tmp_path / "a", server).size == 0
    assert (tmp_path / "a").read_bytes() == b""


@pytest.mark.parametrize("seed", range(25))
def test_any_row_of_faults_ends_in_the_whole_file_or_in_none(
    server: FileServer, mirror: FileServer, tmp_path: Path, seed: int
) -> None:
    rng = random.Random(seed)
    kinds = ["cut", "no range", "other range", "page", "page as data", "ignore if-range", 503, 429, 404, ""]
    known = rng.choice([{}, {"sha256": SHA256}, {"md5": MD5, "size": len(CONTENT)}])
    target = tmp_path / "a"
    for _ in range(6):
        server.faults["/a"] = rng.choices(kinds, k=rng.randrange(6))
        mirror.faults["/a"] = rng.choices(kinds, k=rng.randrange(6))
        wrong = known and rng.random() < 0.3
        server.files["/a"] = OTHER if wrong else CONTENT
        try:
            get(target, server, mirror, retries=rng.randrange(3), pause_s=0.0, **known)
        except DownloadFailed:
            assert not target.exists()
            continue
        assert only(target)
        return
