"""Typed handles on finished work, and the manifest that says it is finished.

An *artifact* is a directory `{store}/{stage}/{key[:32]}/` holding `out/` (the payload) and `manifest.json`,
written last: without it there is no artifact. Its *content digest* is a hash over the payload alone, so two
runs that make the same bytes are the same to every later stage. A *handle* is what flows pass along: where
the artifact is, its digest, and the few facts the next stage must check. Standard library only.
"""

import dataclasses
import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Self

from omni_model.config import JSON, BadInput

SCHEMA = 1
MANIFEST = "manifest.json"


def canonical_json(value: JSON) -> str:
    """One text per value: sorted keys, no spaces, ASCII. NaN and infinity raise ValueError."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False)


def sha256_text(text: str) -> str:
    """Hex sha256 of a text's UTF-8 bytes."""
    return hashlib.sha256(text.encode()).hexdigest()


def sha256_file(path: Path) -> str:
    """Hex sha256 of a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@dataclass(frozen=True)
class PayloadFile:
    """One file of a payload: path relative to `out/`, size in bytes, sha256 in hex."""

    path: str
    size: int
    sha256: str


def content_digest(files: list[PayloadFile]) -> str:
    """Hex sha256 over the sorted (path, size, sha256) of a payload."""
    return sha256_text(canonical_json([[f.path, f.size, f.sha256] for f in sorted(files, key=_path)]))


def _path(file: PayloadFile) -> str:
    return file.path


def list_payload(out: Path) -> list[Path]:
    """Every file below `out`, as sorted relative paths."""
    return sorted(p.relative_to(out) for p in out.rglob("*") if p.is_file())


def hash_payload(out: Path) -> list[PayloadFile]:
    """Size and sha256 of every file below `out`."""
    return [
        PayloadFile(path.as_posix(), (out / path).stat().st_size, sha256_file(out / path))
        for path in list_payload(out)
    ]


class DamagedManifest(BadInput):
    """A `manifest.json` that cannot be read: its artifact counts as unfinished."""


@dataclass(frozen=True)
class Manifest:
    """What was made, from what, and what it measured. Everything but the payload files may vary freely."""

    stage: str
    key: str
    handle: str
    components: dict[str, Any]
    files: list[PayloadFile]
    facts: dict[str, Any]
    metrics: dict[str, Any]
    timings: dict[str, float]
    versions: dict[str, str]
    schema: int = SCHEMA

    @property
    def digest(self) -> str:
        """The payload's content digest."""
        return content_digest(self.files)

    def write(self, directory: Path) -> None:
        """Put `manifest.json` in place in one step; a crash leaves either none or a whole one."""
        write_atomically(directory / MANIFEST, json.dumps(dataclasses.asdict(self), sort_keys=True, indent=1))

    @classmethod
    def read(cls, directory: Path) -> "Manifest":
        """The manifest of a finished artifact.

        Raises:
            FileNotFoundError: the artifact is not finished.
            DamagedManifest: the file is not a manifest.
            BadInput: it is one of another schema, which is never guessed at.
        """
        path = directory / MANIFEST
        text = path.read_text()
        try:
            plain = json.loads(text)
            found = plain["schema"]
        except (json.JSONDecodeError, KeyError, TypeError):
            raise DamagedManifest(f"{path} is not a manifest; the stage will be made again") from None
        if found != SCHEMA:
            raise BadInput(
                f"{path} has schema {found} and this version reads schema {SCHEMA}; "
                f"run the version that wrote it, or delete {directory}"
            )
        files = [PayloadFile(**f) for f in plain.pop("files")]
        return cls(files=files, **plain)


def write_atomically(path: Path, text: str) -> None:
    """Write a text file so that readers see the old bytes or the new ones, never a part, crash or not."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with temporary.open("w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


# --- handles -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Artifact:
    """A finished artifact: its stage, key (64 hex), directory, and content digest."""

    kinds: ClassVar[dict[str, type["Artifact"]]] = {}

    stage: str
    key: str
    uri: str
    digest: str

    def __init_subclass__(cls) -> None:
        Artifact.kinds[cls.__name__] = cls

    @property
    def out(self) -> Path:
        """The payload's directory."""
        return Path(self.uri) / "out"

    @classmethod
    def fact_names(cls) -> set[str]:
        """The facts a stage that makes this kind must return."""
        return {f.name for f in dataclasses.fields(cls)} - {f.name for f in dataclasses.fields(Artifact)}

    @classmethod
    def from_manifest(cls, manifest: Manifest, directory: Path) -> Self:
        """The handle on the artifact that `manifest` describes."""
        kind = cls.kinds.get(manifest.handle)
        if kind is None or not issubclass(kind, cls):
            raise BadInput(f"{directory} holds a {manifest.handle}, not a {cls.__name__}")
        if set(manifest.facts) != kind.fact_names():
            raise BadInput(f"{directory} lacks facts of a {manifest.handle}; delete it to have it made again")
        place = (manifest.stage, manifest.key, str(directory), manifest.digest)
        return kind(*place, **manifest.facts)

    def to_json(self) -> dict[str, Any]:
        """The handle as plain JSON, with its kind."""
        return {"handle": type(self).__name__, **dataclasses.asdict(self)}

    @staticmethod
    def from_json(plain: Mapping[str, Any]) -> "Artifact":
        """Undo `to_json`."""
        fields = dict(plain)
        kind = fields.pop("handle", None)
        if kind not in Artifact.kinds:
            raise BadInput(f"{kind!r} is not a kind of artifact; one of {', '.join(sorted(Artifact.kinds))}")
        return Artifact.kinds[kind](**fields)


@dataclass(frozen=True)
class AudioCorpus(Artifact):
    """Clips in `clips-*.tar` (`<key>.wav` 16-bit mono, `<key>.json`), with `clips.jsonl` and `index.json`."""

    num_clips: int
    duration_s: float
    sample_rate_hz: int
    num_dropped: int


@dataclass(frozen=True)
class EncoderFiles(Artifact):
    """A model directory as transformers reads it; `weights` says where the weights came from."""

    family: str  # whisper or w2v-bert
    weights: str
    width: int
    num_layers: int
    frame_rate_hz: int
    max_audio_s: float


@dataclass(frozen=True)
class FeatureShards(Artifact):
    """webdataset tars `features-*.tar` (`<key>.feat.npy` fp16, `<key>.json`) with `index.json`.

    A frame is `width` wide: `num_layers` layers side by side, each of the encoder's width.
    """

    num_clips: int
    num_frames: int
    width: int
    num_layers: int
    frame_rate_hz: int


@dataclass(frozen=True)
class TextCorpus(Artifact):
    """Parquet files `train-*.parquet` and `validation-*.parquet` with a column `text`, a document a row.

    The embedded corpus has a second column, `lesson`: what a document teaches, as JSON. `num_bytes` are those
    of the files.
    """

    num_documents: int
    num_bytes: int


@dataclass(frozen=True)
class PublicSets(Artifact):
    """`NAME/SPLIT-NNNNN.parquet` of each set, with the columns that its makers publish."""

    num_sets: int
    num_rows: int


@dataclass(frozen=True)
class CoreBundle(Artifact):
    """`core.yaml`, `eval_meta_data.csv` and `eval_data/`, as nanochat's bundle has them."""

    num_tasks: int
    num_items: int


@dataclass(frozen=True)
class Conversations(Artifact):
    """`conversations.parquet` in training order: `messages`, {role, content} as JSON, and `source`."""

    num_conversations: int


@dataclass(frozen=True)
class TokenizerFiles(Artifact):
    """`tokenizer.json`."""

    vocab_size: int


@dataclass(frozen=True)
class Checkpoint(Artifact):
    """`model.safetensors` and `config.json` of trained weights."""

    num_parameters: int
    steps: int


@dataclass(frozen=True)
class GptCheckpoint(Checkpoint):
    """A language model."""

    n_embd: int
    vocab_size: int


@dataclass(frozen=True)
class ProjectorCheckpoint(Checkpoint):
    """A projector from encoder frames to soft tokens of the GPT it was trained with."""

    input_width: int
    n_embd: int


@dataclass(frozen=True)
class AdapterCheckpoint(Checkpoint):
    """A peft adapter in `adapter/` and the projector trained with it in `projector/`."""

    input_width: int
    n_embd: int
    rank: int


@dataclass(frozen=True)
class Benchmark(Artifact):
    """Multiple-choice questions about sounds in `items.jsonl`."""

    num_items: int
    items_sha256: str


@dataclass(frozen=True)
class Scores(Artifact):
    """`scores.json`: accuracy with its interval, groups, baselines; `answers.jsonl`: one verdict an item."""

    accuracy: float
    num_items: int


@dataclass(frozen=True)
class BaseScores(Artifact):
    """`scores.json`: bits per byte of both splits, CORE with its tasks, and continuations of prompts."""

    val_bpb: float
    core: float


@dataclass(frozen=True)
class ChatScores(Artifact):
    """`scores.json`: ChatCORE and its tasks with intervals; `answers.jsonl`: one verdict an item."""

    chat_core: float


@dataclass(frozen=True)
class EmbeddingMap(Artifact):
    """`map.png` and `map.json`: soft tokens among text embeddings, with cluster numbers."""

    num_points: int


@dataclass(frozen=True)
class Report(Artifact):
    """`report.html`, one self-contained page; `report.md`, the same in short; and its result in words."""

    headline: str
    meaning: str
