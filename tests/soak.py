"""Kills at random: `python -m tests.soak [--kills N] [--seed S]`. CI does not run this.

Runs the small demo from an empty store and, again and again at random moments, kills either the command or
the process of a stage with SIGKILL; then lets it finish, and compares every payload with those of a run that
nobody disturbed.
"""

import argparse
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


def start(store: Path) -> subprocess.Popen[bytes]:
    """The run, as a process of its own."""
    words = [sys.executable, "-m", "flows.cli", "run", *small.demo("runtime.checkpoint_every_s=0.2")]
    quiet = subprocess.DEVNULL
    return subprocess.Popen(words, cwd=ROOT, env=environment(store), stdout=quiet, stderr=quiet)


def stages(store: Path) -> list[int]:
    """Processes of stages on this store."""
    return [
        pid
        for pid in processes_on(store)
        if b"omni_model.launch" in (Path("/proc") / str(pid) / "cmdline").read_bytes().split(b"\0")
    ]


def disturb(store: Path, rng: random.Random) -> str:
    """Start the run, kill something after a random while, and say what."""
    run = start(store)
    time.sleep(rng.uniform(0, LONGEST_WAIT_S))
    victims = stages(store)
    if victims and rng.random() < 0.5:
        victim, what = rng.choice(victims), "a stage"
    else:
        victim, what = run.pid, "the command"
    try:
        os.kill(victim, signal.SIGKILL)
    except ProcessLookupError:
        what = "nothing, it had ended"
    run.wait()
    time.sleep(0.5)
    left = processes_on(store)
    return what if not left else f"{what}, and {len(left)} processes stayed behind"


def main() -> int:
    """Disturb, finish, compare. Returns 0 if nothing differs."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    rng = random.Random(arguments.seed)
    with tempfile.TemporaryDirectory() as scratch:
        quiet, disturbed = Path(scratch) / "quiet", Path(scratch) / "disturbed"
        start(quiet).wait()
        for number in range(arguments.kills):
            told = disturb(disturbed, rng)
            finished = len(list(disturbed.glob("*/*/manifest.json")))
            print(f"kill {number + 1}: {told}; {finished} stages finished", flush=True)
        code = start(disturbed).wait()
        differing = {n for n, _ in set(payloads(quiet).items()) ^ set(payloads(disturbed).items())}
    print(
        f"last run ended with code {code}; {len(differing)} payload files differ",
        *sorted(differing),
        sep="\n  ",
    )
    return int(code != 0 or bool(differing))


if __name__ == "__main__":
    sys.exit(main())
