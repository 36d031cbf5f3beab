"""Recipes of whole runs, and the runtime that never counts."""

from dataclasses import dataclass
from typing import ClassVar

from omni_model.config.base import Recipe
from omni_model.config.judging import BenchmarkRecipe, EmbeddingMapRecipe, EvaluationRecipe, ReportRecipe
from omni_model.config.learning import (
    AlignRecipe,
    LoraRecipe,
    MicroEncoderRecipe,
    OverfitRecipe,
    PretrainRecipe,
)
from omni_model.config.sound import (
    CosyVoiceRecipe,
    EncoderRecipe,
    FeatureRecipe,
    FolderRecipe,
    IndexTtsRecipe,
    LibriSpeechRecipe,
    PretrainedEncoderRecipe,
    SineRecipe,
    SpeechRecipe,
    TextureRecipe,
)
from omni_model.config.text import TextRecipe, TokenizerRecipe


@dataclass(frozen=True)
class SmokeRecipe(Recipe):
    """Five sine clips through the whole machine in under a minute."""

    name: ClassVar[str] = "smoke"
    seed: int = 0
    sines: SineRecipe = SineRecipe()
    encoder: EncoderRecipe = EncoderRecipe()
    features: FeatureRecipe = FeatureRecipe(dtype="float32")
    overfit: OverfitRecipe = OverfitRecipe()
    report: ReportRecipe = ReportRecipe(title="nanochat-omni smoke")


@dataclass(frozen=True)
class DemoRecipe(Recipe):
    """Everything from nothing on a laptop: sounds, a text model, a listener and its score."""

    name: ClassVar[str] = "demo"
    seed: int = 0
    texture: TextureRecipe = TextureRecipe()
    speech: SpeechRecipe = SpeechRecipe()
    encoder: MicroEncoderRecipe = MicroEncoderRecipe()
    features: FeatureRecipe = FeatureRecipe(dtype="float32")
    text: TextRecipe = TextRecipe()
    tokenizer: TokenizerRecipe = TokenizerRecipe()
    pretrain: PretrainRecipe = PretrainRecipe()
    align: AlignRecipe = AlignRecipe()
    lora: LoraRecipe = LoraRecipe()
    benchmark: BenchmarkRecipe = BenchmarkRecipe()
    evaluation: EvaluationRecipe = EvaluationRecipe()
    embedding_map: EmbeddingMapRecipe = EmbeddingMapRecipe()
    report: ReportRecipe = ReportRecipe()


@dataclass(frozen=True)
class HearingRecipe(Recipe):
    """What follows once there is a corpus: an encoder, its features, and a report on both."""

    seed: int = 0
    encoder: PretrainedEncoderRecipe = PretrainedEncoderRecipe()
    features: FeatureRecipe = FeatureRecipe()
    report: ReportRecipe = ReportRecipe(title="nanochat-omni: what came in")


@dataclass(frozen=True)
class FolderRunRecipe(HearingRecipe):
    """Features of your own recordings."""

    name: ClassVar[str] = "folder"
    recordings: FolderRecipe = FolderRecipe()


@dataclass(frozen=True)
class LibriSpeechRunRecipe(HearingRecipe):
    """Features of LibriSpeech."""

    name: ClassVar[str] = "librispeech"
    librispeech: LibriSpeechRecipe = LibriSpeechRecipe()


@dataclass(frozen=True)
class CosyVoiceRunRecipe(HearingRecipe):
    """Features of what a CosyVoice server says."""

    name: ClassVar[str] = "cosyvoice"
    cosyvoice: CosyVoiceRecipe = CosyVoiceRecipe()


@dataclass(frozen=True)
class IndexTtsRunRecipe(HearingRecipe):
    """Features of what an IndexTTS server says."""

    name: ClassVar[str] = "indextts"
    indextts: IndexTtsRecipe = IndexTtsRecipe()


@dataclass(frozen=True)
class Runtime(Recipe):
    """How to run, never what to make: no field of this class may change a byte of a payload.

    Attributes:
        store: directory of the artifacts, or s3://bucket/prefix; empty means `OMNI_STORE`, else `runs/`.
        threads: torch threads of each stage's process.
        parallel_stages: how many stages compute at once.
        workers: processes inside a stage whose work divides; 0 means cores / parallel_stages.
        recompute: what to do with a costly result that only changed code made stale: ask, yes or stop.
        inline: compute in this process; for tests and notebooks.
        fresh: use a new, empty store that is deleted when the run succeeds; for a nightly smoke.
    """

    may_be_zero = (*Recipe.may_be_zero, "workers")
    choices = {"recompute": ("ask", "yes", "stop")}

    store: str = ""
    threads: int = 1
    parallel_stages: int = 2
    workers: int = 0
    checkpoint_every_s: float = 20.0
    recompute: str = "ask"
    inline: bool = False
    fresh: bool = False
