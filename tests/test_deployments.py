"""A real server, every deployment, a worker: what a team with a GPU pool does, on loopback."""

import json
import os
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from flows.recipes import RECIPES
from tasks.prefect_server import SETTINGS, free_port, is_healthy

ROOT = Path(__file__).resolve().parent.parent
BIN = Path(sys.executable).parent
# The smoke made small: the same stages and keys in a fraction of the time.
SMALL = {
    "encoder": {"width": 32, "num_layers": 1, "num_heads": 2},
    "overfit": {
        "gpt": {"n_layer": 1, "n_embd": 64, "n_head": 2, "n_kv_head": 2, "sequence_len": 256},
        "projector": {"stack": 8, "hidden": 32},
        "steps": 12,
        "lr": 0.01,
        "min_loss_drop": 0.1,
    },
}

pytestmark = pytest.mark.slow


@dataclass
class Team:
    """A server with every deployment and one worker."""

    url: str
    store: Path
    environment: dict[str, str]

    def prefect(self, *words: str) -> str:
        done = subprocess.run(
            [BIN / "prefect", "--no-prompt", *words],
            cwd=ROOT,
            env=self.environment,
            capture_output=True,
            text=True,
            timeout=300,
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    def post(self, path: str, body: dict[str, Any] | None = None) -> Any:
        request = urllib.request.Request(
            f"{self.url}{path}",
            data=json.dumps(body or {}).encode(),
            headers={"content-type": "application/json"},
        )
        with urllib.request.urlopen(request, timeout=30) as answer:
            return json.load(answer)

    def run(self, deployment: str, recipe: dict[str, Any]) -> dict[str, Any]:
        """Run a deployment to its end; the flow run."""
        before = {run["id"] for run in self.post("/flow_runs/filter")}
        self.prefect("deployment", "run", deployment, "--param", f"recipe={json.dumps(recipe)}", "--watch")
        (run,) = [run for run in self.post("/flow_runs/filter") if run["id"] not in before]
        return dict(run)

    def task_states(self, run: dict[str, Any]) -> dict[str, str]:
        """Task run name -> state name, once the server has recorded the last of them."""
        for _ in range(50):
            found = self.post("/task_runs/filter", {"flow_runs": {"id": {"any_": [run["id"]]}}})
            states = {task["name"]: task["state_name"] for task in found}
            if len(states) == 5 and not set(states.values()) & {"Running", "Pending"}:
                return states
            time.sleep(0.2)
        return states


@pytest.fixture(scope="module")
def team(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Team]:
    home = tmp_path_factory.mktemp("team")
    port = free_port()
    url = f"http://127.0.0.1:{port}/api"
    environment = (
        os.environ
        | SETTINGS
        | {
            "PREFECT_HOME": str(home / "prefect"),
            "PREFECT_API_URL": url,
            "OMNI_STORE": str(home / "store"),
            "OMNI_ROOT": str(ROOT),
        }
    )
    with (home / "server.log").open("wb") as log:
        server = subprocess.Popen(
            [sys.executable, "-m", "tasks.prefect_server", str(port)],
            cwd=ROOT,
            env=environment,
            stdin=subprocess.PIPE,
            stdout=log,
            stderr=log,
        )
    worker = None
    try:
        for _ in range(600):
            if is_healthy(url):
                break
            time.sleep(0.2)
        team = Team(url, home / "store", environment)
        team.prefect("work-pool", "create", "ailab", "--type", "process")
        team.prefect("deploy", "--all")
        with (home / "worker.log").open("wb") as log:
            worker = subprocess.Popen(
                [BIN / "prefect", "worker", "start", "--pool", "ailab", "--limit", "1"],
                cwd=ROOT,
                env=environment,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        yield team
    finally:
        for process in filter(None, (worker, server)):
            process.terminate()
            try:
                process.wait(timeout=10)
            except subprocess.TimeoutExpired:
                process.kill()


def test_every_deployment_is_there_and_the_smoke_has_a_schedule(team: Team) -> None:
    deployments = {d["name"]: d for d in team.post("/deployments/filter")}
    assert set(deployments) == {*RECIPES, "nightly-smoke"}
    speaking = {name for name, d in deployments.items() if d["work_queue_name"] == "speech"}
    assert speaking == {"cosyvoice", "indextts"}
    assert {d["work_pool_name"] for d in deployments.values()} == {"ailab"}
    (schedule,) = deployments["nightly-smoke"]["schedules"]
    assert schedule["active"]
    assert schedule["schedule"]["cron"] == "0 3 * * *"


def test_a_second_run_shows_every_stage_as_cached(team: Team) -> None:
    first = team.run("smoke/smoke", SMALL)
    assert first["state_name"] == "Completed"
    assert set(team.task_states(first).values()) == {"Completed"}
    artifacts = {a["key"]: a for a in team.post("/artifacts/filter")}
    assert set(artifacts) == {"plan", "metrics", "report"}
    assert "will run" in artifacts["plan"]["data"]
    assert "loss drop" in artifacts["metrics"]["data"]
    assert "](data:image/" in artifacts["report"]["data"]

    second = team.run("smoke/smoke", SMALL)
    assert second["state_name"] == "Completed"
    assert set(team.task_states(second).values()) == {"Cached"}

    (report,) = team.store.glob("write_smoke_report/*/out/report.html")
    report.unlink()
    third = team.run("smoke/smoke", SMALL)
    states = team.task_states(third)
    assert [name for name, state in states.items() if state == "Completed"] == ["write_smoke_report"]


def test_an_unknown_field_fails_the_run_by_name(team: Team) -> None:
    with pytest.raises(AssertionError, match="rnk"):
        team.prefect("deployment", "run", "smoke/smoke", "--param", 'recipe={"rnk": 1}', "--watch")
