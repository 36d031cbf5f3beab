"""Every run that has a name: which flow, with which recipe."""

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flows import base, omni, sound
from flows.demo import demo
from flows.smoke import smoke
from omni_model import hardware
from omni_model.artifacts import Report, sha256_file, sha256_text
from omni_model.config import (
    BadInput,
    BaseClimbMixRecipe,
    BaseFolderRecipe,
    BaseTinyRecipe,
    CoreBundleRecipe,
    CosyVoiceRunRecipe,
    DeepRecipe,
    DemoRecipe,
    FeatureRecipe,
    FolderRecipe,
    FolderRunRecipe,
    IndexTtsRunRecipe,
    LibriSpeechRecipe,
    LibriSpeechRunRecipe,
    OmniRecipe,
    OmniRehearsalRecipe,
    OutsideFolder,
    PretrainedEncoderRecipe,
    PublicSetsRecipe,
    Runtime,
    SmokeRecipe,
    SoundSetRecipe,
    SoundSetRunRecipe,
    TextFolderRecipe,
)
from omni_model.config.depth import derive
from omni_model.outside import digest_folder, hash_folder
from omni_model.plain import nearest, override
from omni_model.storage import Store
from tasks.stage import Runner

DEFAULT = "demo"
WEIGHTS = "model.safetensors"
# What a run calls its folder of the user's.
FOLDERS: dict[type[Any], str] = {
    FolderRecipe: "recordings",
    SoundSetRecipe: "sounds",
    TextFolderRecipe: "texts",
}


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
        # One stage after the other: each gets both cores of a laptop.
        Run("base-tiny", base.base_tiny, BaseTinyRecipe(), Runtime(threads=2, parallel_stages=1)),
        Run("base-d12", base.base, BaseClimbMixRecipe(depth=12), Runtime(wandb="auto")),
        Run("base-d20", base.base, BaseClimbMixRecipe(depth=20), Runtime(wandb="auto")),
        Run("base-d26", base.base, BaseClimbMixRecipe(depth=26), Runtime(wandb="auto")),
        Run("base-folder", base.base_folder, BaseFolderRecipe(), Runtime(wandb="auto")),
        Run("omni-d12", omni.omni, OmniRecipe(depth=12), Runtime(wandb="auto")),
        # One stage after the other: a large model gets both cores, and all of the memory.
        Run(
            "omni-d12-rehearsal",
            omni.omni_rehearsal,
            OmniRehearsalRecipe(depth=12),
            Runtime(threads=2, parallel_stages=1),
        ),
        Run("folder", sound.folder, FolderRunRecipe(), Runtime()),
        Run("sound-set", sound.sound_set, SoundSetRunRecipe(), Runtime()),
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
    """The run with every open value of its recipe filled in, so that it can have keys.

    What follows from `depth` is derived; a dtype `auto` becomes what this machine is fast in; a folder of
    the user's (recordings, texts, scripts, data sets) gets its digest, and an encoder in one of theirs the
    sha256 of its weights.

    Raises:
        BadInput: a folder is not named, not there or not readable.
    """
    return dataclasses.replace(run, recipe=_settled(run.recipe, store.root))


def _settled(value: Any, root: Path) -> Any:
    if isinstance(value, DeepRecipe):
        value = derive(value)
    if isinstance(value, (FolderRecipe, SoundSetRecipe, TextFolderRecipe)) and not value.folder.path:
        field = FOLDERS[type(value)]
        raise BadInput(f"no folder was named; give yours with --set {field}.folder.path=DIR")
    if isinstance(value, OutsideFolder) and value.path:
        folder = _place(value.path)
        return OutsideFolder(_digest(folder, root), str(folder))
    if isinstance(value, PretrainedEncoderRecipe) and value.place and not value.sha256:
        folder = _place(value.place)
        files = hash_folder(folder, _memory(folder, root))
        sha256 = next((file.sha256 for file in files if file.path == WEIGHTS), "")  # sharded: pinned later
        return dataclasses.replace(value, place=str(folder), sha256=sha256)
    parquet = isinstance(value, LibriSpeechRecipe) and value.form == "parquet"
    if (parquet or isinstance(value, (PublicSetsRecipe, CoreBundleRecipe))) and value.place:
        place = _place(value.place)
        return dataclasses.replace(value, place=str(place), digest=_digest(place, root))
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = {f.name: _settled(getattr(value, f.name), root) for f in dataclasses.fields(value)}
        if fields.get("dtype") == "auto":
            reads = isinstance(value, FeatureRecipe)
            fields["dtype"] = hardware.fast_dtype() if reads else hardware.training_dtype()
        return dataclasses.replace(value, **fields)
    return value


def _place(path: str) -> Path:
    return Path(path).expanduser().absolute()


def _digest(place: Path, root: Path) -> str:
    """Of a folder's files, or of one file."""
    return sha256_file(place) if place.is_file() else digest_folder(place, _memory(place, root))


def _memory(folder: Path, root: Path) -> Path:
    """Where the hashes of a folder's files are remembered."""
    return root / f".folder-{sha256_text(str(folder))[:16]}.json"
