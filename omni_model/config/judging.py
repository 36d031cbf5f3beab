"""Recipes of what judges and tells."""

from dataclasses import dataclass

from omni_model.config.base import Recipe


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
class BaseEvaluationRecipe(Recipe):
    """What a base model is worth: bits per byte of both splits, CORE, and what it writes on.

    `core_items_per_task` 0 means all. `dtype` auto is resolved as for training.
    """

    may_be_zero = (*Recipe.may_be_zero, "core_items_per_task")
    choices = {"dtype": ("auto", "float32", "bfloat16", "float16")}

    split_tokens: int = 2**19 * 40
    core_items_per_task: int = 500
    dtype: str = "auto"


@dataclass(frozen=True)
class ChatEvaluationRecipe(Recipe):
    """What a chat model is worth: multiple choice by letter logits, sums and programs by what it writes.

    `items_per_task` 0 means all.
    """

    may_be_zero = (*Recipe.may_be_zero, "items_per_task")
    choices = {"dtype": ("auto", "float32", "bfloat16", "float16")}

    items_per_task: int = 0
    max_answer_tokens: int = 512
    bootstrap_draws: int = 10_000
    confidence: float = 0.95
    dtype: str = "auto"


@dataclass(frozen=True)
class ReportRecipe(Recipe):
    """The page a stranger reads."""

    title: str = "nanochat-omni"
    listed_items: int = 12
