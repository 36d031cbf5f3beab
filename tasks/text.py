"""Text, its tokenizer, and the language model."""

from omni_model.artifacts import GptCheckpoint, TextCorpus, TokenizerFiles
from omni_model.config import (
    GptImportRecipe,
    PretrainRecipe,
    TextRecipe,
    TokenizerImportRecipe,
    TokenizerRecipe,
)
from tasks.stage import stage


@stage("omni_model.text.corpus:write_corpus", packages=("numpy",), figure="num_documents")
def write_corpus(recipe: TextRecipe) -> TextCorpus:
    """Sentences and questions about sounds, from the grammar."""


@stage(
    "omni_model.text.tokenizer:train_tokenizer", packages=("tokenizers",), seeded=False, figure="vocab_size"
)
def train_tokenizer(recipe: TokenizerRecipe, text: TextCorpus) -> TokenizerFiles:
    """Byte-pair merges learned from the text."""


@stage("omni_model.training.pretrain:pretrain", packages=("torch", "numpy"), figure="text_multiple_choice")
def pretrain_gpt(recipe: PretrainRecipe, text: TextCorpus, tokenizer: TokenizerFiles) -> GptCheckpoint:
    """The GPT, from random weights, on text."""


@stage(
    "omni_model.text.nanochat_tokenizer:import_tokenizer",
    packages=("tokenizers",),
    seeded=False,
    figure="vocab_size",
)
def import_tokenizer(recipe: TokenizerImportRecipe) -> TokenizerFiles:
    """nanochat's tokenizer."""


@stage("omni_model.model.nanochat_files:import_gpt", packages=("torch",), seeded=False, figure="val_bpb")
def import_gpt(recipe: GptImportRecipe, tokenizer: TokenizerFiles) -> GptCheckpoint:
    """A GPT that nanochat trained."""
