"""Recipes of what learns."""

from dataclasses import dataclass

from omni_model.config.base import BadInput, Recipe
from omni_model.config.sound import EncoderRecipe
from omni_model.config.text import GptShape


@dataclass(frozen=True)
class ProjectorShape(Recipe):
    """Encoder frames per soft token, and the hidden width of the projector's MLP.

    `mix` says what becomes of several layers: `learned` weighs them, `concat` reads all side by side.
    """

    choices = {"mix": ("learned", "concat")}

    stack: int = 8
    hidden: int = 512
    mix: str = "learned"


@dataclass(frozen=True)
class OverfitRecipe(Recipe):
    """Projector and GPT trained together on five captions: proof of plumbing, not of hearing."""

    gpt: GptShape = GptShape(n_layer=6, n_embd=384, n_head=3, n_kv_head=3, sequence_len=256)
    projector: ProjectorShape = ProjectorShape()
    steps: int = 50
    lr: float = 1e-3
    min_loss_drop: float = 0.5


@dataclass(frozen=True)
class LessonsRecipe(Recipe):
    """The demo's text model, lesson after lesson, each opened by the accuracy in the one before.

    Once sentences are understood at `settling_accuracy` too, they are read for `last_lesson_steps` more, with
    a falling learning rate, and again until the exam is passed; `max_steps` is when to give up.
    `match_at_start`: keys begin equal to queries, so that a word finds its earlier copy from the first step;
    without it the first lesson took more than three times as long.
    """

    may_be_zero = (*Recipe.may_be_zero, "lesson_accuracy", "settling_accuracy", "min_accuracy")

    gpt: GptShape = GptShape(n_layer=3, n_embd=96, n_head=3, n_kv_head=3, sequence_len=128)
    max_steps: int = 2500
    last_lesson_steps: int = 400
    packed_rows_per_step: int = 8
    exchanges_per_step: int = 24
    matrix_lr: float = 0.04
    embedding_lr: float = 0.01
    unembedding_lr: float = 0.004
    warmup_steps: int = 20
    lesson_accuracy: float = 0.75
    settling_accuracy: float = 0.9
    min_accuracy: float = 0.98
    match_at_start: bool = True


@dataclass(frozen=True)
class LearningRates(Recipe):
    """Of MuonAdamW's groups, for width 768 and batches of 2^19 tokens; they are scaled from there."""

    matrix: float = 0.02
    embedding: float = 0.3
    unembedding: float = 0.008
    scalar: float = 0.5


@dataclass(frozen=True)
class PretrainRecipe(Recipe):
    """A GPT from random weights on packed text. Zeros are derived from the run's `depth`, where it has one.

    `batch_tokens` are read in every step, `steps` times. `weight_decay` is Muon's, at the start. `dtype` auto
    becomes bfloat16 on cards that multiply it and float32 elsewhere.
    """

    may_be_zero = (*Recipe.may_be_zero, "steps", "batch_tokens", "weight_decay", "final_lr_fraction")
    choices = {"dtype": ("auto", "float32", "bfloat16", "float16")}

    gpt: GptShape = GptShape(
        n_layer=0, n_embd=0, n_head=0, n_kv_head=0, sequence_len=0, window_pattern="SSSL"
    )
    steps: int = 0
    batch_tokens: int = 0
    weight_decay: float = 0.0
    rates: LearningRates = LearningRates()
    warmup_steps: int = 40
    warmdown_fraction: float = 0.65
    final_lr_fraction: float = 0.05
    dtype: str = "auto"
    fp8: bool = False
    validate_every: int = 250
    validation_tokens: int = 2**20 * 10
    sample_every: int = 1000


@dataclass(frozen=True)
class ChatRecipe(Recipe):
    """A base model learns to chat: `epochs` over the conversations, loss on what the assistant says.

    `batch_tokens` 0 are as many as in pretraining. Learning rates begin at `lr_fraction` of `rates`, stay for
    `constant_fraction` of the run and fall to zero. `replay_share` of the rows are plain text.
    """

    may_be_zero = (*Recipe.may_be_zero, "batch_tokens", "replay_share")
    choices = {"dtype": ("auto", "float32", "bfloat16", "float16")}

    epochs: float = 1.0
    batch_tokens: int = 0
    rates: LearningRates = LearningRates()
    lr_fraction: float = 0.8
    warmup_steps: int = 0
    constant_fraction: float = 0.5
    replay_share: float = 0.05
    dtype: str = "auto"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.replay_share >= 1:
            raise BadInput(f"ChatRecipe.replay_share must be below 1, not {self.replay_share}")


@dataclass(frozen=True)
class MicroEncoderRecipe(Recipe):
    """A small Whisper encoder taught by dense labels of synthetic sounds: what is heard in every frame.

    `frame_loss_weight`: how much what is heard in each frame counts against what is heard in the whole clip.
    `max_voice_bend`: how far the frequency axis is stretched at most, in e-folds, so that voices vary.
    """

    may_be_zero = (*Recipe.may_be_zero, "max_voice_bend")

    shape: EncoderRecipe = EncoderRecipe(width=128, num_layers=3, num_heads=4, max_audio_s=4)
    steps: int = 2000
    rows_per_step: int = 16
    matrix_lr: float = 0.008
    lr: float = 1.5e-3
    warmup_steps: int = 20
    frame_loss_weight: float = 3.0
    max_voice_bend: float = 0.1


@dataclass(frozen=True)
class InstructionsRecipe(Recipe):
    """A mix of `rows` conversations about sounds, each kind in proportion to its part; 0 leaves a kind out.

    `public` are questions that came with the clips, `replay` is text without sound, so that what was known
    before is kept. `question_first`: share of rows in which the clip comes after the words.
    """

    may_be_zero = (
        *("caption", "transcription", "question", "choice", "no_speech", "multi_turn", "comparison"),
        *("public", "replay", "question_first"),
    )

    rows: int = 40_000
    validation_rows: int = 2_000
    caption: float = 0.12
    transcription: float = 0.08
    question: float = 0.05
    choice: float = 0.58
    no_speech: float = 0.04
    multi_turn: float = 0.04
    comparison: float = 0.05
    public: float = 0.0
    replay: float = 0.04
    question_first: float = 0.1


@dataclass(frozen=True)
class AlignRecipe(Recipe):
    """Projector only; encoder and GPT stay frozen. 5 frames at 50 Hz are 10 soft tokens a second.

    `distillation` is the share of the loss that asks for the same answers as the GPT gives when it reads in
    words what is heard, words and manner alike. A run whose loss on the wrong clip does not lie `min_gap`
    nats per token above that on its own, half-way and at the end, stops.
    """

    may_be_zero = (*Recipe.may_be_zero, "distillation", "min_gap")
    choices = {"dtype": ("auto", "float32", "bfloat16", "float16")}

    projector: ProjectorShape = ProjectorShape(stack=5, hidden=512)
    steps: int = 200
    rows_per_step: int = 32
    lr: float = 3e-3
    warmup_steps: int = 20
    distillation: float = 0.0
    min_gap: float = 0.1
    dtype: str = "auto"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.distillation > 1:
            raise BadInput(f"AlignRecipe.distillation must be 1 at most, not {self.distillation}")


@dataclass(frozen=True)
class LoraRecipe(Recipe):
    """Low-rank adapters on the GPT's linears; the projector goes on at its own, lower rate.

    `min_gap` as for the alignment.
    """

    may_be_zero = (*Recipe.may_be_zero, "min_gap")
    choices = {"dtype": ("auto", "float32", "bfloat16", "float16")}

    rank: int = 16
    alpha: int = 32
    steps: int = 1300
    rows_per_step: int = 32
    lr: float = 2e-3
    projector_lr: float = 1e-3
    warmup_steps: int = 20
    min_gap: float = 0.1
    dtype: str = "auto"
