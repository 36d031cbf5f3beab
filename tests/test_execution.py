"""Leases, damage, kills, early cut-off: the promises of the store, on stages of a few milliseconds."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from omni_model.artifacts import Artifact, Manifest, Report
from omni_model.config import BadInput, ReportRecipe, Runtime, TokenizerRecipe
from omni_model.storage import Store, damages, open_store
from tasks.execute import Executor, Outcome, StageFailed
from tasks.fingerprint import CodeBase
from tasks.identity import Identifier
from tasks.planner import CURRENT, UNDECIDED, WILL_RUN, Planner
from tasks.stage import REGISTRY, Stage, stage_of
from tests.little_stages import little_finish, little_join, little_summary, little_text, little_wide

ROOT = Path(__file__).resolve().parent.parent
TEXT = stage_of(little_text)
SLOW = TokenizerRecipe(vocab_size=1000)  # 20 steps of a tenth of a second
QUICK = TokenizerRecipe(vocab_size=3)
PLAIN = ReportRecipe()


@pytest.fixture(autouse=True)
def only_registered_here() -> Iterator[None]:
    """The little stages are declared like real ones; nobody else should find them among those."""
    little = {name: REGISTRY.setdefault(name, stage) for name, stage in LITTLE.items()}
    yield
    for name in little:
        REGISTRY.pop(name, None)


LITTLE = {name: REGISTRY.pop(name) for name in list(REGISTRY) if name.startswith("little_")}


class Heard:
    """A listener that remembers."""

    def __init__(self) -> None:
        self.events: list[tuple[str, str]] = []

    def waiting(self, label: str, holder: str) -> None:
        self.events.append(("waiting", holder))

    def started(self, label: str) -> None:
        self.events.append(("started", label))

    def progressed(self, label: str, progress: dict[str, float]) -> None:
        self.events.append(("progressed", label))

    def finished(self, label: str, outcome: Outcome) -> None:
        self.events.append(("computed" if outcome.computed else "reused", label))

    def failed(self, label: str, error: Exception) -> None:
        self.events.append(("failed", label))


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return open_store(str(tmp_path / "store"))


def executor(store: Store, heard: Heard | None = None, **runtime: object) -> Executor:
    return Executor(store, Identifier(CodeBase(ROOT), 0), Runtime(**runtime), heard or Heard())  # type: ignore[arg-type]


def make(store: Store, recipe: TokenizerRecipe = QUICK, heard: Heard | None = None) -> Outcome:
    return executor(store, heard).make(TEXT, recipe, (), "little_text")


def wait_until(condition: Callable[[], bool], timeout_s: float = 20) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.02)


RUN = """
import sys
from pathlib import Path
from tests.test_execution import *
REGISTRY.update(LITTLE)
make(open_store(sys.argv[1]), TokenizerRecipe(vocab_size=int(sys.argv[2])))
"""


def run_elsewhere(store: Store, vocab_size: int) -> subprocess.Popen[bytes]:
    """The same stage from another process."""
    return subprocess.Popen([sys.executable, "-c", RUN, str(store.root), str(vocab_size)], cwd=ROOT)


def stage_processes(store: Store) -> list[int]:
    """Processes that were started on a job in this store."""
    found = []
    for entry in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            words = entry.read_bytes().split(b"\0")
        except OSError:
            continue
        if b"omni_model.launch" in words and any(str(store.root).encode() in word for word in words):
            found.append(int(entry.parent.name))
    return found


def test_computes_once_then_reuses(store: Store) -> None:
    heard = Heard()
    first, second = make(store, heard=heard), make(store, heard=heard)
    assert [event for event, _ in heard.events if event != "progressed"] == ["started", "computed", "reused"]
    assert first.handle == second.handle
    directory = store.directory("little_text", first.manifest.key)
    assert {path.name for path in directory.iterdir()} >= {"out", "manifest.json", "metrics.jsonl", "log.txt"}
    assert not (directory / "partial").exists()
    manifest = json.loads((directory / "manifest.json").read_text())
    assert set(manifest) >= {"schema", "stage", "key", "components", "files", "facts", "metrics"}
    assert directory.name == manifest["key"][:32]


def test_a_wide_stage_has_every_thread_and_the_machine_to_itself(store: Store) -> None:
    text, run = make(store).handle, executor(store, parallel_stages=2)
    tasks = [(stage_of(task), title) for title in "ab" for task in (little_wide, little_join)]
    reports = []

    def one(stage: Stage, title: str) -> None:
        reports.append(run.make(stage, ReportRecipe(title=title), (text,), title).handle)

    threads = [threading.Thread(target=one, args=each) for each in tasks]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(reports) == 4
    times = sorted(json.loads((report.out / "report.html").read_text()) for report in reports)
    wide = [each for each in times if each[2] == 2]
    assert len(wide) == 2
    for began, ended, _ in wide:
        assert all(other[1] <= began or ended <= other[0] for other in times if other[0] != began)


def test_the_last_input_may_come_any_number_of_times(store: Store) -> None:
    text, run = make(store).handle, executor(store)
    stage = stage_of(little_join)
    both = run.make(stage, ReportRecipe(), (text, text), "both")
    assert both.handle.headline == "2 inputs"
    assert list(both.manifest.components["inputs"]) == ["texts 1", "texts 2"]
    with pytest.raises(BadInput, match="'texts 2' must be a TextCorpus, not a Report"):
        run.make(stage, ReportRecipe(), (text, both.handle), "wrong")
    with pytest.raises(BadInput, match="takes 1 or more inputs"):
        run.make(stage, ReportRecipe(), (), "none")


def test_inline_gives_the_same_bytes(store: Store, tmp_path: Path) -> None:
    other = open_store(str(tmp_path / "inline"))
    inline = executor(other, inline=True).make(TEXT, QUICK, (), "little_text")
    assert inline.handle.digest == make(store).handle.digest


@pytest.mark.parametrize("harm", ["delete", "truncate", "flip", "flip quietly"])
def test_damage_is_named_and_rebuilt(store: Store, harm: str) -> None:
    made = make(store)
    path = made.handle.out / "documents.jsonl"
    before, stat = path.read_bytes(), path.stat()
    if harm == "delete":
        path.unlink()
    elif harm == "truncate":
        path.write_bytes(before[:-1])
    else:
        path.write_bytes(bytes([before[0] ^ 1]) + before[1:])
    if harm == "flip quietly":
        os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    directory = store.directory("little_text", made.manifest.key)
    assert str(path) in str(damages(directory, made.manifest, trust=True)[0])
    again = make(store)
    assert again.computed
    assert path.read_bytes() == before
    assert again.handle.digest == made.handle.digest


def test_a_failure_is_one_sentence_and_leaves_nothing_finished(store: Store) -> None:
    with pytest.raises(StageFailed, match=r"little_text failed: 14 goes wrong; log: /.*log.txt") as failed:
        make(store, TokenizerRecipe(vocab_size=14))
    assert "ArithmeticError" in Path(str(failed.value).split("log: ")[1]).read_text()
    with pytest.raises(BadInput, match="little_text: 13 is refused; choose another vocab_size"):
        make(store, TokenizerRecipe(vocab_size=13))
    assert not list(store.root.glob("little_text/*/manifest.json"))


def test_nothing_begins_after_a_failure(store: Store) -> None:
    heard = Heard()
    run = executor(store, heard)
    made = run.make(TEXT, QUICK, (), "first")
    with pytest.raises(StageFailed, match="14 goes wrong"):
        run.make(TEXT, TokenizerRecipe(vocab_size=14), (), "second")
    with pytest.raises(StageFailed, match="third was not begun, because the run had ended"):
        run.make(TEXT, TokenizerRecipe(vocab_size=5), (), "third")
    assert str(run.failure).startswith("second failed: 14 goes wrong")
    assert ("failed", "second") in heard.events
    assert run.make(TEXT, QUICK, (), "first").handle == made.handle  # what is there can still be had


@pytest.mark.skipif(sys.platform != "linux", reason="finds processes through /proc")
def test_a_killed_stage_says_so_and_continues_to_the_same_bytes(store: Store, tmp_path: Path) -> None:
    undisturbed = make(open_store(str(tmp_path / "other")), SLOW).handle.digest
    failures: list[Exception] = []

    def attempt() -> None:
        try:
            make(store, SLOW)
        except StageFailed as error:
            failures.append(error)

    thread = threading.Thread(target=attempt)
    thread.start()
    wait_until(lambda: len(list(store.root.glob("little_text/*/partial/lines"))) > 0)
    time.sleep(0.3)
    os.kill(stage_processes(store)[0], signal.SIGKILL)
    thread.join()
    assert "killed by SIGKILL" in str(failures[0])
    lines = next(store.root.glob("little_text/*/partial/lines"))
    assert 0 < len(lines.read_text().splitlines()) < 20
    assert make(store, SLOW).handle.digest == undisturbed


@pytest.mark.skipif(sys.platform != "linux", reason="finds processes through /proc")
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_no_orphan_outlives_its_parent(store: Store, number: int) -> None:
    parent = run_elsewhere(store, 1000)
    wait_until(lambda: len(stage_processes(store)) > 0)
    parent.send_signal(number)
    parent.wait()
    wait_until(lambda: not stage_processes(store))
    assert not list(store.root.glob("little_text/*/manifest.json"))
    assert make(store, SLOW).computed


@pytest.mark.skipif(sys.platform != "linux", reason="finds processes through /proc")
def test_two_runs_compute_once_and_a_killed_holder_blocks_nobody(store: Store) -> None:
    holder = run_elsewhere(store, 1000)
    wait_until(lambda: len(list(store.root.glob("little_text/*/partial/lines"))) > 0)
    heard = Heard()
    outcomes: list[Outcome] = []
    waiter = threading.Thread(target=lambda: outcomes.append(make(store, SLOW, heard)))
    waiter.start()
    wait_until(lambda: len(heard.events) > 0)
    event, who = heard.events[0]
    assert event == "waiting"
    assert f"process {holder.pid}" in who
    holder.kill()
    holder.wait()
    waiter.join()
    assert outcomes[0].computed  # it went on where the holder was killed
    assert make(store, SLOW).computed is False


def test_a_stopped_waiter_waits_no_longer(store: Store) -> None:
    holder = run_elsewhere(store, 1000)
    wait_until(lambda: len(list(store.root.glob("little_text/*/partial/lines"))) > 0)
    heard, ended = Heard(), threading.Event()
    run = executor(store, heard)

    def wait() -> None:
        with pytest.raises(InterruptedError):
            run.make(TEXT, SLOW, (), "little_text")
        ended.set()

    threading.Thread(target=wait).start()
    wait_until(lambda: len(heard.events) > 0)
    run.stop()
    assert ended.wait(timeout=1)
    assert holder.poll() is None
    holder.kill()
    holder.wait()


def test_a_waiter_takes_what_the_holder_made(store: Store) -> None:
    holder = run_elsewhere(store, 1000)
    wait_until(lambda: len(list(store.root.glob("little_text/*/partial/lines"))) > 0)
    assert make(store, SLOW).computed is False
    assert holder.wait() == 0


def test_another_schema_is_refused_by_name(store: Store) -> None:
    made = make(store)
    path = store.directory("little_text", made.manifest.key) / "manifest.json"
    path.write_text(path.read_text().replace('"schema": 1', '"schema": 2'))
    with pytest.raises(BadInput, match=r"manifest.json has schema 2 and this version reads schema 1"):
        make(store)


def test_a_manifest_that_cannot_be_read_is_damage(store: Store) -> None:
    made = make(store)
    path = store.directory("little_text", made.manifest.key) / "manifest.json"
    path.write_text("{")
    status, why = chain(store, QUICK)[0]
    assert (status, why) == (WILL_RUN, f"damaged: {path} cannot be read")
    assert make(store).handle == made.handle
    assert chain(store, QUICK)[0] == (CURRENT, "")


def test_a_handle_of_another_kind_is_refused(store: Store) -> None:
    made = make(store)
    with pytest.raises(BadInput, match="input 'report' must be a Report, not a TextCorpus"):
        executor(store).make(stage_of(little_finish), ReportRecipe(), (made.handle,), "little_finish")
    with pytest.raises(BadInput, match="takes 1 inputs"):
        executor(store).make(stage_of(little_finish), ReportRecipe(), (), "little_finish")


def test_handles_survive_json(store: Store) -> None:
    handle = make(store).handle
    assert Artifact.from_json(json.loads(json.dumps(handle.to_json()))) == handle


# --- the plan ------------------------------------------------------------------------------------


def chain(store: Store, text: TokenizerRecipe, summary: ReportRecipe = PLAIN) -> list[tuple[str, str]]:
    """Status and reason of the three little stages."""
    planner = Planner(store, Identifier(CodeBase(ROOT), 0))
    lines = planner(little_text, text)
    planner(little_finish, summary, planner(little_summary, summary, lines))
    return [(step.status, "; ".join(step.why)) for step in planner.steps]


def run_chain(store: Store, text: TokenizerRecipe, summary: ReportRecipe = PLAIN) -> list[bool]:
    """Run the three little stages; which of them were computed."""
    run = executor(store)

    def made(stage: Stage, recipe: object, *inputs: Artifact) -> Outcome:
        return run.make(stage, recipe, inputs, stage.name)

    first = made(TEXT, text)
    second = made(stage_of(little_summary), summary, first.handle)
    third = made(stage_of(little_finish), summary, second.handle)
    assert isinstance(third.handle, Report)
    return [outcome.computed for outcome in (first, second, third)]


def test_equal_bytes_cut_off_what_follows(store: Store) -> None:
    assert [status for status, _ in chain(store, QUICK)] == [WILL_RUN] * 3
    assert run_chain(store, QUICK) == [True, True, True]
    assert chain(store, QUICK) == [(CURRENT, "")] * 3
    five = TokenizerRecipe(vocab_size=5)  # other lines, the same parities
    assert chain(store, five) == [
        (WILL_RUN, "vocab_size 3 -> 5"),
        (UNDECIDED, "waits for little_text"),
        (UNDECIDED, "waits for little_summary"),
    ]
    assert run_chain(store, five) == [True, True, False]
    assert chain(store, five) == [(CURRENT, "")] * 3


def test_a_change_that_cannot_be_cut_off_is_not_called_undecided(store: Store) -> None:
    run_chain(store, QUICK)
    statuses = chain(store, TokenizerRecipe(vocab_size=5), ReportRecipe(title="other"))
    assert [status for status, _ in statuses] == [WILL_RUN] * 3
    assert statuses[1][1] == "title nanochat-omni -> other"


def test_plan_tells_of_damage_and_of_unfinished_work(store: Store) -> None:
    run_chain(store, QUICK)
    made = make(store)
    (made.handle.out / "documents.jsonl").unlink()
    status, why = chain(store, QUICK)[0]
    assert status == WILL_RUN
    assert why.endswith("documents.jsonl: missing")
    assert chain(store, QUICK)[1][0] == UNDECIDED
    with pytest.raises(StageFailed):
        make(store, TokenizerRecipe(vocab_size=14))
    assert chain(store, TokenizerRecipe(vocab_size=14))[0] == (WILL_RUN, "continues an unfinished run")


def test_a_manifest_that_names_another_key_is_refused(store: Store) -> None:
    made = make(store)
    directory = store.directory("little_text", made.manifest.key)
    other = Manifest(**{**made.manifest.__dict__, "key": "0" * 64})
    other.write(directory)
    with pytest.raises(BadInput, match="is about key 00000000"):
        make(store)


# -- several processes for one stage ------------------------------------------------------------------

SHARED = LITTLE["little_share"]


@pytest.mark.slow
def test_ranks_share_a_stage_and_the_first_one_seals(store: Store) -> None:
    outcome = executor(store, gpus=2).make(SHARED, PLAIN, (), "little_share")
    assert json.loads((outcome.handle.out / "report.html").read_text()) == {"rank": 0, "world": 2}
    told = (Path(outcome.handle.uri) / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in told] == [0]
    alone = executor(store).make(SHARED, PLAIN, (), "little_share")
    assert not alone.computed, "how many processes share a stage is no part of its key"


@pytest.mark.slow
def test_what_any_rank_refuses_is_told(store: Store) -> None:
    with pytest.raises(BadInput, match="13 is refused by the second rank"):
        executor(store, gpus=2).make(SHARED, ReportRecipe(listed_items=13), (), "little_share")


@pytest.mark.slow
def test_no_rank_outlives_a_stopped_run(store: Store) -> None:
    runner = executor(store, gpus=2)
    failures: list[Exception] = []

    def attempt() -> None:
        try:
            runner.make(SHARED, ReportRecipe(listed_items=14), (), "little_share")
        except Exception as error:
            failures.append(error)

    thread = threading.Thread(target=attempt)
    thread.start()
    wait_until(lambda: len(stage_processes(store)) >= 2 and any(store.root.rglob("metrics.jsonl")), 60)
    runner.stop()
    thread.join(timeout=20)
    assert [type(failure) for failure in failures] == [StageFailed]
    wait_until(lambda: not stage_processes(store))
