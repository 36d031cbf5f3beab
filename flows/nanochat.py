"""`omni import-nanochat` and `omni export-nanochat`: models that came from nanochat, or go there.

An import is two stages like any other, so what it makes is sealed, verified and made once. They run without
Prefect: there is nothing to schedule.
"""

import argparse
import dataclasses
import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import cast

import omni_model
from flows import runs
from flows.display import display
from flows.models import artifact_at, newest
from flows.planning import text_table
from omni_model.artifacts import Artifact, GptCheckpoint, TokenizerFiles, sha256_file
from omni_model.config import BadInput, GptImportRecipe, OutsideFile, Runtime, TokenizerImportRecipe
from omni_model.storage import default_root, open_store
from tasks.execute import Executor, Outcome
from tasks.fingerprint import CodeBase
from tasks.identity import Identifier
from tasks.planner import Planner
from tasks.stage import H, P, Runner, stage_of
from tasks.text import import_gpt, import_tokenizer


def bring_in(run: Runner, gpt: GptImportRecipe, tokenizer: TokenizerImportRecipe) -> GptCheckpoint:
    """The tokenizer first, because the model is checked against it."""
    words = run(import_tokenizer, tokenizer)
    return run(import_gpt, gpt, words)


class DirectRunner:
    """A runner that makes one stage after the other."""

    def __init__(self, executor: Executor) -> None:
        self._executor = executor
        self.outcomes: list[Outcome] = []

    def __call__(self, task: Callable[P, H], *args: P.args, **kwargs: P.kwargs) -> H:
        """Make one stage's artifact and return its handle."""
        recipe, *inputs = args
        stage = stage_of(task)
        outcome = self._executor.make(stage, recipe, cast("tuple[Artifact, ...]", tuple(inputs)), stage.name)
        self.outcomes.append(outcome)
        return cast(H, outcome.handle)


def import_nanochat(args: argparse.Namespace) -> int:
    """`omni import-nanochat`."""
    recipes = describe(Path(args.directory), args.step, args.tokenizer)
    store = open_store(default_root())
    store.require_space()
    code = CodeBase(Path(omni_model.__file__).parent.parent, memo=store.root / ".fingerprints.json")
    identifier = Identifier(code, seed=0)
    planner = Planner(store, identifier)
    bring_in(planner, *recipes)
    with display(planner.steps) as listener:
        executor = Executor(store, identifier, Runtime(), listener)
        runner = DirectRunner(executor)
        try:
            bring_in(runner, *recipes)
        finally:
            executor.stop()
    made = list(zip(planner.steps, runner.outcomes, strict=True))
    rows = [runs.stage_row(step, outcome.manifest, outcome.computed) for step, outcome in made]
    places = [outcome.handle.uri for outcome in runner.outcomes]
    if args.json:
        told = [dataclasses.asdict(r) | {"artifact": place} for r, place in zip(rows, places, strict=True)]
        print(json.dumps(told, indent=1))
        return 0
    cells = [[*line, place] for line, place in zip(runs.table_rows(rows), places, strict=True)]
    print(text_table([*runs.TABLE_HEAD, "artifact"], cells))
    return 0


def describe(
    directory: Path, step: int | None, tokenizer: str | None
) -> tuple[GptImportRecipe, TokenizerImportRecipe]:
    """What is to be imported, with the digests of its files.

    Args:
        directory: one of nanochat's, such as `base_checkpoints/d12`.
        step: which of its checkpoints; the newest where it is None.
        tokenizer: the directory of `tokenizer.pkl`; else nanochat's place for it, else inside `directory`.

    Raises:
        BadInput: a file is missing.
    """
    if not directory.is_dir():
        raise BadInput(
            f"{directory} is not a directory; name one of nanochat's, such as base_checkpoints/d12"
        )
    found = {int(m[1]): m[1] for p in directory.iterdir() if (m := re.fullmatch(r"model_(\d+)\.pt", p.name))}
    if not found:
        raise BadInput(f"{directory} holds no model_NNNNNN.pt; name a directory such as base_checkpoints/d12")
    chosen = max(found) if step is None else step
    if chosen not in found:
        raise BadInput(f"{directory} has no step {chosen}; choose from {', '.join(map(str, sorted(found)))}")
    model, meta = directory / f"model_{found[chosen]}.pt", directory / f"meta_{found[chosen]}.json"
    if not meta.is_file():
        raise BadInput(f"{meta} is missing; it says what {model.name} is")
    if tokenizer is not None:
        places = [Path(tokenizer)]
    else:
        places = [directory.resolve().parent.parent / "tokenizer", directory / "tokenizer"]
    pickles = [place / "tokenizer.pkl" for place in places]
    here = next((path for path in pickles if path.is_file()), None)
    if here is None:
        words = " nor ".join(map(str, pickles))
        raise BadInput(f"there is no tokenizer at {words}; give its directory with --tokenizer")
    return GptImportRecipe(_outside(model), _outside(meta), chosen), TokenizerImportRecipe(_outside(here))


def _outside(path: Path) -> OutsideFile:
    return OutsideFile(sha256_file(path), str(path.absolute()))


def export_nanochat(args: argparse.Namespace) -> int:
    """`omni export-nanochat`."""
    if args.tokenizer and not args.gpt:
        raise BadInput("--tokenizer goes with --gpt; without both, the latest run's are exported")
    tokenizer: TokenizerFiles | None
    if args.gpt:
        gpt = artifact_at(args.gpt, GptCheckpoint)
        tokenizer = artifact_at(args.tokenizer, TokenizerFiles) if args.tokenizer else None
    else:
        store = open_store(default_root())
        gpt, tokenizer = newest(store, GptCheckpoint), newest(store, TokenizerFiles)
    from omni_model import cli  # needs torch

    files = cli.export_nanochat(gpt, tokenizer, Path(args.out))
    if args.json:
        print(json.dumps({"gpt": gpt.uri, "files": [str(path) for path in files]}, indent=1))
    else:
        print(*files, sep="\n")
    if tokenizer is None:
        print("weights only: nanochat also needs their tokenizer, exported with --tokenizer", file=sys.stderr)
    return 0
