"""The command as a person uses it: whole runs of the small demo, what re-runs and what does not."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from tests import small

ROOT = Path(__file__).resolve().parent.parent
AFTER_LORA = {"finetune_lora", "score_benchmark", "diagnose", "learn_familiarity", "write_report"}

pytestmark = pytest.mark.slow


def omni(store: Path, *words: str, root: Path = ROOT) -> subprocess.CompletedProcess[str]:
    """Run the command from a source tree on a store."""
    return subprocess.run(
        [sys.executable, "-m", "flows.cli", *words],
        cwd=root,
        env=environment(store),
        capture_output=True,
        text=True,
        timeout=400,
    )


def environment(store: Path) -> dict[str, str]:
    clean = {k: v for k, v in os.environ.items() if not k.startswith("PREFECT_")}
    return clean | {"OMNI_STORE": str(store)}


def run(store: Path, *settings: str, root: Path = ROOT) -> dict[str, Any]:
    """A whole run; its summary."""
    done = omni(store, "run", *small.demo(*settings), "--json", root=root)
    assert done.returncode == 0, done.stdout + done.stderr
    return dict(json.loads(done.stdout))


def plan(store: Path, *settings: str, root: Path = ROOT) -> dict[str, str]:
    """Stage name -> status."""
    done = omni(store, "plan", *small.demo(*settings), "--json", root=root)
    assert done.returncode == 0, done.stderr
    return {step["name"]: step["status"] for step in json.loads(done.stdout)}


def not_current(statuses: dict[str, str]) -> set[str]:
    return {name for name, status in statuses.items() if status != "current"}


def payloads(store: Path) -> dict[str, str]:
    """Every payload file of a store and its sha256, as the manifests say."""
    return {
        f"{manifest['stage']}/{manifest['key']}/{file['path']}": file["sha256"]
        for path in store.glob("*/*/manifest.json")
        for manifest in [json.loads(path.read_text())]
        for file in manifest["files"]
    }


def processes_on(store: Path) -> list[int]:
    """Processes whose command line or environment names the store, this one and its parents aside."""
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            words = (entry / "cmdline").read_bytes() + (entry / "environ").read_bytes()
            state = (entry / "stat").read_text().rsplit(")", 1)[1].split()[0]
        except OSError:
            continue
        if str(store).encode() in words and state != "Z" and int(entry.name) != os.getpid():
            found.append(int(entry.name))
    return found


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store with one finished small demo. Tests copy it."""
    store = tmp_path_factory.mktemp("runs") / "store"
    summary = run(store)
    assert {stage["status"] for stage in summary["stages"]} == {"computed"}
    return store


@pytest.fixture
def store(made: Path, tmp_path: Path) -> Path:
    shutil.copytree(made, tmp_path / "store", symlinks=True)
    return tmp_path / "store"


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """A copy of the source that a test may change."""
    for name in ("flows", "tasks", "omni_model"):
        shutil.copytree(ROOT / name, tmp_path / "tree" / name, ignore=shutil.ignore_patterns("__pycache__"))
    return tmp_path / "tree"


def edit(path: Path, old: str, new: str) -> None:
    text = path.read_text()
    assert old in text, f"{path} has no {old!r}"
    path.write_text(text.replace(old, new, 1))


def test_summary_says_what_programs_rely_on(made: Path) -> None:
    summary = json.loads((made / "latest" / "summary.json").read_text())
    assert summary["schema"] == 1
    assert summary["recipe"] == "demo"
    assert summary["wall_s"] > 0
    assert len(summary["stages"]) == 19
    for stage in summary["stages"]:
        assert {"name", "key", "status", "seconds", "metrics"} <= set(stage)
    score = summary["audiobench_mini"]
    assert {"accuracy", "ci95", "margin_ci95", "groups", "baselines"} <= set(score)
    assert {b["kind"] for b in score["baselines"].values()} == {"no_audio", "ablation", "ceiling"}
    page = Path(summary["report"]).read_text()
    assert "How this run was made" in page
    assert "http://" not in page.replace("http://www.w3.org", "")
    assert "https://" not in page


def test_nothing_to_do_changes_nothing(store: Path) -> None:
    plan(store)  # a copied store has other inodes, so the first look hashes once and notes it
    before = {path: path.stat().st_mtime_ns for path in store.rglob("*.json") if ".prefect" not in str(path)}
    done = omni(store, "run", *small.demo())
    assert done.returncode == 0
    assert "reused" in done.stdout
    assert "computed" not in done.stdout
    assert before == {path: path.stat().st_mtime_ns for path in before}
    assert not_current(plan(store)) == set()


def test_a_lora_field_re_runs_lora_and_what_follows(store: Path) -> None:
    statuses = plan(store, "lora.lr=0.001")
    assert not_current(statuses) == AFTER_LORA
    assert statuses["finetune_lora"] == "will run"
    why = omni(store, "why", "finetune_lora", *small.demo("lora.lr=0.001"))
    assert "lr 0.002 -> 0.001" in why.stdout
    summary = run(store, "lora.lr=0.001")
    assert {s["name"] for s in summary["stages"] if s["status"] == "computed"} == AFTER_LORA


def test_runtime_is_not_identity(store: Path) -> None:
    assert not_current(plan(store, "runtime.threads=2", "runtime.parallel_stages=1")) == set()


def test_comments_docstrings_formatting_and_telemetry_re_run_nothing(store: Path, tree: Path) -> None:
    assert not_current(plan(store, root=tree)) == set()
    for path in (tree / "omni_model").rglob("*.py"):
        path.write_text("# A new comment.\n" + path.read_text().replace('"""', '"""Reworded. ', 1) + "\n\n\n")
    edit(tree / "omni_model" / "telemetry.py", "round(time.time(), 3)", "round(time.time(), 6)")
    assert not_current(plan(store, root=tree)) == set()


def test_a_later_field_at_its_old_meaning_re_runs_nothing(store: Path, tree: Path) -> None:
    learning = tree / "omni_model" / "config" / "learning.py"
    edit(learning, "config.base import BadInput, Recipe\n", "config.base import BadInput, Recipe, added\n")
    edit(
        learning,
        "    projector_lr: float = 1e-3\n",
        "    projector_lr: float = 1e-3\n    dropout: float = added(0.5, as_before=0.5)\n",
    )
    assert not_current(plan(store, root=tree)) == set()
    assert not_current(plan(store, "lora.dropout=0.25", root=tree)) == AFTER_LORA


def test_a_changed_function_runs_its_stage_and_equal_bytes_stop_there(store: Path, tree: Path) -> None:
    questions = tree / "omni_model" / "evaluation" / "benchmark_choice.py"
    edit(questions, "rng.permutation(len(things))]", "rng.permutation(len(list(things)))]")
    statuses = plan(store, root=tree)
    assert statuses["build_benchmark"] == "will run"
    assert statuses["score_benchmark"] in ("undecided", "will run")
    why = omni(store, "why", "build_benchmark", *small.demo(), root=tree)
    assert "evaluation.benchmark_choice.shuffled changed" in why.stdout
    summary = run(store, root=tree)
    computed = {stage["name"] for stage in summary["stages"] if stage["status"] == "computed"}
    # Those that reach the changed function through the benchmark's module run too; training never does.
    assert "build_benchmark" in computed
    assert not computed & {"learn_lessons", "align_projector", "finetune_lora", "synthesize_texture"}


def test_damage_is_named_and_one_stage_is_made_again(store: Path) -> None:
    (path,) = store.glob("align_projector/*/out/model.safetensors")
    content = path.read_bytes()
    path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    verified = omni(store, "verify")
    assert verified.returncode == 1
    assert str(path) in verified.stdout
    summary = run(store)
    assert [s["name"] for s in summary["stages"] if s["status"] == "computed"] == ["align_projector"]
    assert path.read_bytes() == content
    assert omni(store, "verify").returncode == 0


def test_bad_input_is_one_sentence_with_code_2(store: Path, tmp_path: Path) -> None:
    for words, sentence in (
        (("run", "dmeo"), "there is no recipe 'dmeo'; did you mean 'demo'?"),
        (("run", "demo", "--set", "lora.rnk=1"), "did you mean 'rank'?"),
        (("why", "finetune_loar"), "did you mean 'finetune_lora'?"),
    ):
        done = omni(store, *words)
        assert done.returncode == 2
        assert sentence in done.stderr
        assert len(done.stderr.strip().splitlines()) == 1
    (tmp_path / "file").write_text("")
    done = omni(tmp_path / "file" / "store", "plan")
    assert done.returncode == 2
    assert "set OMNI_STORE to a directory you can write to" in done.stderr


def test_the_prefect_key_of_every_stage_is_the_planners(made: Path) -> None:
    """Both are asked for the same finished stages, through the policy that Prefect itself calls."""
    from flows.planning import plan as make_plan
    from flows.recipes import resolve
    from omni_model.config import Runtime
    from omni_model.storage import open_store
    from tasks.execute import Executor
    from tasks.prefect_adapter import StagePolicy, record_path
    from tests.test_execution import Heard

    store = open_store(str(made))
    steps, identifier = make_plan(resolve("demo", list(small.SETTINGS)), store)
    executor = Executor(store, identifier, Runtime(), Heard())
    for step in steps:
        assert step.identity is not None
        references = {
            name: {"stage": source.stage.name, "key": source.identity.key}
            for name, source in zip(step.stage.edges(len(step.inputs)), step.inputs, strict=True)
            if source.identity is not None
        }
        policy = StagePolicy(executor, store, step.stage, step.recipe)
        key = policy.compute_key(None, {"inputs": references}, {})  # type: ignore[arg-type]
        assert key == record_path(step.stage.name, step.identity.key)
        assert (made / key).exists()


@pytest.mark.skipif(sys.platform != "linux", reason="finds processes through /proc")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_no_process_outlives_a_stopped_run_and_the_next_completes(
    store: Path, made: Path, number: signal.Signals
) -> None:
    for stage in AFTER_LORA:
        shutil.rmtree(store / stage)
    running = subprocess.Popen(
        [sys.executable, "-m", "flows.cli", "run", *small.demo("runtime.checkpoint_every_s=0.05")],
        cwd=ROOT,
        env=environment(store),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    deadline = time.monotonic() + 120
    while not list(store.glob("finetune_lora/*/metrics.jsonl")) and time.monotonic() < deadline:
        time.sleep(0.05)
    running.send_signal(number)
    _, told = running.communicate(timeout=60)
    if number == signal.SIGINT:
        assert "run the same command again to continue" in told
    deadline = time.monotonic() + 10
    while processes_on(store) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert processes_on(store) == []
    assert not list(store.glob("finetune_lora/*/manifest.json"))
    run(store)
    assert payloads(store) == payloads(made)


@pytest.mark.skipif(sys.platform != "linux", reason="finds processes through /proc")
def test_two_runs_at_once_compute_each_stage_once(store: Path, made: Path) -> None:
    for stage in AFTER_LORA:
        shutil.rmtree(store / stage)
    command = [sys.executable, "-m", "flows.cli", "run", *small.demo()]
    quiet, told = subprocess.DEVNULL, subprocess.PIPE
    pair = [
        subprocess.Popen(command, cwd=ROOT, env=environment(store), stdout=quiet, stderr=told, text=True)
        for _ in range(2)
    ]
    lines = [line for process in pair for line in process.communicate(timeout=300)[1].splitlines()]
    assert [process.returncode for process in pair] == [0, 0]
    for name in AFTER_LORA:
        assert sum(line.startswith(f"{name}: computed in") for line in lines) == 1, name
        assert sum(line == f"{name}: reused" for line in lines) == 1, name
    assert any("held by process" in line for line in lines)
    assert payloads(store) == payloads(made)
