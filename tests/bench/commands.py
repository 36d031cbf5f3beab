"""What looking costs: `omni plan`, and `omni run` with nothing to do, on a store with a finished demo."""

import os
import subprocess
import sys

from tests import small
from tests.bench.measure import Row, command, interleave


def measure(rounds: int) -> list[Row]:
    """Make the small demo if it is not there, then time the commands against a bare interpreter.

    The number of stages and the code they reach are those of the full demo; only the payloads are smaller.
    """
    environment = {k: v for k, v in os.environ.items() if not k.startswith("PREFECT_")}
    omni = [sys.executable, "-m", "flows.cli"]
    subprocess.run([*omni, "run", *small.demo()], env=environment, check=True, stdout=subprocess.DEVNULL)
    contenders = {
        "python -c pass": [sys.executable, "-c", "pass"],
        "omni plan": [*omni, "plan", *small.demo()],
        "omni run, nothing to do": [*omni, "run", *small.demo()],
        "omni verify": [*omni, "verify"],
    }
    return interleave({name: command(words, environment) for name, words in contenders.items()}, rounds)
