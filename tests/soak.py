"""Kills at random: `python -m tests.soak [RECIPE] [--kills N] [--seed S]`. CI does not run this.

Runs the small demo, or the small base-tiny, from an empty store and, again and again at random moments, kills
either the command or the process of a stage with SIGKILL until nothing is left to compute; then compares
every payload with those of a run that nobody disturbed, and begins with a new store.
"""

import argparse
import contextlib
import itertools
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from tests import small
from tests.test_runs import environment, payloads, processes_on

ROOT = Path(__file__).resolve().parent.parent
LONGEST_WAIT_S = 25.0
RECIPES = {"demo": small.demo, "base-tiny": small.base_tiny}


def start(store: Path, recipe: str) -> subprocess.Popen[bytes]:
    """The run, as a process of its own."""
    words = [sys.executable, "-m", "flows.cli", "run", *RECIPES[recipe]("runtime.checkpoint_every_s=0.2")]
    quiet = subprocess.DEVNULL
    return subprocess.Popen(words, cwd=ROOT, env=environment(store), stdout=quiet, stderr=quiet)


def stages(store: Path) -> list[int]:
    """Processes of stages on this store."""
    return [
        pid
        for pid in processes_on(store)
        if b"omni_model.launch" in (Path("/proc") / str(pid) / "cmdline").read_bytes().split(b"\0")
    ]


def disturb(store: Path, recipe: str, rng: random.Random) -> str:
    """Start the run, kill something after a random while, and say what; nothing if it ended by itself."""
    run = start(store, recipe)
    time.sleep(rng.uniform(0, LONGEST_WAIT_S))
    if run.poll() is not None:
        return ""
    victims = stages(store)
    victim, what = run.pid, "the command"
    if victims and rng.random() < 0.5:
        victim, what = rng.choice(victims), "a stage"
    with contextlib.suppress(ProcessLookupError):
        os.kill(victim, signal.SIGKILL)
    run.wait()
    time.sleep(0.5)
    left = len(processes_on(store))
    return f"{what}, and {left} processes stayed behind" if left else what


def main() -> int:
    """Disturb until nothing is left to compute, compare, begin again. Returns 0 if nothing ever differed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("recipe", nargs="?", default="demo", choices=sorted(RECIPES))
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    rng = random.Random(arguments.seed)
    kills, bad = 0, 0
    with tempfile.TemporaryDirectory() as scratch:
        start(Path(scratch) / "quiet", arguments.recipe).wait()
        expected = payloads(Path(scratch) / "quiet")
        for number in itertools.count():
            store = Path(scratch) / f"disturbed-{number}"
            while kills < arguments.kills and (told := disturb(store, arguments.recipe, rng)):
                kills += 1
                bad += "stayed behind" in told
                finished = len(list(store.glob("*/*/manifest.json")))
                print(f"kill {kills}: {told}; {finished} stages finished", flush=True)
            code = start(store, arguments.recipe).wait()
            differing = {name for name, _ in set(expected.items()) ^ set(payloads(store).items())}
            print(
                f"ended with code {code}; {len(differing)} payload files differ",
                *sorted(differing),
                sep="\n  ",
            )
            bad += bool(code or differing)
            if kills >= arguments.kills:
                return int(bool(bad))
    return 1


if __name__ == "__main__":
    sys.exit(main())
