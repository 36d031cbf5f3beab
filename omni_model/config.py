"""Every recipe on one page, and the runtime that never counts.

A *recipe* is a frozen dataclass of literals. Its values are identity: they enter the key of the stage
that reads them, so changing one re-runs that stage and nothing before it. `Runtime` holds everything
that must not change a result: store, threads, devices, how often to save. Standard library only.

A field added to a recipe later is declared with `added(default, as_before=...)`: at the value that means
"as before" it is left out of the key, so results made before the field existed stay current. One declared
with `unkeyed(default)` never counts: it says where something lies, not what it is.
"""

import math
from dataclasses import dataclass, field
from typing import Any, ClassVar

JSON = None | bool | int | float | str | list["JSON"] | dict[str, "JSON"]


class BadInput(ValueError):
    """Something a person gave is wrong. The message is one sentence that names it and says what to do."""


def added(default: Any, *, as_before: Any) -> Any:
    """A recipe field that came later; the key leaves it out while it equals `as_before`."""
    return field(default=default, metadata={"as_before": as_before})


def unkeyed(default: Any) -> Any:
    """A recipe field that is no part of the key."""
    return field(default=default, metadata={"identity": False})


class Recipe:
    """Literals that bear identity. Numbers are positive, and zero only where a recipe says it may be."""

    may_be_zero: ClassVar[tuple[str, ...]] = ("seed", "warmup_steps")
    choices: ClassVar[dict[str, tuple[str, ...]]] = {}

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            where = f"{type(self).__name__}.{name}"
            if isinstance(value, (int, float)) and not isinstance(value, bool):
                least = "zero or more" if name in self.may_be_zero else "more than zero"
                if not (0 <= value < math.inf) or (value == 0 and name not in self.may_be_zero):
                    raise BadInput(f"{where} must be {least}, not {value}")
            if name in self.choices and value not in self.choices[name]:
                raise BadInput(f"{where} must be one of {', '.join(self.choices[name])}, not {value!r}")


# --- sound ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class SineRecipe(Recipe):
    """The five smoke clips. They are fixed by `omni_model/audio/sine_clips.json`; there is nothing to set."""


@dataclass(frozen=True)
class SplitSizes(Recipe):
    """How many clips each split holds. Test clips use voices and parameters the others never see."""

    train: int
    validation: int
    test: int


@dataclass(frozen=True)
class TextureRecipe(Recipe):
    """Tones, sweeps, tremolo, noises and beeps made with numpy."""

    clips: SplitSizes = SplitSizes(train=900, validation=120, test=240)
    min_duration_s: float = 1.0
    max_duration_s: float = 2.4
    clips_per_shard: int = 300


@dataclass(frozen=True)
class SpeechRecipe(Recipe):
    """Short spoken phrases by espeak-ng, one voice, pitch, pace and loudness per clip."""

    clips: SplitSizes = SplitSizes(train=900, validation=120, test=240)
    max_duration_s: float = 3.0
    clips_per_shard: int = 300


@dataclass(frozen=True)
class EncoderRecipe(Recipe):
    """A Whisper encoder of this shape with random weights. The default shape is whisper-tiny's."""

    width: int = 384
    num_layers: int = 4
    num_heads: int = 6
    num_mel_bins: int = 80
    max_audio_s: int = 30


@dataclass(frozen=True)
class FeatureRecipe(Recipe):
    """How a frozen encoder is read. The shard of the corpus is the unit of work."""

    layer: str = "last"
    dtype: str = "float32"


# --- from outside ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class OutsideFile(Recipe):
    """A file that somebody else made. Its bytes are identity; where they lie is not."""

    sha256: str = ""
    path: str = unkeyed("")


@dataclass(frozen=True)
class TokenizerImportRecipe(Recipe):
    """nanochat's `tokenizer.pkl`."""

    pickle: OutsideFile = OutsideFile()


@dataclass(frozen=True)
class GptImportRecipe(Recipe):
    """nanochat's `model_NNNNNN.pt` and `meta_NNNNNN.json`; the step is the number in their names."""

    may_be_zero = (*Recipe.may_be_zero, "step")

    model: OutsideFile = OutsideFile()
    meta: OutsideFile = OutsideFile()
    step: int = 0


# --- text ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class TextRecipe(Recipe):
    """Sentences and questions about sounds, written from the grammar in `omni_model/text/grammar.json`."""

    num_documents: int = 24_000
    letters_share: float = 0.15
    words_share: float = 0.25
    questions_share: float = 0.45


@dataclass(frozen=True)
class TokenizerRecipe(Recipe):
    """`bpe` trains on the corpus; `bytes` is UTF-8 plus one beginning-of-sequence token, 257 in all."""

    choices = {"kind": ("bpe", "bytes")}

    kind: str = "bpe"
    vocab_size: int = 512


@dataclass(frozen=True)
class GptShape(Recipe):
    """Depth and widths of the language model."""

    n_layer: int
    n_embd: int
    n_head: int
    n_kv_head: int
    sequence_len: int
    window_pattern: str = "L"
    audio_value_embedding: str = "zero"


# --- learning ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ProjectorShape(Recipe):
    """Encoder frames per soft token, and the hidden width of the projector's MLP."""

    stack: int = 8
    hidden: int = 512


@dataclass(frozen=True)
class OverfitRecipe(Recipe):
    """Projector and GPT trained together on five captions: proof of plumbing, not of hearing."""

    gpt: GptShape = GptShape(n_layer=6, n_embd=384, n_head=3, n_kv_head=3, sequence_len=256)
    projector: ProjectorShape = ProjectorShape()
    steps: int = 50
    lr: float = 1e-3
    min_loss_drop: float = 0.5


@dataclass(frozen=True)
class PretrainRecipe(Recipe):
    """The text model, lesson after lesson, each opened by the accuracy in the one before.

    `last_lesson_steps` is how long sentences are read once letters are bound, with a falling learning rate;
    `max_steps` is when to give up. `match_at_start`: keys begin equal to queries, so that a word finds its
    earlier copy from the first step; without it the first lesson took more than three times as long.
    """

    may_be_zero = (*Recipe.may_be_zero, "lesson_accuracy", "min_accuracy")

    gpt: GptShape = GptShape(n_layer=3, n_embd=96, n_head=3, n_kv_head=3, sequence_len=128)
    max_steps: int = 1500
    last_lesson_steps: int = 400
    packed_rows_per_step: int = 8
    exchanges_per_step: int = 24
    matrix_lr: float = 0.04
    embedding_lr: float = 0.01
    unembedding_lr: float = 0.004
    warmup_steps: int = 20
    lesson_accuracy: float = 0.75
    min_accuracy: float = 0.98
    match_at_start: bool = True


@dataclass(frozen=True)
class AlignRecipe(Recipe):
    """Projector only; encoder and GPT stay frozen. 10 frames at 50 Hz are 5 soft tokens a second."""

    projector: ProjectorShape = ProjectorShape(stack=10, hidden=256)
    steps: int = 400
    rows_per_step: int = 16
    lr: float = 3e-3
    warmup_steps: int = 20


@dataclass(frozen=True)
class LoraRecipe(Recipe):
    """Low-rank adapters on the GPT's linears; the projector goes on at its own, lower rate."""

    rank: int = 16
    alpha: int = 32
    steps: int = 700
    rows_per_step: int = 16
    lr: float = 2e-3
    projector_lr: float = 1e-3
    warmup_steps: int = 20
    caption_share: float = 0.2


# --- judging -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class BenchmarkRecipe(Recipe):
    """AudioBench-mini: 4 options, keys balanced inside each group. It has a seed of its own."""

    words: int = 60
    voice: int = 60
    scene: int = 80
    seed: int = 20260314


@dataclass(frozen=True)
class EvaluationRecipe(Recipe):
    """Letter logits over every rotation of the options; intervals by bootstrap over the items."""

    shuffles: int = 5
    bootstrap_draws: int = 10_000
    confidence: float = 0.95


@dataclass(frozen=True)
class EmbeddingMapRecipe(Recipe):
    """Where soft tokens land among text embeddings: principal components fitted on text alone."""

    clips: int = 120
    components: int = 2


@dataclass(frozen=True)
class ReportRecipe(Recipe):
    """The page a stranger reads."""

    title: str = "nanochat-omni"
    listed_items: int = 12


# --- runs ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class SmokeRecipe(Recipe):
    """Five sine clips through the whole machine in under a minute."""

    name: ClassVar[str] = "smoke"
    seed: int = 0
    sines: SineRecipe = SineRecipe()
    encoder: EncoderRecipe = EncoderRecipe()
    features: FeatureRecipe = FeatureRecipe()
    overfit: OverfitRecipe = OverfitRecipe()
    report: ReportRecipe = ReportRecipe(title="nanochat-omni smoke")


@dataclass(frozen=True)
class DemoRecipe(Recipe):
    """Everything from nothing on a laptop: sounds, a text model, a listener and its score."""

    name: ClassVar[str] = "demo"
    seed: int = 0
    texture: TextureRecipe = TextureRecipe()
    speech: SpeechRecipe = SpeechRecipe()
    encoder: EncoderRecipe = EncoderRecipe(width=128, num_layers=3, num_heads=4, max_audio_s=3)
    features: FeatureRecipe = FeatureRecipe()
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
class Runtime(Recipe):
    """How to run, never what to make: no field of this class may change a byte of a payload.

    Attributes:
        store: directory of the artifacts; empty means `OMNI_STORE`, else `runs/`.
        threads: torch threads of each stage's process.
        parallel_stages: how many stages compute at once.
        recompute: what to do with a costly result that only changed code made stale: ask, yes or stop.
        inline: compute in this process; for tests and notebooks.
        fresh: use a new, empty store that is deleted when the run succeeds; for a nightly smoke.
    """

    choices = {"recompute": ("ask", "yes", "stop")}

    store: str = ""
    threads: int = 1
    parallel_stages: int = 2
    checkpoint_every_s: float = 20.0
    recompute: str = "ask"
    inline: bool = False
    fresh: bool = False
