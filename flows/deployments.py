"""The flows as Prefect sees them: `prefect.yaml` points here, and `omni run` calls the same functions."""

import time
from pathlib import Path
from typing import Any

from prefect import Flow, flow
from prefect.artifacts import create_markdown_artifact
from prefect.exceptions import TerminationSignal as TerminationSignal
from prefect.logging import get_run_logger
from prefect.logging.handlers import APILogWorker
from prefect.task_runners import ThreadPoolTaskRunner

from flows import runs
from flows.planning import plan, plan_markdown
from flows.recipes import RECIPES, Run, settle
from omni_model.artifacts import Report
from omni_model.storage import Store, default_root, fresh_store, open_store
from tasks.execute import Executor, Listener, Outcome
from tasks.planner import Step
from tasks.prefect_adapter import PrefectRunner

# Threads only wait: for an input, a lease or a stage's process. How many stages compute at once is Runtime's.
WAITING_THREADS = 64
LOGS_TIMEOUT_S = 5.0


class LogListener:
    """Tells a deployed run's log what happens to its stages."""

    def waiting(self, label: str, holder: str) -> None:
        get_run_logger().info("%s waits: it is held by %s", label, holder)

    def started(self, label: str) -> None:
        get_run_logger().info("%s starts", label)

    def progressed(self, label: str, progress: dict[str, float]) -> None:
        """Nothing: every line of a log is a row of the server's database."""

    def finished(self, label: str, outcome: Outcome) -> None:
        get_run_logger().info("%s is %s", label, "computed" if outcome.computed else "reused")

    def failed(self, label: str, error: Exception) -> None:
        get_run_logger().error("%s", error)


def carry_out(run: Run, listener: Listener) -> Path:
    """Run a flow inside a Prefect flow run and show its plan, figures and report in the UI.

    Returns the run's directory, which is gone again after a fresh run.
    """
    store = open_store(run.runtime.store or default_root())
    run = settle(run, store)  # here, on the machine that computes
    if not run.runtime.fresh:
        return _carry_out(run, store, listener)
    with fresh_store(store) as scratch:
        return _carry_out(run, scratch, listener)


def _carry_out(run: Run, store: Store, listener: Listener) -> Path:
    started = time.time()
    steps, identifier = plan(run, store)
    create_markdown_artifact(plan_markdown(steps), key="plan", description="what this run will do, and why")
    executor = Executor(store, identifier, run.runtime, listener)
    runner = PrefectRunner(store, executor, steps)
    try:
        run.flow(runner, run.recipe)
        outcomes = runner.finish()
    except BaseException:
        executor.stop()
        raise
    return conclude(run, store, started, outcomes)


def conclude(run: Run, store: Store, started: float, outcomes: list[tuple[Step, Outcome]]) -> Path:
    """Record a finished run and show its figures and report in the UI."""
    rows = [runs.stage_row(step, outcome.manifest, outcome.computed) for step, outcome in outcomes]
    create_markdown_artifact(
        runs.rows_markdown(rows), key="metrics", description="every stage and its figures"
    )
    for _, outcome in outcomes:
        if isinstance(outcome.handle, Report):
            store.fetch(outcome.handle.stage, outcome.handle.key)
            text = (outcome.handle.out / "report.md").read_text()
            create_markdown_artifact(text, key="report", description=outcome.handle.headline)
    return runs.settle(store, run.name, time.time() - started, rows, [o.manifest for _, o in outcomes])


def as_flow(run: Run, listener: Listener) -> Flow[Any, str]:
    """A named run as a Prefect flow with parameters `recipe` and `runtime`."""

    def body(recipe: Any = run.recipe, runtime: Any = run.runtime) -> str:
        return str(carry_out(Run(run.name, run.flow, recipe, runtime), listener))

    body.__name__, body.__doc__ = run.name, run.flow.__doc__
    body.__annotations__ |= {"recipe": type(run.recipe), "runtime": type(run.runtime)}
    runner: Any = ThreadPoolTaskRunner(max_workers=WAITING_THREADS)  # its type parameter cannot be spelled
    return flow(name=run.name, task_runner=runner)(body)


def send_logs() -> None:
    """Send what the flow logged to a server that is about to close."""
    APILogWorker.drain_all(timeout=LOGS_TIMEOUT_S)


smoke = as_flow(RECIPES["smoke"], LogListener())
demo = as_flow(RECIPES["demo"], LogListener())
base_tiny = as_flow(RECIPES["base-tiny"], LogListener())
base_d12 = as_flow(RECIPES["base-d12"], LogListener())
base_d20 = as_flow(RECIPES["base-d20"], LogListener())
base_d26 = as_flow(RECIPES["base-d26"], LogListener())
base_folder = as_flow(RECIPES["base-folder"], LogListener())
omni_d12 = as_flow(RECIPES["omni-d12"], LogListener())
omni_d12_rehearsal = as_flow(RECIPES["omni-d12-rehearsal"], LogListener())
folder = as_flow(RECIPES["folder"], LogListener())
sound_set = as_flow(RECIPES["sound-set"], LogListener())
librispeech = as_flow(RECIPES["librispeech"], LogListener())
cosyvoice = as_flow(RECIPES["cosyvoice"], LogListener())
indextts = as_flow(RECIPES["indextts"], LogListener())
