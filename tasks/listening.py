"""Teaching the GPT to hear: projector first, then adapters."""

from omni_model.artifacts import (
    AdapterCheckpoint,
    AudioCorpus,
    Checkpoint,
    Conversations,
    FeatureShards,
    GptCheckpoint,
    Instructions,
    ProjectorCheckpoint,
    TokenizerFiles,
)
from omni_model.config import AlignRecipe, InstructionsRecipe, LoraRecipe, OverfitRecipe
from tasks.stage import stage


@stage("omni_model.training.overfit:overfit", packages=("torch", "numpy"), figure="loss_drop")
def overfit_captions(recipe: OverfitRecipe, features: FeatureShards) -> Checkpoint:
    """Projector and GPT together on five captions; fails unless the loss drops."""


@stage(
    "omni_model.training.instructions:build_instructions", packages=("numpy", "pyarrow"), figure="num_rows"
)
def build_instructions(recipe: InstructionsRecipe, *corpora: AudioCorpus) -> Instructions:
    """What the listener is taught with: captions, transcripts, questions, and text without sound."""


@stage("omni_model.training.instructions:mix_instructions", packages=("numpy", "pyarrow"), figure="num_rows")
def mix_instructions(
    recipe: InstructionsRecipe, conversations: Conversations, *corpora: AudioCorpus
) -> Instructions:
    """The same, with the conversations that the GPT learned to chat with as its text."""


@stage("omni_model.training.align:align", packages=("torch", "numpy"), wide=True, figure="shuffled_audio_gap")
def align_projector(
    recipe: AlignRecipe,
    gpt: GptCheckpoint,
    tokenizer: TokenizerFiles,
    instructions: Instructions,
    *features: FeatureShards,
) -> ProjectorCheckpoint:
    """The projector, with encoder and GPT frozen."""


@stage(
    "omni_model.training.finetune:finetune",
    packages=("torch", "numpy", "peft"),
    wide=True,
    figure="validation_accuracy",
)
def finetune_lora(
    recipe: LoraRecipe,
    gpt: GptCheckpoint,
    projector: ProjectorCheckpoint,
    tokenizer: TokenizerFiles,
    instructions: Instructions,
    *features: FeatureShards,
) -> AdapterCheckpoint:
    """Low-rank adapters on questions about sounds."""
