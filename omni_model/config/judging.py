"""Recipes of what judges and tells."""

from dataclasses import dataclass

from omni_model.config.base import Recipe


@dataclass(frozen=True)
class BenchmarkRecipe(Recipe):
    """AudioBench-mini: how many questions each group has, a multiple of four; 0 leaves a group out.

    It has a seed of its own.
    """

    may_be_zero = (
        *Recipe.may_be_zero,
        *("words", "speaker", "prosody", "quality", "room", "events", "conflict"),
    )

    words: int = 48
    speaker: int = 16
    prosody: int = 24
    quality: int = 24
    room: int = 36
    events: int = 36
    conflict: int = 16
    seed: int = 20260314


@dataclass(frozen=True)
class EvaluationRecipe(Recipe):
    """Letter logits over every rotation of the options; intervals by bootstrap over the items."""

    shuffles: int = 5
    bootstrap_draws: int = 10_000
    confidence: float = 0.95


@dataclass(frozen=True)
class FamiliarityRecipe(Recipe):
    """How a listener comes to know what it was not taught.

    It compares with `taught_clips` of the train split, on `components`, and marks `marked_share` of the
    validation clips: fewer than of test clips, whose voices are stranger.
    """

    taught_clips: int = 1200
    components: int = 128
    marked_share: float = 0.015


@dataclass(frozen=True)
class DiagnosisRecipe(Recipe):
    """What goes on inside a listener.

    `clips` are drawn in the pictures. The probes learn from at most `probe_clips` clips and are judged, as is
    all but the transcripts, on at most as many; error rates are taken from `transcribed_clips`.
    """

    clips: int = 120
    components: int = 2
    probe_clips: int = 1500
    transcribed_clips: int = 300
    bootstrap_draws: int = 10_000
    confidence: float = 0.95


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
