"""The text side: is the loader fast enough, and does training lose nothing around the bare step?"""

import argparse
import io
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.bench import text_loader, text_training

PARTS: dict[str, Callable[[argparse.Namespace, Path | None], list[dict[str, Any]]]] = {
    "loader": text_loader.measure,
    "training": text_training.measure,
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `python -m tests.bench text`."""
    parser.add_argument("--nanochat", type=Path, metavar="DIR", help="a git clone of karpathy/nanochat")
    parser.add_argument("--commit", default="92d63d4", help="nanochat's")
    parser.add_argument("--rounds", type=int, default=5, help="how often every contender is timed")
    parser.add_argument("--only", default=",".join(PARTS), help="of " + ", ".join(PARTS))


def measure(options: argparse.Namespace) -> list[dict[str, Any]]:
    """Print the tables, part by part; everything measured, as JSON."""
    names = options.only.split(",")
    if not set(names) <= set(PARTS):
        sys.exit(f"--only {options.only}: choose among {', '.join(PARTS)}.")
    with tempfile.TemporaryDirectory() as folder:
        tree = _export(options, Path(folder)) if options.nanochat else None
        return [record for name in names for record in PARTS[name](options, tree)]


def _export(options: argparse.Namespace, folder: Path) -> Path:
    """nanochat's source at the commit, unpacked into `folder`."""
    words = ["git", "-C", str(options.nanochat), "archive", options.commit, "nanochat"]
    archive = subprocess.run(words, capture_output=True)
    if archive.returncode:
        sys.exit(f"--nanochat {options.nanochat} has no {options.commit}: {archive.stderr.decode().strip()}")
    with tarfile.open(fileobj=io.BytesIO(archive.stdout)) as tar:
        tar.extractall(folder, filter="data")
    return folder
