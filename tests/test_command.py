"""The `omni` command around the runs: help, refusals, the doctor, the guard, the wheel, the UI."""

import dataclasses
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
import zipfile
from pathlib import Path

import pytest

from flows import verbs
from flows.display import LiveDisplay
from flows.planning import plan
from flows.recipes import RECIPES, resolve
from omni_model.artifacts import Manifest
from omni_model.config import BadInput, PretrainRecipe
from omni_model.storage import open_store
from tasks.planner import WILL_RUN, Step
from tasks.prefect_server import embedded_server, free_port, is_healthy, use_settings
from tasks.stage import REGISTRY

ROOT = Path(__file__).resolve().parent.parent


def omni(store: Path, *words: str, **variables: str) -> subprocess.CompletedProcess[str]:
    clean = {k: v for k, v in os.environ.items() if not k.startswith("PREFECT_")}
    return subprocess.run(
        [sys.executable, "-m", "flows.cli", *words],
        cwd=ROOT,
        env=clean | {"OMNI_STORE": str(store)} | variables,
        capture_output=True,
        text=True,
        timeout=120,
    )


@pytest.mark.parametrize(
    "verb", ["run", "plan", "why", "verify", "ui", "doctor", "listen", "import-nanochat", "export-nanochat"]
)
def test_every_verb_has_help_with_examples(verb: str, tmp_path: Path) -> None:
    done = omni(tmp_path, verb, "--help")
    assert done.returncode == 0
    assert f"omni {verb}" in done.stdout.split("examples:")[1]


def test_a_plan_of_an_empty_store_says_that_everything_runs(tmp_path: Path) -> None:
    rows = json.loads(omni(tmp_path, "plan", "--json").stdout)
    assert [row["name"] for row in rows].count("write_report") == 1
    assert len({row["name"] for row in rows}) == len(rows)
    for row in rows:
        assert {"stage", "status", "key", "why"} <= set(row)
        assert (row["status"], row["why"]) == (WILL_RUN, "never run")
    assert "19 of 19 stages will run" in omni(tmp_path, "plan").stdout


def test_a_server_that_does_not_answer_is_named(tmp_path: Path) -> None:
    url = f"http://127.0.0.1:{free_port()}/api"
    done = omni(tmp_path, "run", "smoke", PREFECT_API_URL=url)
    assert done.returncode == 2
    assert f"no Prefect server answers at PREFECT_API_URL {url}" in done.stderr


@pytest.mark.parametrize("port", ["99999", "taken"])
def test_a_port_that_cannot_be_opened_is_refused(tmp_path: Path, port: str) -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = str(other.getsockname()[1]) if port == "taken" else port
        done = omni(tmp_path, "ui", "--port", port)
    assert done.returncode == 2
    assert f"cannot listen on port {port}" in done.stderr
    assert "choose another with --port" in done.stderr


def test_doctor_looks_at_everything(tmp_path: Path) -> None:
    done = omni(tmp_path, "doctor", "--json")
    found = {check["name"]: check for check in json.loads(done.stdout)}
    assert {"Python", "torch", "prefect", "espeakng-loader", "machine", "store"} <= set(found)
    assert {"Prefect server", "encoder weights"} <= set(found)
    assert any(name.startswith("attention, ") for name in found)
    assert found["store"]["found"].startswith(str(tmp_path))
    assert done.returncode == (0 if all(check["good"] for check in found.values()) else 1)


def test_the_live_display_has_one_line_a_stage(tmp_path: Path) -> None:
    steps, _ = plan(resolve("smoke", []), open_store(str(tmp_path)))
    shown = LiveDisplay(steps)
    shown.started("make_encoder")
    shown.progressed("make_encoder", {"time": 1.0, "step": 5, "total": 10, "loss": 0.5})
    shown.waiting("synthesize_sines", "process 7")
    lines = shown.lines().splitlines()
    assert [line.split()[1] for line in lines] == [step.label for step in steps]
    assert "waiting, held by process 7" in lines[0]
    assert " 50%  loss 0.5" in lines[1]


def costly_step(seconds: float) -> Step:
    timings = {"seconds": seconds, "peak_memory_bytes": 1.0}
    manifest = Manifest("pretrain_gpt", "0" * 64, "GptCheckpoint", {}, [], {}, {}, timings, {})
    why = ("model.attention.attend changed",)
    step = Step(REGISTRY["pretrain_gpt"], PretrainRecipe(), (), WILL_RUN, why, None, manifest, costly=True)
    return dataclasses.replace(step, label="pretrain_gpt")


def test_hours_of_work_are_not_redone_for_changed_code_unasked() -> None:
    with pytest.raises(BadInput, match=r"pretrain_gpt took 2.0 h and model.attention.attend changed; --yes"):
        verbs.guard([costly_step(7200)], "stop", yes=False)
    verbs.guard([costly_step(7200)], "stop", yes=True)
    verbs.guard([costly_step(7200)], "yes", yes=False)
    verbs.guard([costly_step(60)], "stop", yes=False)
    verbs.guard([dataclasses.replace(costly_step(7200), costly=False)], "stop", yes=False)


def test_every_recipe_is_deployed_as_a_flow() -> None:
    text = (ROOT / "prefect.yaml").read_text()
    entrypoints = set(re.findall(r"entrypoint: flows/deployments.py:(\w+)", text))
    assert entrypoints == {name.replace("-", "_") for name in RECIPES}


def test_prefect_settings_agree_with_the_file_for_a_team() -> None:
    from tasks.prefect_server import SETTINGS

    lines = (ROOT / "infra" / "prefect.env").read_text().splitlines()
    for line in lines:
        if line and not line.startswith("#"):
            name, value = line.split("=", 1)
            assert SETTINGS[name] == value


def test_the_readme_tells_of_every_verb_and_setting() -> None:
    text = (ROOT / "README.md").read_text()
    for verb in ("run", "plan", "why", "verify", "ui", "doctor", "import-nanochat", "export-nanochat"):
        assert f"omni {verb}" in text
    for name in RECIPES:
        assert f"`{name}`" in text


@pytest.mark.slow
def test_the_wheel_ships_the_rooms_with_their_data_and_no_tests(tmp_path: Path) -> None:
    tree = tmp_path / "tree"
    tree.mkdir()
    for name in ("flows", "tasks", "omni_model", "tests"):
        shutil.copytree(ROOT / name, tree / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tree)
    build = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "--no-index", "-q"]
    subprocess.run([*build, "-w", str(tmp_path), str(tree)], check=True, capture_output=True)
    (wheel,) = tmp_path.glob("*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    tops = {name.split("/")[0] for name in names if ".dist-info" not in name}
    assert tops == {"flows", "tasks", "omni_model"}
    data = [p for p in (ROOT / "omni_model").rglob("*") if p.suffix in (".json", ".css", ".html")]
    assert len(data) >= 3
    for path in data:
        assert path.relative_to(ROOT).as_posix() in names


@pytest.mark.slow
def test_the_ui_opens_on_any_port_with_relative_addresses(tmp_path: Path) -> None:
    port = free_port()
    clean = {k: v for k, v in os.environ.items() if not k.startswith("PREFECT_")}
    process = subprocess.Popen(
        [sys.executable, "-m", "flows.cli", "ui", "--port", str(port)],
        cwd=ROOT,
        env=clean | {"OMNI_STORE": str(tmp_path)},
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        deadline = time.monotonic() + 120
        while not is_healthy(f"http://127.0.0.1:{port}/api") and time.monotonic() < deadline:
            time.sleep(0.1)
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/ui-settings", timeout=10) as answer:
            assert json.load(answer)["api_url"] == "/api"
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/", timeout=10) as answer:
            page = answer.read().decode()
        assert not re.findall(r'(?:src|href)="https?://', page)
        again = omni(tmp_path, "ui", "--port", str(free_port()))
        assert again.returncode == 2
        assert f"already open at http://127.0.0.1:{port}" in again.stderr
        assert f"http://127.0.0.1:{port}/api (omni ui)" in omni(tmp_path, "doctor").stdout
    finally:
        process.terminate()
        assert process.wait(timeout=20) == 0
        assert not (tmp_path / ".prefect" / "server.json").exists()


@pytest.mark.slow
def test_the_embedded_server_ends_with_its_parent(tmp_path: Path) -> None:
    use = [sys.executable, "-c", SERVER_SCRIPT, str(tmp_path)]
    parent = subprocess.Popen(use, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    assert parent.stdout is not None
    url = parent.stdout.readline().strip()
    assert is_healthy(url)
    parent.kill()
    parent.wait()
    deadline = time.monotonic() + 10
    while is_healthy(url) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not is_healthy(url)
    use_settings(tmp_path)
    with embedded_server(open_store(str(tmp_path))) as again:
        assert is_healthy(again)


SERVER_SCRIPT = """
import sys, time
from pathlib import Path
from omni_model.storage import open_store
from tasks.prefect_server import embedded_server, use_settings
use_settings(Path(sys.argv[1]))
with embedded_server(open_store(sys.argv[1])) as url:
    print(url, flush=True)
    time.sleep(300)
"""
