"""The `omni` command: `run`, `plan`, `why`, `verify`, `ui` and `doctor`.

Only what a verb needs is imported when it runs, so that looking at a plan imports neither torch nor Prefect.
Exit codes: 0 done, 1 a stage or a check failed, 2 bad input or refused.
"""

import argparse
import contextlib
import json
import os
import signal
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from flows import recipes, runs
from flows.planning import nothing_to_do, plan, plan_rows, seconds, text_table
from omni_model.artifacts import MANIFEST, Manifest
from omni_model.config import BadInput
from omni_model.plain import nearest
from omni_model.storage import Store, damages, default_root, open_store
from tasks.planner import WILL_RUN, Step
from tasks.stage import REGISTRY

DONE, FAILED, REFUSED, INTERRUPTED = 0, 1, 2, 130
GUARDED_S = 600.0  # a result that took longer is not thrown away for changed code without asking
UI_PORT = 4200


class Stopped(BaseException):
    """SIGTERM, raised where the work is so that everything open is closed on the way out."""


def _stop(number: int, frame: object) -> None:
    raise Stopped


def main(arguments: Sequence[str] | None = None) -> int:
    """Parse, carry out, and turn every foreseen error into one sentence. Returns the exit code."""
    args = parser().parse_args(arguments)
    signal.signal(signal.SIGTERM, _stop)
    try:
        return int(args.verb(args))
    except (KeyboardInterrupt, Stopped):
        print("\nomni: stopped; run the same command again to continue", file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:  # the reader of our output has gone, which is its right
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return DONE
    except Exception as error:
        if args.debug:
            raise
        print(f"omni: {error_sentence(error)}", file=sys.stderr)
        return REFUSED if isinstance(error, BadInput) else FAILED


def error_sentence(error: Exception) -> str:
    """An error as one sentence; what nobody foresaw is named by its type."""
    if isinstance(error, OSError) and error.filename:
        return f"{error.filename}: {error.strerror}"
    foreseen = isinstance(error, BadInput) or type(error).__name__ in ("StageFailed", "RuntimeError")
    return str(error) if foreseen else f"{type(error).__name__}: {error} (--debug shows where)"


def parser() -> argparse.ArgumentParser:
    """The command line, with examples in every help."""
    top = argparse.ArgumentParser(prog="omni", description="A small GPT, trained from scratch, that hears.")
    top.set_defaults(debug=False)
    verbs = top.add_subparsers(metavar="VERB", required=True)

    def verb(name: str, function: object, summary: str, examples: str) -> argparse.ArgumentParser:
        sub = verbs.add_parser(
            name,
            help=summary,
            description=summary[0].upper() + summary[1:] + ".",
            epilog=f"examples:\n{examples}",
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        sub.add_argument("--debug", action="store_true", help="show the traceback of an error")
        sub.set_defaults(verb=function)
        return sub

    def recipe(sub: argparse.ArgumentParser) -> None:
        known = ", ".join(recipes.RECIPES)
        sub.add_argument(
            "recipe", nargs="?", default=recipes.DEFAULT, help=f"one of: {known}; default {recipes.DEFAULT}"
        )
        sub.add_argument(
            "--set",
            dest="settings",
            action="append",
            default=[],
            metavar="PATH=VALUE",
            help="change a field of the recipe, or of runtime.*; may be repeated",
        )

    def as_json(sub: argparse.ArgumentParser) -> None:
        sub.add_argument("--json", action="store_true", help="print JSON")

    sub = verb(
        "run",
        run,
        "run a recipe; stages whose inputs did not change are reused",
        "  omni run\n  omni run smoke\n  omni run demo --set lora.rank=8 --set runtime.threads=2",
    )
    recipe(sub)
    sub.add_argument(
        "--yes", action="store_true", help="recompute costly results that only changed code made stale"
    )
    as_json(sub)
    sub = verb(
        "plan",
        show_plan,
        "say what a run would do, and why, without doing it",
        "  omni plan\n  omni plan demo --set pretrain.steps=800 --json",
    )
    recipe(sub)
    as_json(sub)
    sub = verb(
        "why",
        why,
        "say why one stage would or would not run",
        "  omni why finetune_lora\n  omni why finetune_lora demo --set lora.lr=0.001",
    )
    sub.add_argument("stage", help="the stage's name, as omni plan shows it")
    recipe(sub)
    as_json(sub)
    sub = verb(
        "verify",
        verify,
        "hash every payload file in the store against its manifest",
        "  omni verify\n  omni verify --json",
    )
    as_json(sub)
    sub = verb(
        "ui", ui, "open the Prefect UI on this store's runs", f"  omni ui\n  omni ui --port {UI_PORT + 1}"
    )
    sub.add_argument(
        "--port", type=int, default=UI_PORT, help=f"port on the loopback interface; default {UI_PORT}"
    )
    sub = verb(
        "doctor",
        doctor,
        "check the environment, the store, the server and the encoder",
        "  omni doctor\n  omni doctor --json",
    )
    as_json(sub)
    return top


# --- verbs ---------------------------------------------------------------------------------------


def run(args: argparse.Namespace) -> int:
    """`omni run`."""
    chosen, store, started = *_resolve(args), time.time()
    steps, _ = plan(chosen, store)
    if nothing_to_do(steps) and "PREFECT_API_URL" not in os.environ:
        manifests = [step.manifest for step in steps if step.manifest]
        rows = [
            runs.stage_row(step, manifest, computed=False)
            for step, manifest in zip(steps, manifests, strict=True)
        ]
        directory = runs.settle(store, chosen.name, time.time() - started, rows, manifests)
    else:
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
    if args.json:
        print(json.dumps([step.to_json() for step in steps], indent=1))
        return DONE
    print(text_table(["", "stage", "status", "key", "earlier run", "why"], plan_rows(steps)))
    waiting = [step for step in steps if step.status == WILL_RUN]
    known = sum(step.predicted_s or 0 for step in waiting)
    print(
        "\nnothing to do"
        if nothing_to_do(steps)
        else f"\n{len(waiting)} of {len(steps)} stages will run"
        + (f"; they took {seconds(known)} before" if known else "")
    )
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
    rows, found = [], 0
    for name in sorted(REGISTRY):
        for path in sorted((store.root / name).glob(f"*/{MANIFEST}")):
            manifest = Manifest.read(path.parent)
            damaged = damages(path.parent, manifest, trust=False)
            found += len(damaged)
            rows.append(
                {
                    "artifact": str(path.parent),
                    "files": len(manifest.files),
                    "damaged": [{"path": str(d.path), "problem": d.problem} for d in damaged],
                }
            )
            if not args.json:
                for damage in damaged:
                    print(damage)
    if args.json:
        print(json.dumps(rows, indent=1))
    elif found:
        print(f"\n{found} damaged; the next omni run makes exactly those stages again")
    else:
        print(f"{len(rows)} artifacts in {store.root}, every byte as it was made")
    return FAILED if found else DONE


def ui(args: argparse.Namespace) -> int:
    """`omni ui`."""
    from tasks import prefect_server

    store = open_store(default_root())
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
    return chosen, open_store(chosen.runtime.store or default_root())


if __name__ == "__main__":
    sys.exit(main())
