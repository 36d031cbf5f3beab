"""What each verb of the command does. Exit codes are returned; what a person did wrong is raised."""

import argparse
import contextlib
import dataclasses
import json
import os
import sys
import time
from pathlib import Path

from flows import recipes, runs
from flows.planning import (
    foresee,
    nothing_to_do,
    plan,
    plan_json,
    plan_rows,
    plan_summary,
    seconds,
    text_table,
)
from omni_model.artifacts import Manifest
from omni_model.config import BadInput
from omni_model.plain import nearest
from omni_model.storage import Store, default_root, fresh_store, open_store
from tasks.planner import Step
from tasks.stage import REGISTRY

DONE, FAILED = 0, 1
GUARDED_S = 600.0  # a result that took longer is not thrown away for changed code without asking


class Stopped(BaseException):
    """SIGTERM, raised where the work is so that everything open is closed on the way out."""


def run(args: argparse.Namespace) -> int:
    """`omni run`."""
    chosen, store = _resolve(args)
    if not chosen.runtime.fresh:
        return _run(chosen, store, args)
    with fresh_store(store) as scratch:
        runtime = dataclasses.replace(chosen.runtime, store=str(scratch.root), fresh=False)
        code = _run(dataclasses.replace(chosen, runtime=runtime), scratch, args)
    print("that was a fresh run: its store and report are gone again", file=sys.stderr)
    return code


def _run(chosen: recipes.Run, store: Store, args: argparse.Namespace) -> int:
    started = time.time()
    steps, _ = plan(chosen, store)
    if nothing_to_do(steps) and "PREFECT_API_URL" not in os.environ:
        manifests = [step.manifest for step in steps if step.manifest]
        rows = [
            runs.stage_row(step, manifest, computed=False)
            for step, manifest in zip(steps, manifests, strict=True)
        ]
        directory = runs.settle(store, chosen.name, time.time() - started, rows, manifests)
    else:
        store.require_space()
        guard(steps, chosen.runtime.recompute, args.yes)
        directory = _run_with_prefect(chosen, store, steps)
        rows = runs.read_rows(directory)
    if args.json:
        print((directory / "summary.json").read_text())
        return DONE
    print(text_table(runs.TABLE_HEAD, runs.table_rows(rows)))
    print(f"\n{runs.verdict(directory)}\nreport: {directory / 'report.html'}")
    return DONE


def _run_with_prefect(chosen: recipes.Run, store: Store, steps: list[Step]) -> Path:
    from flows.display import display
    from tasks import prefect_server

    prefect_server.use_settings(store.root)
    with contextlib.ExitStack() as open_things:
        if (given := os.environ.get("PREFECT_API_URL")) is not None:
            if not prefect_server.is_healthy(given, timeout_s=10):
                raise BadInput(
                    f"no Prefect server answers at PREFECT_API_URL {given}; start it or unset the variable"
                )
        else:
            print("starting Prefect", file=sys.stderr)
            url = prefect_server.live_ui(store.root) or open_things.enter_context(
                prefect_server.embedded_server(store)
            )
            os.environ["PREFECT_API_URL"] = url
        from flows.deployments import TerminationSignal, as_flow, send_logs

        open_things.callback(send_logs)
        listener = open_things.enter_context(display(steps))
        try:
            return Path(as_flow(chosen, listener)(chosen.recipe, chosen.runtime))
        except TerminationSignal:  # Prefect's own form of SIGTERM while a flow runs
            raise Stopped from None


def guard(steps: list[Step], recompute: str, yes: bool) -> None:
    """Ask before recomputing what took long and became stale only because code changed."""
    costly = [step for step in steps if step.costly and (step.predicted_s or 0) > GUARDED_S]
    if not costly or yes or recompute == "yes":
        return
    words = "; ".join(f"{s.label} took {seconds(s.predicted_s or 0)} and {', '.join(s.why)}" for s in costly)
    asked = recompute == "ask" and sys.stdin.isatty()
    if asked and input(f"{words}. Compute again? [y/N] ").strip().lower() == "y":
        return
    raise BadInput(f"{words}; --yes or --set runtime.recompute=yes computes it again")


def show_plan(args: argparse.Namespace) -> int:
    """`omni plan`."""
    chosen, store = _resolve(args)
    steps, _ = plan(chosen, store)
    forecasts = foresee(steps, args.card, store, chosen.runtime) if args.card else None
    if args.json:
        print(json.dumps(plan_json(steps, forecasts), indent=1))
        return DONE
    head = ["", "stage", "status", "key", "prediction" if args.card else "earlier run", "why"]
    print(text_table(head, plan_rows(steps, forecasts)))
    print(f"\n{plan_summary(steps, forecasts)}")
    return DONE


def why(args: argparse.Namespace) -> int:
    """`omni why`."""
    chosen, store = _resolve(args)
    steps, _ = plan(chosen, store)
    found = [step for step in steps if args.stage in (step.label, step.stage.name)]
    if not found:
        raise BadInput(
            f"{chosen.name} has no stage {args.stage!r}{nearest(args.stage, {s.label for s in steps})}"
        )
    if args.json:
        print(json.dumps([step.to_json() for step in found], indent=1))
        return DONE
    for step in found:
        reasons = step.why or ("its key is unchanged and its bytes are whole",)
        print(f"{step.label}: {step.status}\n" + "\n".join(f"  {reason}" for reason in reasons))
    return DONE


def verify(args: argparse.Namespace) -> int:
    """`omni verify`."""
    store = open_store(default_root())
    artifacts = [directory for name in sorted(REGISTRY) for directory in store.artifacts(name)]
    found = {store.uri(directory): _damage(store, directory) for directory in artifacts}
    damaged = [sentence for sentences in found.values() for sentence in sentences]
    if args.json:
        print(json.dumps([{"artifact": name, "damaged": each} for name, each in found.items()], indent=1))
    elif damaged:
        print(*damaged, sep="\n")
        print(f"\n{len(damaged)} damaged; the next omni run makes exactly these stages again")
    else:
        print(f"{len(artifacts)} artifacts in {store.url}, every byte as it was made")
    return FAILED if damaged else DONE


def _damage(store: Store, directory: Path) -> list[str]:
    try:
        return [str(damage) for damage in store.damages(directory, Manifest.read(directory), trust=False)]
    except BadInput as error:
        return [str(error)]


def ui(args: argparse.Namespace) -> int:
    """`omni ui`."""
    from tasks import prefect_server

    store = open_store(default_root())
    prefect_server.require_port(args.port)
    if (live := prefect_server.live_ui(store.root)) is not None:
        raise BadInput(f"this store's UI is already open at {live.removesuffix('/api')}")
    prefect_server.use_settings(store.root)
    here = f"127.0.0.1:{args.port}"
    print(f"http://{here} (from elsewhere: ssh -L {args.port}:{here} HOST); Ctrl-C ends it", flush=True)
    with contextlib.suppress(KeyboardInterrupt, Stopped):
        prefect_server.serve_ui(store.root, args.port)
    return DONE


def doctor(args: argparse.Namespace) -> int:
    """`omni doctor`."""
    from flows.doctor import examine

    checks = examine()
    if args.json:
        print(json.dumps([check.__dict__ for check in checks], indent=1))
    else:
        print(text_table(["", "check", "found"], [["✓" if c.good else "✗", c.name, c.found] for c in checks]))
    return DONE if all(check.good for check in checks) else FAILED


def _resolve(args: argparse.Namespace) -> tuple[recipes.Run, Store]:
    chosen = recipes.resolve(args.recipe, args.settings)
    store = open_store(chosen.runtime.store or default_root())
    return recipes.settle(chosen, store), store
