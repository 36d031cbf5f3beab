"""The door: `python -m tests.bench NAME [--rounds N]`."""

import argparse
import json
import sys
from pathlib import Path

from tests.bench import commands
from tests.bench.measure import table

BENCHES = {"commands": commands.measure}


def main() -> int:
    """Run one measurement, print it and write it."""
    parser = argparse.ArgumentParser(prog="python -m tests.bench", description="Measure, side by side.")
    parser.add_argument("name", choices=sorted(BENCHES))
    parser.add_argument("--rounds", type=int, default=9)
    arguments = parser.parse_args()
    rows = BENCHES[arguments.name](arguments.rounds)
    print(table(rows))
    path = Path(__file__).resolve().parents[2] / "runs" / "bench" / f"{arguments.name}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps([row.__dict__ for row in rows], indent=1) + "\n")
    print(f"\n{path}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
