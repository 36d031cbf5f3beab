"""What does the stage add to the bare step? The whole of pretraining beside the GPT and its optimizer alone.

The stage is the real one: rows from its loader's process, schedules, microbatches, log. Every ten steps, when
it logs, it waits while the same GPT makes ten steps on fixed tensors, so that a slow moment hits both alike.
"""

import argparse
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

from omni_model import hardware
from omni_model.artifacts import TextCorpus, TokenizerFiles
from omni_model.config import GptShape, PretrainRecipe, Runtime
from omni_model.model.weights import new_gpt
from omni_model.storage import Workspace
from omni_model.telemetry import Metrics
from omni_model.training.pretrain import pretrain
from omni_model.training.ranks import ALONE
from omni_model.training.schedule import batch_scale
from omni_model.training.setup import prepare, settled_dtype
from tests.bench.gpt_sides import Shape
from tests.bench.measure import columns
from tests.bench.text_loader import MATERIALS, Material, write

BAR = 1.05  # times the bare step
STEPS = 10  # between two lines of the log
NEVER = 10**9
D4 = Shape(sequence_len=512, n_layer=4, n_head=2, n_kv_head=2, n_embd=256)
RACES = (
    ("d4, V 32768", replace(MATERIALS[0], shape=D4, training_rows=2)),
    ("base-tiny", MATERIALS[1]),
)

Clocks = tuple[float, float]  # wall, and CPU of this process


class Ended(Exception):
    """Enough rounds."""


class TakingTurns(Metrics):
    """At every line, the steps since the last one are noted, and as many bare steps are made."""

    def __init__(self, path: Path, bare: Callable[[], None], rounds: int) -> None:
        super().__init__(path)
        self._bare, self._rounds = bare, rounds
        self.stage: list[Clocks] = []
        self.alone: list[Clocks] = []
        self._since = _now()

    def log(self, step: int, total: int, **values: float) -> None:
        super().log(step, total, **values)
        self.stage.append(_since(self._since))
        began = _now()
        self._bare()
        self.alone.append(_since(began))
        if len(self.stage) > self._rounds:
            raise Ended
        self._since = _now()


def measure(options: argparse.Namespace, tree: Path | None = None) -> list[dict[str, Any]]:
    """Print a table for each shape; the first turn warms up and does not count."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    records = []
    for title, material in RACES:
        print(f"preparing {title}", file=sys.stderr)
        with tempfile.TemporaryDirectory() as folder:
            rows = _race(material, Path(folder), options.rounds)
        print(_table(f"{title}, one thread", rows), end="\n\n", flush=True)
        records.append({"title": f"training: {title}", "rows": rows})
    torch.set_num_threads(threads)
    return records


def _race(material: Material, folder: Path, rounds: int) -> list[dict[str, Any]]:
    write(material, folder)
    for name in ("corpus", "tokenizer"):  # as a store has them
        (folder / "store" / name).mkdir(parents=True)
        (folder / name).rename(folder / "store" / name / "out")
    store, shape = folder / "store", asdict(material.shape)
    num_bytes = sum(path.stat().st_size for path in (store / "corpus" / "out").iterdir())
    text = TextCorpus("text", "k", str(store / "corpus"), "d", material.documents, num_bytes)
    tokenizer = TokenizerFiles("tokenizer", "k", str(store / "tokenizer"), "d", shape.pop("vocab_size"))
    recipe = PretrainRecipe(
        gpt=GptShape(**shape),
        steps=STEPS * (rounds + 1),
        batch_tokens=material.training_rows * material.shape.sequence_len,
        validate_every=NEVER,
        sample_every=NEVER,
        validation_tokens=1,
    )
    bare = _bare_steps(
        recipe, tokenizer.vocab_size, material.training_rows, folder / "bare" / "stage" / "key"
    )
    directory = store / "pretrain_gpt" / "key"
    (directory / "out").mkdir(parents=True)
    turns = TakingTurns(directory / "metrics.jsonl", bare, rounds)
    runtime = Runtime(checkpoint_every_s=NEVER, microbatch_rows=material.training_rows)
    try:
        pretrain(recipe, text, tokenizer, work=Workspace(directory, 0, turns), runtime=runtime)
    except Ended:
        return _rows(turns, STEPS * recipe.batch_tokens)
    raise RuntimeError("the stage ended before it had logged often enough")


def _bare_steps(recipe: PretrainRecipe, vocab_size: int, rows: int, place: Path) -> Callable[[], None]:
    (place / "partial").mkdir(parents=True)
    made = prepare(
        new_gpt(recipe.gpt, vocab_size, 0, settled_dtype(recipe.dtype)),
        recipe.rates,
        ranks=ALONE,
        work=Workspace(place, 0, Metrics(place / "metrics.jsonl")),
        batch_scale=batch_scale(recipe.batch_tokens),
    )
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(vocab_size, (rows, recipe.gpt.sequence_len + 1), generator=generator).to(
        made.device
    )
    ids, targets = tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()

    def steps() -> None:
        for _ in range(STEPS):
            made.gpt(ids, targets).backward()
            made.optimizer.step()
            made.optimizer.zero_grad(set_to_none=True)

    return steps


def _now() -> Clocks:
    if hardware.device().type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter(), time.process_time()


def _since(began: Clocks) -> Clocks:
    wall, cpu = _now()
    return wall - began[0], cpu - began[1]


def _rows(turns: TakingTurns, tokens: int) -> list[dict[str, Any]]:
    pairs = list(zip(turns.stage, turns.alone, strict=True))[1:]
    rows = []
    for name, times in (("the bare step", turns.alone[1:]), ("the stage", turns.stage[1:])):
        row: dict[str, Any] = {"name": name}
        for clock, which in (("wall", 0), ("cpu", 1)):
            row[clock] = [tokens / each[which] for each in times]
            mine = [(stage if name == "the stage" else bare)[which] / bare[which] for stage, bare in pairs]
            row[f"{clock}_ratio"] = statistics.median(mine)
        rows.append(row)
    return rows


def _table(title: str, rows: list[dict[str, Any]]) -> str:
    lines = [(f"  {title}", "tokens/s", "by CPU", "time", "by CPU", "bar")]
    for row in rows:
        wall, cpu = (f"{statistics.median(row[clock]):,.0f}" for clock in ("wall", "cpu"))
        ratios = (f"{row[f'{clock}_ratio']:.3f}x" for clock in ("wall", "cpu"))
        lines.append((row["name"], wall, cpu, *ratios, f"<= {BAR}x" if row["name"] == "the stage" else ""))
    return columns(lines)
