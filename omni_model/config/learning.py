"""Recipes of what learns."""

from dataclasses import dataclass

from omni_model.config.base import Recipe
from omni_model.config.sound import EncoderRecipe
from omni_model.config.text import GptShape


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
class MicroEncoderRecipe(Recipe):
    """A small Whisper encoder taught by dense labels of synthetic sounds: what is heard in every frame.

    `frame_loss_weight`: how much what is heard in each frame counts against what is heard in the whole clip.
    `max_voice_bend`: how far the frequency axis is stretched at most, in e-folds, so that voices vary.
    """

    may_be_zero = (*Recipe.may_be_zero, "max_voice_bend")

    shape: EncoderRecipe = EncoderRecipe(width=128, num_layers=3, num_heads=4, max_audio_s=4)
    steps: int = 1600
    rows_per_step: int = 16
    matrix_lr: float = 0.008
    lr: float = 1.5e-3
    warmup_steps: int = 20
    frame_loss_weight: float = 2.0
    max_voice_bend: float = 0.1


@dataclass(frozen=True)
class AlignRecipe(Recipe):
    """Projector only; encoder and GPT stay frozen. 5 frames at 50 Hz are 10 soft tokens a second."""

    projector: ProjectorShape = ProjectorShape(stack=5, hidden=512)
    steps: int = 200
    rows_per_step: int = 32
    lr: float = 3e-3
    warmup_steps: int = 20


@dataclass(frozen=True)
class LoraRecipe(Recipe):
    """Low-rank adapters on the GPT's linears; the projector goes on at its own, lower rate."""

    rank: int = 16
    alpha: int = 32
    steps: int = 1200
    rows_per_step: int = 32
    lr: float = 2e-3
    projector_lr: float = 1e-3
    warmup_steps: int = 20
    caption_share: float = 0.2
