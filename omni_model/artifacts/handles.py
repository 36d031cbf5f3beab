"""Handles: what flows pass along, one kind for each thing that stages make. Standard library only."""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Self

from omni_model.artifacts.manifest import Manifest
from omni_model.config import BadInput


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
class SoundFiles(Artifact):
    """Sets of recordings as their makers lay them out, a folder each."""

    num_sets: int
    num_files: int


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
class Instructions(Artifact):
    """`instructions.parquet`: conversations about clips, each with its `kind` and `split`."""

    num_rows: int
    num_clips: int


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
    """A projector from encoder frames to soft tokens of the GPT it was trained with.

    `policy_digest` stands for the features: encoder, layers, mix and dtype.
    """

    input_width: int
    n_embd: int
    gpt_digest: str
    policy_digest: str


@dataclass(frozen=True)
class AdapterCheckpoint(Checkpoint):
    """A peft adapter in `adapter/` and the projector trained with it in `projector/`."""

    input_width: int
    n_embd: int
    gpt_digest: str
    policy_digest: str
    rank: int


@dataclass(frozen=True)
class Familiarity(Artifact):
    """`familiarity.safetensors`: what is known, to tell how far a sound is; `familiarity.json`: how well."""

    words_limit: float
    sounds_limit: float


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
class Diagnosis(Artifact):
    """`diagnosis.json`: probes along the way, clips among words, retrieval, error rates; and `map.png`."""

    num_points: int


@dataclass(frozen=True)
class Report(Artifact):
    """`report.html`, one self-contained page, and others; `report.md`, in short; the result in words."""

    headline: str
    meaning: str
