"""Public sets of sounds, and of questions about sounds, out of a folder of the user's.

A reader for each layout says which recordings there are, what is known of them and which split they are for.
From there on it is a folder like any other: decoded, brought to 16 kHz, cut where too long, counted where
left out, a tar at a time.
"""

from pathlib import Path
from typing import Any

from omni_model.artifacts import SoundFiles, canonical_json, sha256_text
from omni_model.audio.clips import Dropped, ShardPlan
from omni_model.audio.corpora import write_shards
from omni_model.audio.folder import import_folder, plan_shards, planned_files, reading
from omni_model.audio.sound_set_layouts import Found, read_crema_d, read_esc_50, read_ravdess
from omni_model.audio.sound_set_musan import read_musan
from omni_model.audio.sound_set_questions import asking, plan_tables, read_questions
from omni_model.config import (
    JSON,
    BadInput,
    FolderRecipe,
    LaidOutSetRecipe,
    OutsideFolder,
    Runtime,
    SoundSetRecipe,
)
from omni_model.outside import digest_folder
from omni_model.storage import Workspace

READERS = {"crema-d": read_crema_d, "ravdess": read_ravdess, "esc-50": read_esc_50, "musan": read_musan}
LFS_POINTER = b"version https://git-lfs"


def import_sound_set(recipe: SoundSetRecipe, *, work: Workspace, runtime: Runtime) -> dict[str, JSON]:
    """The recordings of a public set as clips. Stage function; returns the facts of an AudioCorpus.

    Recordings that a set names and that are missing, or cannot be used, are left out and counted.

    Raises:
        BadInput: the folder is not there, is not what it was when the run was planned, or does not hold a set
            of that layout; or none of its recordings can be used.
    """
    folder, files = planned_files(recipe.folder)
    if recipe.layout == "audiobench-parquet":
        shards = plan_tables(recipe, folder, files)
        return write_shards(shards, generator=recipe.layout, work=work)
    read: Any
    if recipe.layout == "audiobench-json":
        found, read = read_questions(folder, files, recipe.licence), asking(folder, recipe.max_clip_s)
    else:
        found, read = READERS[recipe.layout](folder, files), reading(folder, recipe.max_clip_s)
    _refuse_pointer(folder, found)
    planned = plan_shards(found.sources, recipe.clips_per_shard, recipe.max_clip_s, read)
    shards = [*_left_out(found.left_out), *planned]
    return write_shards(shards, generator=recipe.layout, work=work, expected=len(found.sources))


def read_sound_set(
    recipe: LaidOutSetRecipe, files: SoundFiles, *, work: Workspace, runtime: Runtime
) -> dict[str, JSON]:
    """Stage: the same of a set that an earlier stage laid out, and of a folder like anybody's."""
    place = files.out / recipe.layout
    folder = OutsideFolder(digest_folder(place), str(place))
    if recipe.layout == "folder":
        own = FolderRecipe(folder=folder, clips_per_shard=recipe.clips_per_shard)
        return import_folder(own, work=work, runtime=runtime)
    public = SoundSetRecipe(folder, recipe.layout, clips_per_shard=recipe.clips_per_shard)
    return import_sound_set(public, work=work, runtime=runtime)


def _left_out(dropped: list[Dropped]) -> list[ShardPlan]:
    """A shard without clips, for recordings that gave none before anything was read."""
    if not dropped:
        return []
    made_from = sha256_text(canonical_json([[each.name, each.reason] for each in dropped]))
    return [ShardPlan("left-out", made_from, lambda: iter(dropped))]


def _refuse_pointer(folder: Path, found: Found) -> None:
    """A set that was cloned without Git LFS has a line of text in place of each recording."""
    for source in found.sources[:1]:
        path = folder / source.path
        with path.open("rb") as file:
            if file.read(len(LFS_POINTER)) == LFS_POINTER:
                raise BadInput(f"{path} only points to a recording; run `git lfs pull` in {folder}.")
