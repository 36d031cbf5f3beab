"""A folder of anybody's audio files as a corpus, with what is known of them in a JSON Lines file.

Each line of the metadata is an object: `audio` names a file relative to the folder; `transcript`, `labels`,
`speaker`, `split` and `licence` may follow. Files without a line are taken too, unlabelled, for training.

Which files share a tar is decided by their names, not by counting: after a file whose name hashes to a round
number the tar is closed. So a file more or less moves a boundary next to it and no other, and every other
tar, with all that was computed from it, stays as it is (content-defined chunking; Muthitacharoen and others,
"A low-bandwidth network file system", 2001).
"""

import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any, TypeVar

from omni_model.artifacts import PayloadFile, canonical_json, content_digest, sha256_file, sha256_text
from omni_model.audio import ingest
from omni_model.audio.clips import SPLITS, Clip, ClipPlan, Dropped, ShardPlan
from omni_model.audio.corpora import write_shards
from omni_model.audio.unusable import Unusable
from omni_model.config import JSON, BadInput, FolderRecipe, OutsideFolder, Runtime
from omni_model.outside import hash_folder
from omni_model.storage import Workspace

GENERATOR = "folder"
# Whatever may hold sound is tried, so that a file of a kind we cannot read is counted and not overlooked.
AUDIO_SUFFIXES = frozenset(
    (".wav", ".wave", ".flac", ".mp3", ".ogg", ".oga", ".opus", ".webm", ".mka", ".mkv", ".mp4", ".m4a")
    + (".m4b", ".mov", ".aac", ".3gp", ".aif", ".aiff", ".aifc", ".au", ".snd", ".caf", ".w64", ".rf64")
    + (".wma", ".amr", ".ape", ".wv", ".mp2", ".spx", ".ac3")
)
BYTES_PER_CLIP = 1 << 20  # about 30 s of 16-bit 16 kHz sound: what a large file counts in a tar
MAX_NAME_CHARS = 60
Made = tuple[ClipPlan, Clip] | Dropped


@dataclass(frozen=True)
class Known:
    """What a line of the metadata says about one file."""

    transcript: str = ""
    labels: dict[str, str] = field(default_factory=dict)
    speaker: str = ""
    split: str = "train"
    licence: str = ""


@dataclass(frozen=True)
class Source:
    """One file of the folder: all that decides the clips it gives."""

    path: str
    size: int
    sha256: str
    known: Known

    @property
    def key(self) -> str:
        """The clip key of its path."""
        return clip_key(self.path)

    @property
    def weight(self) -> int:
        """How many clips it counts for when tars are filled: a guess by its size."""
        return 1 + self.size // BYTES_PER_CLIP

    @property
    def told_path(self) -> str:
        """The path as text that can be printed, whatever bytes the file system allows in names."""
        return self.path.encode("utf-8", "surrogateescape").decode("utf-8", "replace")


SourceType = TypeVar("SourceType", bound=Source)


def clip_key(path: str) -> str:
    """A clip key of the path's own letters, and eight digits that tell `a b.wav` from `a-b.flac`."""
    name = re.sub(r"[^A-Za-z0-9_-]+", "-", str(PurePosixPath(path).with_suffix("")))
    return f"{name[-MAX_NAME_CHARS:].strip('-')}-{sha256_text(canonical_json(path))[:8]}".lstrip("-")


def import_folder(recipe: FolderRecipe, *, work: Workspace, runtime: Runtime) -> dict[str, JSON]:
    """Every audio file below a folder as clips. Stage function; returns the facts of an AudioCorpus.

    Raises:
        BadInput: the folder or its metadata cannot be used, or the folder is not what it was when the run
            was planned. The folder itself is never written to.
    """
    folder, files = planned_files(recipe.folder)
    known = read_metadata(folder, recipe, [file.path for file in files])
    sources = [
        Source(file.path, file.size, file.sha256, known.get(file.path, Known(licence=recipe.licence)))
        for file in files
        if file.path in known or PurePosixPath(file.path).suffix.lower() in AUDIO_SUFFIXES
    ]
    if not sources:
        raise BadInput(f"{folder} holds no audio files; name a folder that does.")
    read = reading(folder, recipe.max_clip_s)
    shards = plan_shards(sources, recipe.clips_per_shard, recipe.max_clip_s, read)
    facts = write_shards(shards, generator=GENERATOR, work=work, expected=len(sources))
    work.metrics.summary(files=len(sources), described=len(known))
    return facts


def planned_files(outside: OutsideFolder) -> tuple[Path, list[PayloadFile]]:
    """A folder of the user's and its files.

    Raises:
        BadInput: it was not named, is not there, or is not what it was when the run was planned.
    """
    if not outside.path or not outside.digest:
        raise BadInput("the recipe's folder has no path or no digest; name a folder and plan the run anew.")
    folder = Path(outside.path).expanduser()
    files = hash_folder(folder)
    if content_digest(files) != outside.digest:
        raise BadInput(f"{folder} has changed since the run was planned; run again to take it as it is now.")
    return folder, files


def plan_shards(
    sources: Sequence[SourceType],
    clips_per_shard: int,
    max_clip_s: float,
    read: Callable[[SourceType], Iterator[Made]],
) -> list[ShardPlan]:
    """The tars of files, split by split; `read` makes the clips of one file."""
    shards = []
    for split in SPLITS:
        own = [source for source in sources if source.known.split == split]
        for number, group in enumerate(chunks(own, clips_per_shard)):
            decisive: list[JSON] = [[asdict(source) for source in group], max_clip_s]
            made_from = sha256_text(canonical_json(decisive))
            shards.append(ShardPlan(f"{split}-{number:05d}", made_from, _making(group, read)))
    return shards


def _making(
    group: Sequence[SourceType], read: Callable[[SourceType], Iterator[Made]]
) -> Callable[[], Iterator[Made]]:
    return lambda: (made for source in group for made in read(source))


def chunks(sources: Sequence[SourceType], clips_per_shard: int) -> list[list[SourceType]]:
    """Files in the order of their paths, in groups of about `clips_per_shard` clips.

    A group ends after a file whose hash says so, once it has half that many; it ends anyway at twice as many.
    """
    least, most = max(1, clips_per_shard // 2), 2 * clips_per_shard
    groups: list[list[SourceType]] = []
    weight, is_closed = 0, True
    for source in sorted(sources, key=lambda source: source.path):
        if is_closed or weight + source.weight > most:
            groups.append([])
            weight = 0
        groups[-1].append(source)
        weight += source.weight
        is_closed = weight >= least and int(sha256_text(source.key)[:8], 16) % least == 0
    return groups


def reading(folder: Path, max_clip_s: float) -> Callable[[Source], Iterator[Made]]:
    """What makes the clips of one file of a folder."""
    return lambda source: _clips(folder, source, max_clip_s)


def _clips(folder: Path, source: Source, max_clip_s: float) -> Iterator[Made]:
    """The clips of one file.

    A transcript is about the whole recording. Where that is split it fits no piece, so it is kept among the
    provenance instead; labels, speaker and licence hold for every piece.
    """
    path, known = folder / source.path, source.known
    try:
        require_unchanged(path, source)
        for number, clip in enumerate(ingest.clips(path, source.told_path, max_clip_s=max_clip_s)):
            if isinstance(clip, Dropped):
                yield clip
                continue
            is_split = "split" in clip.changes
            about: dict[str, Any] = {"file": source.told_path, "file_sha256": source.sha256}
            if is_split and known.transcript:
                about["transcript_of_recording"] = known.transcript
            plan = ClipPlan(
                key=f"{source.key}-p{number:05d}" if is_split else source.key,
                split=known.split,
                labels=known.labels,
                parameters=about,
                transcript="" if is_split else known.transcript,
                speaker=known.speaker,
                licence=known.licence,
            )
            yield plan, clip
    except Unusable as unusable:
        yield Dropped(source.told_path, unusable.reason)
    except OSError as error:
        raise BadInput(f"{path} cannot be read ({error.strerror}); run again when it can.") from None


def require_unchanged(path: Path, source: Source) -> None:
    """Raises BadInput where a file's bytes are not those of the plan."""
    if sha256_file(path) != source.sha256:
        raise BadInput(f"{path} changed during the import; run again to take it as it is now.")


# --- metadata ------------------------------------------------------------------------------------


def read_metadata(folder: Path, recipe: FolderRecipe, paths: Sequence[str]) -> dict[str, Known]:
    """Path -> what the metadata says of it; empty where there is no metadata file.

    Raises:
        BadInput: naming file and line: broken JSON, an unknown field, a value of a wrong kind, a split that
            does not exist, a file that is not there, or one described twice.
    """
    place = folder / recipe.metadata
    if recipe.metadata not in paths:
        if recipe.metadata != FolderRecipe.metadata:
            raise BadInput(f"{place} does not exist; name the metadata file relative to the folder.")
        return {}
    found: dict[str, Known] = {}
    lines: dict[str, int] = {}
    there = frozenset(paths)
    for number, line in enumerate(_lines(place), start=1):
        where = f"{place}, line {number}"
        if not line.strip():
            continue
        audio, known = _row(line, where, recipe.licence)
        if audio not in there:
            raise BadInput(f"{where}: there is no file {audio!r} in the folder; correct `audio`.")
        if audio in found:
            raise BadInput(f"{where}: {audio!r} is described by line {lines[audio]} already; keep one line.")
        found[audio], lines[audio] = known, number
    return found


def _lines(place: Path) -> list[str]:
    try:
        return place.read_text(encoding="utf-8-sig").split("\n")
    except UnicodeDecodeError:
        raise BadInput(f"{place} is not UTF-8 text; save it as such.") from None


def _row(line: str, where: str, licence: str) -> tuple[str, Known]:
    """The file that one line of metadata is about, and what it says."""
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):
        raise BadInput(f"{where} is not JSON; write one object a line.") from None
    if not isinstance(row, Mapping):
        raise BadInput(f"{where} is not an object; write {{'audio': ...}} on each line.")
    fields = {"audio", *Known.__dataclass_fields__}
    if unknown := sorted(set(row) - fields):
        raise BadInput(f"{where}: the field {unknown[0]!r} is unknown; use {', '.join(sorted(fields))}.")
    for name, value in row.items():
        texts = value.items() if name == "labels" and isinstance(value, dict) else [(name, value)]
        if not all(isinstance(text, str) for pair in texts for text in pair):
            raise BadInput(f"{where}: {name} must be text, labels an object of texts; write it so.")
        if name == "labels" and not isinstance(value, dict):
            raise BadInput(f"{where}: labels must be an object of texts; write it so.")
    if not row.get("audio"):
        raise BadInput(f"{where}: `audio` is missing; name the file relative to the folder.")
    if (split := row.get("split", "train")) not in SPLITS:
        raise BadInput(f"{where}: the split {split!r} is none of {', '.join(SPLITS)}.")
    audio = PurePosixPath(row["audio"]).as_posix()
    return audio, Known(**{"licence": licence} | {name: row[name] for name in row if name != "audio"})
