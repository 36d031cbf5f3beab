"""The door: `python -m tests.bench NAME [options]`."""

import argparse
import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

from tests.bench import commands, gpt, sound, text
from tests.bench.measure import table


def main() -> int:
    """Run one measurement, print it and write it."""
    parser = argparse.ArgumentParser(prog="python -m tests.bench", description="Measure, side by side.")
    benches = parser.add_subparsers(dest="name", required=True)
    looking = benches.add_parser("commands", help="what looking costs")
    looking.add_argument("--rounds", type=int, default=9)
    gpt.add_arguments(benches.add_parser("gpt", help="our GPT beside nanochat's"))
    sound.add_arguments(benches.add_parser("sound", help="from sound to features, and reading them"))
    text.add_arguments(benches.add_parser("text", help="rows of text for training, and what training adds"))
    arguments = parser.parse_args()
    others = {"gpt": gpt.measure, "sound": sound.measure, "text": text.measure}
    name = arguments.name
    record = others[name](arguments) if name in others else _commands(arguments.rounds)
    path = Path(__file__).resolve().parents[2] / "runs" / "bench" / f"{name}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(record, indent=1) + "\n")
    print(f"\n{path}")
    return 0


def _commands(rounds: int) -> list[dict[str, Any]]:
    rows = commands.measure(rounds)
    print(table(rows))
    return [asdict(row) for row in rows]


if __name__ == "__main__":
    sys.exit(main())
