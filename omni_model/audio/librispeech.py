"""LibriSpeech: people reading books aloud, with what they read and whether a woman or a man reads.

Panayotov et al. 2015, "Librispeech: an ASR corpus based on public domain audio books"; openslr.org/12, its
small parts openslr.org/31; CC BY 4.0. A part is one tar of FLAC files, a chapter to a folder, with a file of
transcripts in each. It is read as a stream and never unpacked. The same utterances as parquet files, as
Hugging Face's `openslr/librispeech_asr` has them, are read from a folder of the user's.

An archive is known by its MD5, which is checked before anything is made of it; utterances are counted where
their number is known (not for the two small parts).
"""

import dataclasses
import hashlib
import itertools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from omni_model import hardware
from omni_model.artifacts import SoundFiles, canonical_json, sha256_file, sha256_text
from omni_model.audio.clips import SPLITS, Clip, ClipPlan, Dropped, ShardPlan
from omni_model.audio.corpora import write_shards
from omni_model.audio.librispeech_files import (
    SPEAKERS,
    Utterance,
    num_parquet_rows,
    read_parquet,
    read_speakers,
    read_tar,
    refuse_page,
)
from omni_model.audio.unusable import Unusable
from omni_model.audio.waveform import read_recording
from omni_model.config import JSON, BadInput, LibriSpeechRecipe, Runtime
from omni_model.downloads import fetch
from omni_model.storage import Workspace

LICENCE = "CC-BY-4.0"
VOICES = {"F": "woman", "M": "man"}


@dataclass(frozen=True)
class Part:
    """One archive as openslr publishes it. `num_utterances` 0: not known here, so not counted."""

    resource: int
    size: int
    md5: str
    num_utterances: int = 0


PARTS = {
    "train-clean-100": Part(12, 6_387_309_499, "2a93770f6d5c6c964bc36631d331a522", 28_539),
    "train-clean-360": Part(12, 23_049_477_885, "c0e676e450a7ff2f54aeade5171606fa", 104_014),
    "dev-clean": Part(12, 337_926_286, "42e2234ba48799c1f50f24a7926300a1", 2_703),
    "test-clean": Part(12, 346_663_984, "32fa31d27d2e1cad72775fee3f4849a9", 2_620),
    "train-clean-5": Part(31, 332_954_390, "5df7d4e78065366204ca6845bb08f490"),
    "dev-clean-2": Part(31, 126_046_265, "6d7ab67ac6a1d2c993d050e16d61080d"),
}


def import_librispeech(recipe: LibriSpeechRecipe, *, work: Workspace, runtime: Runtime) -> dict[str, JSON]:
    """One part of LibriSpeech. Stage function; returns AudioCorpus' facts.

    Form "tar" reads the archive at `recipe.place`, or downloads it; "parquet" reads the `*.parquet` files of
    the folder `recipe.place`, in the order of their names, and its SPEAKERS.TXT, if there is one. Recordings
    that cannot be used are left out and counted.

    Raises:
        BadInput: an unknown part, nothing at `place`, no server has it, or what is there is damaged, is not
            that part, or lacks utterances.
    """
    part = PARTS.get(recipe.part)
    if part is None:
        raise BadInput(f"librispeech.part {recipe.part!r} is not known; choose from {', '.join(PARTS)}")
    if recipe.split not in SPLITS:
        raise BadInput(f"librispeech.split {recipe.split!r} is none of {', '.join(SPLITS)}")
    archive = work.partial / f"{recipe.part}.tar.gz"
    if recipe.form == "parquet":
        shards = _parquet_shards(recipe, part)
    else:
        shards = _tar_shards(recipe, part, _archive(recipe, part, archive, work))
    expected = recipe.max_clips or part.num_utterances
    facts = write_shards(shards, generator="librispeech", work=work, expected=expected)
    archive.unlink(missing_ok=True)  # only now: until then an attempt that is killed still needs it
    return facts


def read_librispeech(
    recipe: LibriSpeechRecipe, files: SoundFiles, *, work: Workspace, runtime: Runtime
) -> dict[str, JSON]:
    """Stage: the same of a part that an earlier stage laid out as openslr or Hugging Face does.

    It is not the part that is published, so it is known by its own bytes and by nobody's count.
    """
    place = files.out / "librispeech"
    if recipe.form == "parquet":
        own = dataclasses.replace(recipe, place=str(place / recipe.part))
        shards = _parquet_shards(own, Part(0, 0, ""))
    else:
        archive = place / f"{recipe.part}.tar.gz"
        shards = _tar_shards(recipe, Part(0, archive.stat().st_size, _md5(archive)), archive)
    return write_shards(shards, generator="librispeech", work=work, expected=recipe.max_clips)


def _plan(
    utterances: Iterator[Utterance],
    recipe: LibriSpeechRecipe,
    voices: Mapping[str, str],
    source: Mapping[str, JSON],
    prefix: str,
    limit: int,
) -> Iterator[ShardPlan]:
    """Cut a stream into shards. What is asked of the stream stays in order, whoever makes the clips."""
    for number in itertools.count():
        first = number * recipe.clips_per_shard
        size = min(recipe.clips_per_shard, limit - first) if limit else recipe.clips_per_shard
        head = next(utterances, None) if size > 0 else None
        if head is None:
            return
        group = itertools.chain([head], itertools.islice(utterances, size - 1))
        made_from = {
            "part": recipe.part,
            "form": recipe.form,
            "split": recipe.split,
            "voices": sha256_text(canonical_json(dict(voices))),
            **source,
            "first": first,
            "clips": size,
        }
        digest = sha256_text(canonical_json(made_from))
        yield ShardPlan(f"{prefix}{number:05d}", digest, partial(_clips, group, recipe, voices))
        for _ in group:  # of a shard that is there already, nobody took any
            pass


def _clips(
    group: Iterator[Utterance], recipe: LibriSpeechRecipe, voices: Mapping[str, str]
) -> Iterator[tuple[ClipPlan, Clip] | Dropped]:
    for utterance in group:
        if utterance.flac is None:
            yield Dropped(utterance.name, "no audio")
            continue
        try:
            recording = read_recording(utterance.flac, utterance.name)
        except Unusable as error:
            yield Dropped(utterance.name, error.reason)
            continue
        speaker, chapter, _ = utterance.name.split("-")
        plan = ClipPlan(
            key=utterance.name,
            split=recipe.split,
            labels={"voice": voices[speaker]} if speaker in voices else {},
            parameters={"part": recipe.part, "chapter": chapter},
            transcript=utterance.text.lower(),  # nobody else writes in capitals, which cost tokens
            speaker=f"librispeech-{speaker}",
            licence=LICENCE,
        )
        yield plan, Clip(recording.samples, changes=recording.levels.changes)


def voices_of(speakers: str) -> dict[str, str]:
    """Speaker id -> "woman" or "man". A row is `id | sex | part | minutes | name`; `;` starts a comment."""
    lines = [line for line in speakers.splitlines() if not line.startswith(";")]
    rows = [
        [cell.strip() for cell in line.split("|", 2)] for line in lines
    ]  # a name may hold a bar of its own
    return {row[0]: VOICES[row[1]] for row in rows if len(row) > 1 and row[1] in VOICES}


# --- where it comes from --------------------------------------------------------------------------


def _archive(recipe: LibriSpeechRecipe, part: Part, target: Path, work: Workspace) -> Path:
    """The archive, whole: the user's own, or downloaded to `target`."""
    if not recipe.place:
        network = hardware.network()
        if network.offline and not target.exists():
            raise BadInput(
                f"{target.name} is not asked for, because OMNI_OFFLINE or HF_HUB_OFFLINE is set; "
                "give the archive as librispeech.place"
            )
        urls = [f"{base}/resources/{part.resource}/{target.name}" for base in network.openslr]
        return fetch(urls, target, size=part.size, md5=part.md5, progress=work.metrics.log).path
    path = Path(recipe.place).expanduser()
    if not path.is_file():
        raise BadInput(f"{path} is not a file; give the archive as librispeech.place, or leave that empty")
    refuse_page(path)
    md5 = _md5(path)
    if md5 != part.md5:
        raise BadInput(
            f"{path} is not {recipe.part} as published, or is damaged: its MD5 is {md5}, not {part.md5}; "
            "download it again"
        )
    return path


def _md5(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, lambda: hashlib.md5(usedforsecurity=False)).hexdigest()


def _tar_shards(recipe: LibriSpeechRecipe, part: Part, archive: Path) -> Iterator[ShardPlan]:
    voices = voices_of(read_speakers(archive))
    utterances = _counted(read_tar(archive), part, archive)
    yield from _plan(utterances, recipe, voices, {"md5": part.md5}, "", recipe.max_clips)


def _counted(utterances: Iterator[Utterance], part: Part, archive: Path) -> Iterator[Utterance]:
    count = 0
    for utterance in utterances:
        count += 1
        yield utterance
    if part.num_utterances not in (0, count):
        raise BadInput(
            f"{archive} holds {count} utterances instead of {part.num_utterances}; download it again"
        )


def _parquet_shards(recipe: LibriSpeechRecipe, part: Part) -> Iterator[ShardPlan]:
    """Shards end where files end, so that a file that was replaced changes its own shards alone."""
    folder = Path(recipe.place).expanduser()
    paths = sorted(folder.glob("*.parquet")) if recipe.place else []
    if not paths:
        raise BadInput(f"{recipe.place or 'librispeech.place'} is no folder with parquet files; give yours")
    rows = [num_parquet_rows(path) for path in paths]
    if not recipe.max_clips and part.num_utterances not in (0, sum(rows)):
        raise BadInput(
            f"{folder} holds {sum(rows)} utterances and {recipe.part} has {part.num_utterances}; "
            "complete it, or set librispeech.max_clips"
        )
    speakers = folder / SPEAKERS
    voices = voices_of(speakers.read_text(errors="replace")) if speakers.exists() else {}
    wanted = min(recipe.max_clips or sum(rows), sum(rows))
    for number, (path, num_rows) in enumerate(zip(paths, rows, strict=True)):
        limit = min(num_rows, wanted)
        if limit:
            source = {"sha256": sha256_file(path)}
            yield from _plan(read_parquet(path), recipe, voices, source, f"{number:03d}-", limit)
        wanted -= limit
