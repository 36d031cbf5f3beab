"""Our GPT beside nanochat's, at two commits: training, prefill, decoding, and their memory.

All contenders get the same weights and tokens, and must agree on losses or logits before anything is timed.
"ours faster" is a contender's median over that of the first, which is ours; for memory, ours over the
contender's. What "ours" means is written in tests.bench.gpt_sides.Ours.
"""

import argparse
import io
import os
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from tests.bench.gpt_contest import Contest, Entrant
from tests.bench.gpt_sides import Shape
from tests.bench.gpt_worker import Job

COMMITS = "a825e63f,92d63d4"
HOW_TO_COMPARE = (
    "Only ours was measured: `git clone https://github.com/karpathy/nanochat` and give --nanochat its folder."
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `python -m tests.bench gpt`."""
    parser.add_argument("--nanochat", type=Path, metavar="DIR", help="a git clone of karpathy/nanochat")
    parser.add_argument("--commits", default=COMMITS, help="nanochat's, separated by commas")
    parser.add_argument("--rounds", type=int, default=9, help="how often every contender is timed")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--batch", type=int, default=0, help="rows of a training step (4; on a card 16)")
    parser.add_argument("--precision", default="medium", help="our fp32 matmul precision on a CPU")
    parser.add_argument("--only", default=",".join(CONTESTS), help="of " + ", ".join(CONTESTS))


def measure(options: argparse.Namespace) -> list[dict[str, Any]]:
    """Print the tables, one after the other; everything measured, as JSON."""
    names = options.only.split(",")
    if not set(names) <= set(CONTESTS):
        sys.exit(f"--only {options.only}: choose among {', '.join(CONTESTS)}.")
    if options.device == "cuda" and not torch.cuda.is_available():
        sys.exit("--device cuda: torch sees no card here.")
    records = []
    with tempfile.TemporaryDirectory() as folder:
        trees = _export(options, Path(folder)) if options.nanochat else {}
        for contest in (each for name in names for each in CONTESTS[name](options, list(trees))):
            contest.run(options.rounds, trees)
            print(contest.text(), end="\n\n", flush=True)
            records.append(contest.record())
    if not trees:
        print(HOW_TO_COMPARE)
    return records


def _export(options: argparse.Namespace, folder: Path) -> dict[str, Path]:
    """nanochat's source at each commit, unpacked below `folder`."""
    trees = {}
    for commit in options.commits.split(","):
        words = ["git", "-C", str(options.nanochat), "archive", commit, "nanochat"]
        archive = subprocess.run(words, capture_output=True)
        if archive.returncode:
            sys.exit(f"--nanochat {options.nanochat} has no {commit}: {archive.stderr.decode().strip()}")
        trees[commit] = folder / commit
        with tarfile.open(fileobj=io.BytesIO(archive.stdout)) as tar:
            tar.extractall(trees[commit], filter="data")
    return trees


def train(options: argparse.Namespace, commits: list[str]) -> list[Contest]:
    """An update: six layers on a CPU, twelve on a card, where nanochat may be faster without windows."""
    card = options.device == "cuda"
    large = {"sequence_len": 2048, "n_layer": 12, "n_head": 6, "n_kv_head": 6, "n_embd": 768}
    shape = Shape(**large) if card else Shape(sequence_len=512)
    rows, length = options.batch or (16 if card else 4), shape.sequence_len
    job = _job(options, "train", shape=shape, rows=rows, tokens=length, compiled=True)
    shipped, ours = _precisions(options)
    bars = {"bar": ">= 1.3x" if card else ">= 1.35x", "memory_bar": "<= 0.5x"}
    size = f"d{shape.n_layer}, V {shape.vocab_size}, T {length}, B {rows}"
    memory = "peak memory above weights, gradients and optimizer state"
    contests = []
    for commit in commits or [job.optimizer]:
        job = replace(job, optimizer=commit)
        entrants = [
            Entrant("ours, compiled", replace(job, precision=ours)),
            Entrant("ours, not compiled", replace(job, precision=ours, compiled=False)),
        ]
        contests.append(Contest(f"training step: {size}, optimizer of {commit}", entrants, memory=memory))
        if not commits:
            break
        name, upstream = f"nanochat {commit}", replace(job, side="nanochat", precision=shipped)
        entrants.append(Entrant(f"{name}, as shipped", upstream, commit, **bars))
        if ours != shipped:
            equal = replace(upstream, precision=ours)
            entrants.append(Entrant(f"{name}, at {ours!r}", equal, commit, **bars | {"bar": ">= 1.1x"}))
        if card:
            whole = replace(upstream, shape=replace(shape, window_pattern="L"))
            entrants.append(Entrant(f"{name}, no windows", whole, commit, equal="not", **bars))
    return contests


def prefill(options: argparse.Namespace, commits: list[str]) -> list[Contest]:
    """Reading a prompt of 700 tokens."""
    job = _job(options, "prefill")
    shipped, ours = _precisions(options)
    bar = ">= 1.5x" if options.device == "cuda" else ">= 2.5x"
    entrants = [Entrant("ours", replace(job, precision=ours))]
    for commit in commits:
        name, upstream = f"nanochat {commit}", replace(job, side="nanochat", precision=shipped)
        entrants.append(Entrant(f"{name}, as shipped", upstream, commit, bar))
        if ours != shipped:
            entrants.append(Entrant(f"{name}, at {ours!r}", replace(upstream, precision=ours), commit))
    return [Contest(f"prefill: {job.tokens} tokens, d6", entrants)]


def decode(options: argparse.Namespace, commits: list[str]) -> list[Contest]:
    """Writing token after token at a context of 700: one row, and eight."""
    card = options.device == "cuda"
    contests = []
    for rows, bar in ((1, ">= 4x" if card else ">= 1.3x"), (8, ">= 2x" if card else ">= 1.1x")):
        job = _job(options, "decode", rows=rows, precision=_precisions(options)[0])
        entrants = [Entrant("ours", replace(job, narrow=card))]
        for commit in commits:
            entrants.append(Entrant(f"nanochat {commit}", replace(job, side="nanochat"), commit, bar))
        if not card:
            narrow = replace(job, dtype="bfloat16", narrow=True)
            entrants.append(Entrant("ours, bf16 weights", narrow, equal="may"))
            for commit in commits[-1:]:
                upstream = replace(job, side="nanochat", dtype="bfloat16")
                entrants.append(Entrant(f"nanochat {commit}, bf16", upstream, commit, equal="may"))
        title = f"decode: a token at context {job.tokens}, d6, batch {rows}"
        contests.append(Contest(title, entrants, per=job.new_tokens))
    return contests


def kv(options: argparse.Namespace, commits: list[str]) -> list[Contest]:
    """The cache of one row, full; twelve layers, since six are no whole number of SSSL."""
    job = _job(options, "kv", shape=Shape(n_layer=12, vocab_size=256), tokens=2048)
    entrants = [Entrant("ours", job)]
    for commit in commits:
        entrants.append(
            Entrant(f"nanochat {commit}", replace(job, side="nanochat"), commit, memory_bar="<= 0.45x")
        )
    return [
        Contest("keys and values: SSSL, context 2048, d12", entrants, per=0, memory="the cache of one row")
    ]


CONTESTS: dict[str, Callable[[argparse.Namespace, list[str]], list[Contest]]] = {
    "train": train,
    "prefill": prefill,
    "decode": decode,
    "kv": kv,
}


def _job(options: argparse.Namespace, work: str, **fields: Any) -> Job:
    dtype = "bfloat16" if options.device == "cuda" else "float32"
    return Job("ours", work, device=options.device, threads=options.threads, dtype=dtype, **fields)


def _precisions(options: argparse.Namespace) -> tuple[str, str]:
    """Precision of fp32 products: as nanochat ships, and ours."""
    return ("high", "high") if options.device == "cuda" else ("highest", options.precision)
