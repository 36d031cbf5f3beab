"""Every run that has a name: which flow, with which recipe."""

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flows import sound
from flows.demo import demo
from flows.smoke import smoke
from omni_model import hardware
from omni_model.artifacts import Report, sha256_text
from omni_model.config import (
    BadInput,
    CosyVoiceRunRecipe,
    DemoRecipe,
    FeatureRecipe,
    FolderRecipe,
    FolderRunRecipe,
    IndexTtsRunRecipe,
    LibriSpeechRecipe,
    LibriSpeechRunRecipe,
    OutsideFolder,
    PretrainedEncoderRecipe,
    Runtime,
    SmokeRecipe,
)
from omni_model.outside import digest_folder, hash_folder
from omni_model.plain import nearest, override
from omni_model.storage import Store
from tasks.stage import Runner

DEFAULT = "demo"
WEIGHTS = "model.safetensors"


@dataclass(frozen=True)
class Run:
    """A flow and the values it is to run with."""

    name: str
    flow: Callable[[Runner, Any], Report]
    recipe: Any
    runtime: Runtime


RECIPES: dict[str, Run] = {
    run.name: run
    for run in (
        Run("demo", demo, DemoRecipe(), Runtime()),
        Run("smoke", smoke, SmokeRecipe(), Runtime()),
        Run("folder", sound.folder, FolderRunRecipe(), Runtime()),
        Run("librispeech", sound.librispeech, LibriSpeechRunRecipe(), Runtime()),
        Run("cosyvoice", sound.cosyvoice, CosyVoiceRunRecipe(), Runtime()),
        Run("indextts", sound.indextts, IndexTtsRunRecipe(), Runtime()),
    )
}


def resolve(name: str, settings: list[str]) -> Run:
    """The named run with `path=value` settings applied: `runtime.*` to how, everything else to what.

    Raises:
        BadInput: unknown recipe or field (with the nearest name), or a value that does not parse.
    """
    if name not in RECIPES:
        raise BadInput(f"there is no recipe {name!r}{nearest(name, RECIPES)}")
    run = RECIPES[name]
    recipe, runtime = run.recipe, run.runtime
    for setting in settings:
        path, equals, text = setting.partition("=")
        if not equals:
            raise BadInput(f"--set {setting!r} has no value; write it as path=value")
        if path.startswith("runtime."):
            runtime = override(runtime, path.removeprefix("runtime."), text)
        else:
            recipe = override(recipe, path, text)
    return Run(name, run.flow, recipe, runtime)


def settle(run: Run, store: Store) -> Run:
    """The run with every open value of its recipe filled in from this machine, so that it can have keys.

    A feature dtype `auto` becomes what this processor is fast in; a folder of the user's (recordings,
    scripts, parquet files) gets its digest, and an encoder in one of theirs the sha256 of its weights.

    Raises:
        BadInput: a folder is not named, not there or not readable.
    """
    return dataclasses.replace(run, recipe=_settled(run.recipe, store.root))


def _settled(value: Any, root: Path) -> Any:
    if isinstance(value, FolderRecipe) and not value.folder.path:
        raise BadInput("no folder was named; give yours with --set recordings.folder.path=DIR")
    if isinstance(value, OutsideFolder) and value.path:
        folder = Path(value.path).expanduser().absolute()
        return OutsideFolder(digest_folder(folder, _memory(folder, root)), str(folder))
    if isinstance(value, PretrainedEncoderRecipe) and value.place and not value.sha256:
        folder = Path(value.place).expanduser().absolute()
        files = hash_folder(folder, _memory(folder, root))
        sha256 = next((file.sha256 for file in files if file.path == WEIGHTS), "")  # sharded: pinned later
        return dataclasses.replace(value, place=str(folder), sha256=sha256)
    if isinstance(value, LibriSpeechRecipe) and value.form == "parquet" and value.place:
        folder = Path(value.place).expanduser().absolute()
        digest = digest_folder(folder, _memory(folder, root))
        return dataclasses.replace(value, place=str(folder), digest=digest)
    if isinstance(value, FeatureRecipe) and value.dtype == "auto":
        return dataclasses.replace(value, dtype=hardware.fast_dtype())
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = {f.name: _settled(getattr(value, f.name), root) for f in dataclasses.fields(value)}
        return dataclasses.replace(value, **fields)
    return value


def _memory(folder: Path, root: Path) -> Path:
    """Where the hashes of a folder's files are remembered."""
    return root / f".folder-{sha256_text(str(folder))[:16]}.json"
