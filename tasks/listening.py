"""Teaching the GPT to hear: projector first, then adapters."""

from omni_model.artifacts import (
    AdapterCheckpoint,
    Checkpoint,
    FeatureShards,
    GptCheckpoint,
    ProjectorCheckpoint,
    TokenizerFiles,
)
from omni_model.config import AlignRecipe, LoraRecipe, OverfitRecipe
from tasks.stage import stage


@stage("omni_model.training.overfit:overfit", packages=("torch", "numpy"), figure="loss_drop")
def overfit_captions(recipe: OverfitRecipe, features: FeatureShards) -> Checkpoint:
    """Projector and GPT together on five captions; fails unless the loss drops."""


@stage("omni_model.training.align:align", packages=("torch", "numpy"), figure="shuffled_audio_gap")
def align_projector(
    recipe: AlignRecipe,
    gpt: GptCheckpoint,
    tokenizer: TokenizerFiles,
    sounds: FeatureShards,
    speech: FeatureShards,
) -> ProjectorCheckpoint:
    """The projector, with encoder and GPT frozen."""


@stage(
    "omni_model.training.finetune:finetune", packages=("torch", "numpy", "peft"), figure="validation_accuracy"
)
def finetune_lora(
    recipe: LoraRecipe,
    gpt: GptCheckpoint,
    projector: ProjectorCheckpoint,
    tokenizer: TokenizerFiles,
    sounds: FeatureShards,
    speech: FeatureShards,
) -> AdapterCheckpoint:
    """Low-rank adapters on questions about sounds."""
