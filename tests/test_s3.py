"""The store on S3: one truth, many mirrors; leases; faults. The server is moto on loopback, never outside."""

import http.client
import json
import os
import shutil
import signal
import subprocess
import sys
import tarfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest

pytest.importorskip("s3fs")
pytest.importorskip("moto")

from flows import cli, runs
from omni_model.artifacts import Manifest, sha256_file
from omni_model.config import BadInput, ReportRecipe, TokenizerRecipe
from omni_model.storage import Store, mirror_of, open_store
from omni_model.storage.bucket import Bucket
from omni_model.storage.lease import KernelLease, ObjectLease
from omni_model.storage.s3 import S3Store
from tasks.execute import Outcome
from tasks.planner import CURRENT, WILL_RUN, Planner
from tasks.stage import REGISTRY, stage_of
from tests.faulty_s3 import Proxy, s3_server
from tests.little_stages import little_finish, little_summary, little_text
from tests.test_execution import (
    LITTLE,
    PLAIN,
    QUICK,
    ROOT,
    SLOW,
    Heard,
    chain,
    executor,
    only_registered_here,  # noqa: F401  (a fixture)
    wait_until,
)

CREDENTIALS = {
    "AWS_ACCESS_KEY_ID": "test",
    "AWS_SECRET_ACCESS_KEY": "test",
    "AWS_DEFAULT_REGION": "us-east-1",
    "AWS_EC2_METADATA_DISABLED": "true",  # else a machine without credentials asks its cloud for some
}
BUCKET = "shared"


@pytest.fixture(scope="module")
def server() -> Iterator[Proxy]:
    with s3_server() as proxy:
        yield proxy


@pytest.fixture
def s3(server: Proxy, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Proxy:
    """An empty bucket on a server that behaves; credentials and the place of mirrors in the environment."""
    for name in [name for name in os.environ if name.startswith("AWS_")]:
        monkeypatch.delenv(name)
    for name, value in (CREDENTIALS | {"AWS_ENDPOINT_URL": server.url}).items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("OMNI_CACHE", str(tmp_path / "cache"))
    server.fault = lambda method, path: ""
    ask(server, "POST", "/moto-api/reset")
    ask(server, "PUT", f"/{BUCKET}")
    server.requests.clear()
    return server


def ask(server: Proxy, method: str, path: str, body: bytes = b"") -> bytes:
    """A request of somebody who knows nothing of stores."""
    connection = http.client.HTTPConnection("127.0.0.1", server.behind)
    signed = {"Authorization": "AWS4-HMAC-SHA256 Credential=test/20260101/us-east-1/s3/aws4_request"}
    connection.request(method, path, body, signed)
    answer = connection.getresponse()
    data = answer.read()
    connection.close()
    assert answer.status < 300, (method, path, answer.status, data)
    return data


def bucket(server: Proxy, timeout_s: float = 15.0) -> Bucket:
    """The shared bucket; making its client costs more than a test's calls, so that one serves many."""
    if timeout_s not in server.kept:
        server.kept[timeout_s] = Bucket(BUCKET, "team/omni", timeout_s)
    return server.kept[timeout_s]


def machine(server: Proxy, tmp_path: Path, name: str, timeout_s: float = 15.0) -> S3Store:
    """The shared store as a machine of this name sees it."""
    mirror = tmp_path / name
    mirror.mkdir(exist_ok=True)
    return S3Store(bucket(server, timeout_s), mirror)


def make(store: Store, recipe: TokenizerRecipe = QUICK, heard: Heard | None = None) -> Outcome:
    """The first little stage, in this process unless it is the slow one."""
    return executor(store, heard, inline=recipe != SLOW).make(
        stage_of(little_text), recipe, (), "little_text"
    )


def run_chain(store: Store, summary: ReportRecipe = PLAIN, text: TokenizerRecipe = QUICK) -> list[bool]:
    """The three little stages; which of them were computed."""
    run = executor(store, inline=text != SLOW)
    first = run.make(stage_of(little_text), text, (), "text")
    second = run.make(stage_of(little_summary), summary, (first.handle,), "summary")
    third = run.make(stage_of(little_finish), summary, (second.handle,), "finish")
    return [outcome.computed for outcome in (first, second, third)]


def object_of(store: Store, made: Manifest, name: str) -> str:
    """The path of an object of an artifact on the server."""
    place = store.directory(made.stage, made.key).relative_to(store.root)
    return f"/{BUCKET}/team/omni/{place}/{name}"


# --- one truth, many mirrors -----------------------------------------------------------------------


def test_what_one_machine_made_another_reuses(s3: Proxy, tmp_path: Path) -> None:
    here = machine(s3, tmp_path, "a")
    assert run_chain(here) == [True, True, True]
    names = sorted(bucket(s3).list())
    assert {name.split("/", 2)[2] for name in names} == {
        *("manifest.json", "metrics.jsonl", "out/documents.jsonl", "out/report.html")
    }
    assert not [name for name in names if name.startswith(".locks/")]
    s3.requests.clear()
    there = machine(s3, tmp_path, "b")
    assert chain(there, QUICK) == [(CURRENT, "")] * 3
    assert run_chain(there) == [False, False, False]
    assert s3.sent("GET", ".jsonl") == s3.sent("GET", ".html") == s3.sent("PUT", "") == 0
    mirrored = {p.name for p in (tmp_path / "b").rglob("*") if p.is_file() and ".locks" not in p.parts}
    assert mirrored == {"manifest.json", "remote.json"}
    # A stage that is new fetches its input, whole and once, and computes from it what the other would.
    other = ReportRecipe(title="other")
    assert run_chain(there, other) == [False, True, True]
    assert s3.sent("GET", "out/documents.jsonl") == 1
    local = open_store(str(tmp_path / "local"))
    run_chain(local, other)
    for path in local.root.rglob("out/*"):
        assert sha256_file(path) == sha256_file(there.root / path.relative_to(local.root))
    # The first machine is still open; it sees at once what the other made meanwhile.
    assert run_chain(here, other) == [False, False, False]


def test_the_address_says_which_store_and_which_mirror(s3: Proxy, tmp_path: Path) -> None:
    store = open_store(f"s3://{BUCKET}/team/omni/")
    assert isinstance(store, S3Store)
    assert store.url == f"s3://{BUCKET}/team/omni"
    assert store.root == mirror_of(store.url)
    assert store.root.parent == tmp_path / "cache"
    assert mirror_of(f"s3://{BUCKET}/other") != store.root
    for address in ("s3://", "gs://bucket/store", "s3:///prefix"):
        with pytest.raises(BadInput, match="neither a directory nor s3://bucket/prefix"):
            open_store(address)


def test_a_local_store_imports_nothing_of_this(tmp_path: Path) -> None:
    script = "import sys, flows.cli; from omni_model.storage import open_store; open_store(sys.argv[1])\n"
    script += "print(*sorted({'s3fs', 'botocore', 'fsspec', 'omni_model.storage.s3'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", script, tmp_path], cwd=ROOT, capture_output=True, text=True)
    assert (done.stdout.strip(), done.stderr) == ("", "")


def test_names_that_lead_out_of_the_mirror_are_not_followed(s3: Proxy, tmp_path: Path) -> None:
    for name in ("../x/manifest.json", "a//manifest.json", ".prefect/x/manifest.json"):
        ask(s3, "PUT", f"/{BUCKET}/team/omni/{name}".replace("..", "%2E%2E"), b"{}")
    assert len(bucket(s3)._files.call_s3("list_objects_v2", Bucket=BUCKET)["Contents"]) == 3
    store = machine(s3, tmp_path, "a")
    assert not list(tmp_path.rglob("manifest.json"))
    made = make(store)
    plain = json.loads((store.directory("little_text", made.manifest.key) / "manifest.json").read_text())
    plain["files"].append({"path": "../../../../escaped", "size": 2, "sha256": "0" * 64})
    ask(s3, "PUT", object_of(store, made.manifest, "manifest.json"), json.dumps(plain).encode())
    ask(s3, "PUT", f"/{BUCKET}/team/omni/escaped", b"{}")
    other = machine(s3, tmp_path, "b")
    assert chain(other, QUICK)[0][0] == WILL_RUN
    with pytest.raises(RuntimeError, match="missing or not what was made"):
        other.fetch("little_text", made.manifest.key)
    assert not list(tmp_path.rglob("escaped*"))


def test_a_listing_of_many_pages_is_read_to_its_end(s3: Proxy, tmp_path: Path) -> None:
    from moto.core import DEFAULT_ACCOUNT_ID
    from moto.s3.models import s3_backends

    names = {f"runs/{number}/summary.json" for number in range(2100)}
    for name in names:
        s3_backends[DEFAULT_ACCOUNT_ID]["aws"].put_object(BUCKET, f"team/omni/{name}", b"{}")
    assert set(bucket(s3).list()) == names
    assert s3.sent("GET", f"/{BUCKET}") == 3


def test_looking_costs_one_listing(s3: Proxy, tmp_path: Path) -> None:
    run_chain(machine(s3, tmp_path, "a"))
    s3.requests.clear()
    assert chain(machine(s3, tmp_path, "a"), QUICK) == [(CURRENT, "")] * 3
    assert len(s3.requests) == 1


def test_plain_webdataset_reads_shards_by_their_address(s3: Proxy, tmp_path: Path) -> None:
    """The lines of the README; an artifact's tars are ordinary objects."""
    import s3fs
    import webdataset
    from webdataset.gopen import gopen_schemes

    with tarfile.open(tmp_path / "features-0.tar", "w") as tar:
        for name in ("one.json", "two.json"):
            (tmp_path / name).write_text("{}")
            tar.add(tmp_path / name, name)
    bucket(s3).upload(tmp_path / "features-0.tar", "extract_features/0/out/features-0.tar")
    before = dict(gopen_schemes)
    try:
        gopen_schemes["s3"] = lambda url, mode="rb", bufsize=0: s3fs.S3FileSystem().open(url, mode)
        url = f"s3://{BUCKET}/team/omni/extract_features/0/out/features-0.tar"
        found = [sample["__key__"] for sample in webdataset.WebDataset(url, shardshuffle=False)]
    finally:
        gopen_schemes.clear()
        gopen_schemes.update(before)
    assert found == ["one", "two"]


# --- damage ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("harm", ["delete", "truncate", "manifest deleted", "manifest damaged"])
def test_damage_in_the_bucket_makes_exactly_that_stage_again(s3: Proxy, tmp_path: Path, harm: str) -> None:
    here = machine(s3, tmp_path, "a")
    run_chain(here)
    made = make(here)
    path = object_of(here, made.manifest, "out/documents.jsonl")
    manifest = object_of(here, made.manifest, "manifest.json")
    whole = ask(s3, "GET", path)
    if harm == "truncate":
        ask(s3, "PUT", path, whole[:-1])
    elif harm == "manifest damaged":
        ask(s3, "PUT", manifest, b"{")
    else:
        ask(s3, "DELETE", path if harm == "delete" else manifest)
    for name in ("a", "b"):
        store = machine(s3, tmp_path, name)
        status, why = chain(store, QUICK)[0]
        assert status == WILL_RUN
        if not harm.startswith("manifest"):
            problem = "missing" if harm == "delete" else f"{len(whole) - 1} bytes instead of {len(whole)}"
            assert why == f"damaged: s3://{path[1:]}: {problem}"
    assert run_chain(store) == [True, False, False]
    assert ask(s3, "GET", path) == whole
    assert run_chain(machine(s3, tmp_path, "a")) == [False, False, False]


def test_verify_reads_every_object_and_the_next_run_makes_the_bad_one_again(
    s3: Proxy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("OMNI_STORE", f"s3://{BUCKET}/team/omni")
    store = open_store(f"s3://{BUCKET}/team/omni")
    run_chain(store)
    assert cli.main(["verify"]) == 0
    assert f"3 artifacts in s3://{BUCKET}/team/omni, every byte as it was made" in capsys.readouterr().out
    path = object_of(store, make(store).manifest, "out/documents.jsonl")
    whole = ask(s3, "GET", path)
    ask(s3, "PUT", path, bytes([whole[0] ^ 1]) + whole[1:])  # as long as before: no listing shows it
    assert run_chain(open_store(store.url)) == [False, False, False]
    assert cli.main(["verify"]) == 1
    assert f"s3://{path[1:]}: its bytes have changed" in capsys.readouterr().out
    assert run_chain(open_store(store.url)) == [True, False, False]
    assert cli.main(["verify"]) == 0
    assert not list(store.root.glob(".verify*"))


def test_a_mirror_is_only_a_copy(s3: Proxy, tmp_path: Path) -> None:
    """What is wrong in it is fetched again, not computed again; what it lacks as well."""
    store = machine(s3, tmp_path, "a")
    run_chain(store)
    document = make(store).handle.out / "documents.jsonl"
    document.write_text("wrong")
    assert run_chain(machine(s3, tmp_path, "a"), ReportRecipe(title="x")) == [False, True, True]
    assert document.read_text().startswith("0\n3\n")
    document.unlink()
    (document.parent.parent / "manifest.json").unlink()
    assert run_chain(machine(s3, tmp_path, "a"), ReportRecipe(title="y")) == [False, True, True]


def test_a_bad_body_is_fetched_again_and_then_refused(s3: Proxy, tmp_path: Path) -> None:
    key = make(machine(s3, tmp_path, "a")).manifest.key
    bad = ["flip", "half", "flip"]
    s3.fault = lambda method, path: bad.pop() if bad and path.endswith("documents.jsonl") else ""
    there = machine(s3, tmp_path, "b")
    there.fetch("little_text", key)
    assert not bad
    s3.fault = lambda method, path: "flip" if path.endswith("documents.jsonl") else ""
    there = machine(s3, tmp_path, "c")
    with pytest.raises(RuntimeError, match=r"out/documents.jsonl is missing or not what was made; run again"):
        run_chain(there, ReportRecipe(title="other"))
    assert list((there.root / "little_text").glob("*/out/*")) == []
    s3.fault = lambda method, path: ""
    assert run_chain(machine(s3, tmp_path, "c"), ReportRecipe(title="other")) == [True, True, True]


def test_a_disk_that_is_too_small_is_named_before_anything_is_fetched(
    s3: Proxy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    key = make(machine(s3, tmp_path, "a")).manifest.key
    there = machine(s3, tmp_path, "b")
    s3.requests.clear()
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=2**20))
    with pytest.raises(BadInput, match=r"has 1 MiB left where 200 are needed; free some or set OMNI_CACHE"):
        there.fetch("little_text", key)
    assert s3.requests == []


# --- sending ---------------------------------------------------------------------------------------


def test_what_was_sealed_and_then_spoiled_is_not_sent(s3: Proxy, tmp_path: Path) -> None:
    s3.fault = lambda method, path: "deny" if method == "PUT" and path.endswith("manifest.json") else ""
    with pytest.raises(BadInput):
        make(machine(s3, tmp_path, "a"))
    s3.fault = lambda method, path: ""
    next((tmp_path / "a").glob("little_text/*/out/documents.jsonl")).write_text("spoiled")
    assert make(machine(s3, tmp_path, "a")).computed
    assert make(machine(s3, tmp_path, "b")).computed is False


def test_a_large_file_travels_in_parts(s3: Proxy, tmp_path: Path) -> None:
    whole = os.urandom(1 << 20) * 33
    (tmp_path / "large").write_bytes(whole)
    bucket(s3).upload(tmp_path / "large", "large", "its sum")
    assert s3.sent("PUT", "/large") == 3
    assert bucket(s3).sha256("large") == "its sum"
    assert bucket(s3).download("large", tmp_path / "copy")
    assert (tmp_path / "copy").read_bytes() == whole


# --- leases ----------------------------------------------------------------------------------------


def lease_of(s3: Proxy, tmp_path: Path, name: str, lease_s: float = 60.0) -> ObjectLease:
    """A lease on one thing, as a machine of this name asks for it."""
    kernel = KernelLease(tmp_path / f"{name}.lock")
    assert kernel.try_acquire("test")
    return ObjectLease(bucket(s3), ".locks/thing", kernel, lease_s)


def test_one_machine_at_a_time(s3: Proxy, tmp_path: Path) -> None:
    first, second = lease_of(s3, tmp_path, "a"), lease_of(s3, tmp_path, "b")
    assert first.try_acquire("the first")
    assert not second.try_acquire("the second")
    assert f"process {os.getpid()} on " in second.holder()
    assert "(the first, since " in second.holder()
    assert first.is_held()
    first.release()
    assert second.try_acquire("the second")
    assert not first.renew()
    second.release()
    assert bucket(s3).list() == {}


def test_of_many_who_try_one_has_it(s3: Proxy, tmp_path: Path) -> None:
    leases = [lease_of(s3, tmp_path, str(number)) for number in range(8)]
    got: list[bool] = []
    threads = [threading.Thread(target=lambda it=it: got.append(it.try_acquire("x"))) for it in leases]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(got) == [False] * 7 + [True]


def test_a_lease_is_renewed_while_it_is_held_and_ends_when_it_is_not(s3: Proxy, tmp_path: Path) -> None:
    first, second = lease_of(s3, tmp_path, "a", 4.0), lease_of(s3, tmp_path, "b", 4.0)
    assert first.try_acquire("alive")
    deadline = time.monotonic() + 6.5
    while time.monotonic() < deadline:
        assert not second.try_acquire("x")
        time.sleep(0.5)
    first._released.set()  # its thread ends, as that of a killed process does
    started = time.monotonic()
    wait_until(lambda: second.try_acquire("after it"))
    assert time.monotonic() - started < 4 + 6
    assert not first.renew()
    assert not first.is_held()
    first.release()  # and does not take it from the second
    assert second.renew()


def test_a_dead_process_of_this_machine_blocks_nobody(s3: Proxy, tmp_path: Path) -> None:
    dead = lease_of(s3, tmp_path, "a")
    assert dead.try_acquire("x")
    dead._released.set()
    dead._kernel.release()
    if Path("/proc/sys/kernel/random/boot_id").exists():
        assert lease_of(s3, tmp_path, "a").try_acquire("y")
    assert not lease_of(s3, tmp_path, "b").try_acquire("z")


def test_an_answer_that_got_lost_does_not_lose_the_lease(s3: Proxy, tmp_path: Path) -> None:
    lost = [2]

    def fault(method: str, path: str) -> str:
        lost[0] -= method == "PUT"
        return "lost" if method == "PUT" and lost[0] >= 0 else ""

    lease = lease_of(s3, tmp_path, "a")
    s3.fault = fault
    assert lease.try_acquire("x")
    lost[0] = 2
    assert lease.renew()
    lease.release()
    assert bucket(s3).list() == {}


def test_a_bucket_that_ignores_conditions_is_refused(s3: Proxy, tmp_path: Path) -> None:
    s3.fault = lambda method, path: "blind"
    with pytest.raises(BadInput, match="the bucket ignores If-None-Match"):
        make(machine(s3, tmp_path, "a"))


def test_who_lost_its_lease_does_not_overwrite(s3: Proxy, tmp_path: Path) -> None:
    store, failures = machine(s3, tmp_path, "a"), []

    def run() -> None:
        try:
            make(store, SLOW)
        except RuntimeError as error:
            failures.append(str(error))

    thread = threading.Thread(target=run)
    thread.start()
    wait_until(lambda: any(name.startswith(".locks/little_text") for name in bucket(s3).list()))
    lock = next(name for name in bucket(s3).list() if name.startswith(".locks/"))
    theirs = {"token": "another", "lease_s": 2, "pid": 1, "host": "far", "purpose": "x", "since": time.time()}
    bucket(s3).put(lock, json.dumps(theirs).encode())
    thread.join()
    assert "was taken over by another machine while it was computed here; run again" in failures[0]
    assert list(bucket(s3).list()) == [lock]
    assert (
        make(machine(s3, tmp_path, "a"), SLOW).computed is False
    )  # once the other is dead, what is here is sent


# --- processes -------------------------------------------------------------------------------------


def declare() -> None:
    """The little stages, in a process that has no fixtures."""
    REGISTRY.update(LITTLE)


RUN = """
import sys
from pathlib import Path
from tests import test_s3
test_s3.declare()
mirror = Path(sys.argv[1])
mirror.mkdir(exist_ok=True)
store = test_s3.S3Store(test_s3.Bucket(test_s3.BUCKET, "team/omni"), mirror, float(sys.argv[3]))
print(*test_s3.run_chain(store, text=test_s3.TokenizerRecipe(vocab_size=int(sys.argv[2]))), flush=True)
"""


def on(mirror: Path, text: TokenizerRecipe = SLOW, lease_s: float = 60.0) -> "subprocess.Popen[str]":
    """The three little stages on a machine of their own."""
    command = [sys.executable, "-c", RUN, str(mirror), str(text.vocab_size), str(lease_s)]
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True, start_new_session=True)


@pytest.mark.parametrize(
    ("killed_at", "heard"), [("documents.jsonl", False), ("documents.jsonl", True), ("manifest.json", False)]
)
def test_a_killed_send_is_finished_without_computing(
    s3: Proxy, tmp_path: Path, killed_at: str, heard: bool
) -> None:
    """`heard`: the request at which it is killed still gets through."""

    def fault(method: str, path: str) -> str:
        if method == "PUT" and path.endswith(killed_at):
            os.killpg(process.pid, signal.SIGKILL)
            return "" if heard else "silence"
        return ""

    s3.fault = fault
    process = on(tmp_path / "a", QUICK)
    process.communicate(timeout=60)
    assert process.returncode == -signal.SIGKILL
    s3.fault = lambda method, path: ""
    wait_until(lambda: any(name.endswith("documents.jsonl") for name in bucket(s3).list()) or not heard)
    assert not [name for name in bucket(s3).list() if name.endswith("manifest.json")]
    assert chain(machine(s3, tmp_path, "b"), QUICK)[0] == (WILL_RUN, "never run")
    store = machine(s3, tmp_path, "a")
    status, why = chain(store, QUICK)[0]
    assert status == WILL_RUN
    assert why.endswith("manifest.json: sealed here and not sent; the next run sends it")
    assert store.artifacts("little_text") == []  # so that omni verify does not complain of it
    s3.requests.clear()
    assert make(store).computed is False
    assert s3.sent("PUT", "documents.jsonl") == (killed_at == "documents.jsonl" and not heard)
    assert make(machine(s3, tmp_path, "b")).computed is False


def test_two_machines_compute_each_stage_once(s3: Proxy, tmp_path: Path) -> None:
    both = [on(tmp_path / name) for name in ("a", "b")]
    told = [process.communicate(timeout=60)[0].split() for process in both]
    assert [process.returncode for process in both] == [0, 0]
    assert all(sorted(pair) == ["False", "True"] for pair in zip(*told, strict=True)), told
    assert s3.sent("PUT", "manifest.json") == 3


def test_a_killed_machine_holds_up_others_for_no_longer_than_its_lease(s3: Proxy, tmp_path: Path) -> None:
    killed = on(tmp_path / "a", lease_s=4.0)
    wait_until(lambda: len(list((tmp_path / "a").glob("little_text/*/partial/lines"))) > 0)
    heard, outcomes = Heard(), []
    there = machine(s3, tmp_path, "b")
    waiter = threading.Thread(target=lambda: outcomes.append(make(there, SLOW, heard)))
    waiter.start()
    wait_until(lambda: len(heard.events) > 0)
    assert heard.events[0][0] == "waiting"
    assert f"process {killed.pid} on " in heard.events[0][1]
    os.killpg(killed.pid, signal.SIGKILL)
    killed.wait()
    started = time.monotonic()
    waiter.join()
    assert time.monotonic() - started < 4 + 10
    assert outcomes[0].computed
    assert heard.events[1][0] == "started"  # from the beginning: what the other had begun is in its mirror
    assert list((tmp_path / "a").glob("little_text/*/partial/lines"))
    local = make(open_store(str(tmp_path / "local")), SLOW)
    assert outcomes[0].handle.digest == local.handle.digest


# --- runs ------------------------------------------------------------------------------------------


def test_the_record_of_a_run_and_the_latest_are_for_everybody(s3: Proxy, tmp_path: Path) -> None:
    def settle(store: Store) -> Path:
        planner = Planner(store, executor(store)._identifier)
        text = planner(little_text, QUICK)
        planner(little_finish, ReportRecipe(), planner(little_summary, ReportRecipe(), text))
        manifests = [step.manifest for step in planner.steps if step.manifest]
        rows = [runs.stage_row(s, m, False) for s, m in zip(planner.steps, manifests, strict=True)]
        return runs.settle(store, "little", 1.0, rows, manifests)

    here = machine(s3, tmp_path, "a")
    run_chain(here)
    recorded = settle(here)
    summary = json.loads((recorded / "summary.json").read_text())
    assert summary["report"] == f"s3://{BUCKET}/team/omni/runs/{recorded.name}/report.html"
    assert ask(s3, "GET", f"/{BUCKET}/team/omni/latest").decode() == recorded.name
    there = machine(s3, tmp_path, "b")
    assert (there.root / "latest").resolve() == there.root / "runs" / recorded.name
    for name in ("summary.json", "report.html"):
        assert (there.root / "latest" / name).read_bytes() == (recorded / name).read_bytes()
    s3.requests.clear()
    assert settle(there).name == recorded.name  # nothing was computed, so the record is not written anew
    assert s3.sent("PUT", "summary.json") == 0


# --- faults ----------------------------------------------------------------------------------------


def test_a_run_gets_through_while_a_fifth_of_all_calls_go_wrong(s3: Proxy, tmp_path: Path) -> None:
    s3.by_chance(seed=5, share=0.2, faults=("500", "silence", "lost", "half"))
    assert run_chain(machine(s3, tmp_path, "a", timeout_s=0.5)) == [True, True, True]
    there = machine(s3, tmp_path, "b", timeout_s=0.5)
    assert run_chain(there, ReportRecipe(title="other")) == [False, True, True]
    assert len(s3.requests) > 60
    s3.fault = lambda method, path: ""
    local = open_store(str(tmp_path / "local"))
    run_chain(local), run_chain(local, ReportRecipe(title="other"))
    made = {
        name.split("/", 2)[0] + sha256_file(tmp_path / "x")
        for name in bucket(s3).list()
        if "/out/" in name
        if bucket(s3).download(name, tmp_path / "x")
    }
    assert made == {path.parts[-4] + sha256_file(path) for path in local.root.rglob("out/*")}


def omni(*words: str) -> int:
    return cli.main(list(words))


def told(capsys: pytest.CaptureFixture[str]) -> str:
    heard = capsys.readouterr()
    assert heard.err.count("\n") == 1, heard.err
    assert "Traceback" not in heard.err
    return heard.err


def test_what_a_person_did_wrong_is_one_sentence(
    s3: Proxy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    url = f"s3://{BUCKET}/team/omni"
    monkeypatch.setenv("OMNI_STORE", url)
    s3.fault = lambda method, path: "deny"
    assert omni("plan", "smoke") == 2
    assert "access is denied (list_objects_v2: AccessDenied); the credentials need s3:ListBucket" in told(
        capsys
    )
    s3.fault = lambda method, path: ""
    monkeypatch.setenv("OMNI_STORE", "s3://nowhere/x")
    assert omni("plan", "smoke") == 2
    assert "omni: s3://nowhere/x: there is no bucket nowhere; create it, or set OMNI_STORE" in told(capsys)
    monkeypatch.setenv("OMNI_STORE", url)
    monkeypatch.setenv("AWS_ENDPOINT_URL", "localhost:9000")
    assert omni("plan", "smoke") == 2
    assert "Invalid endpoint: localhost:9000" in told(capsys)
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    assert omni("plan", "smoke") == 2
    assert "no server answers" in (sentence := told(capsys))
    assert "127.0.0.1:9" in sentence
    monkeypatch.setenv("AWS_ENDPOINT_URL", s3.url)
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    assert omni("plan", "smoke") == 2
    assert "no credentials found; set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY" in told(capsys)
    monkeypatch.setenv("OMNI_CACHE", "/proc/cache")
    assert omni("plan", "smoke") == 2
    assert "set OMNI_CACHE to a directory you can write to" in told(capsys)


def test_a_failed_stage_is_nothing_in_the_bucket(s3: Proxy, tmp_path: Path) -> None:
    store = machine(s3, tmp_path, "a")
    with pytest.raises(ArithmeticError, match="14 goes wrong"):
        make(store, TokenizerRecipe(vocab_size=14))
    assert bucket(s3).list() == {}
