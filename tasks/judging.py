"""What the listener is worth: questions, scores, a map of its embeddings, and the page that shows them."""

from omni_model.artifacts import (
    AdapterCheckpoint,
    AudioCorpus,
    Benchmark,
    Checkpoint,
    EmbeddingMap,
    EncoderFiles,
    FeatureShards,
    GptCheckpoint,
    ProjectorCheckpoint,
    Report,
    Scores,
    TokenizerFiles,
)
from omni_model.config import BenchmarkRecipe, EmbeddingMapRecipe, EvaluationRecipe, ReportRecipe
from tasks.stage import stage


@stage(
    "omni_model.evaluation.benchmark:build_benchmark", packages=("numpy",), seeded=False, figure="num_items"
)
def build_benchmark(recipe: BenchmarkRecipe, sounds: AudioCorpus, speech: AudioCorpus) -> Benchmark:
    """AudioBench-mini's questions, frozen before training."""


@stage("omni_model.evaluation.scoring:score_benchmark", packages=("torch", "numpy"), figure="accuracy")
def score_benchmark(
    recipe: EvaluationRecipe,
    benchmark: Benchmark,
    gpt: GptCheckpoint,
    adapter: AdapterCheckpoint,
    tokenizer: TokenizerFiles,
    sounds: FeatureShards,
    speech: FeatureShards,
) -> Scores:
    """Accuracy with intervals, beside every baseline."""


@stage(
    "omni_model.evaluation.embedding_map:map_embeddings",
    packages=("torch", "numpy", "matplotlib"),
    figure="num_points",
)
def map_embeddings(
    recipe: EmbeddingMapRecipe,
    gpt: GptCheckpoint,
    adapter: AdapterCheckpoint,
    tokenizer: TokenizerFiles,
    sounds: FeatureShards,
    speech: FeatureShards,
) -> EmbeddingMap:
    """Where sounds land among words: principal components and cluster numbers."""


@stage("omni_model.evaluation.report:write_report", seeded=False, figure="headline")
def write_report(
    recipe: ReportRecipe,
    scores: Scores,
    embedding_map: EmbeddingMap,
    benchmark: Benchmark,
    pretrained: GptCheckpoint,
    aligned: ProjectorCheckpoint,
    tuned: AdapterCheckpoint,
    sounds: AudioCorpus,
    speech: AudioCorpus,
    encoder: EncoderFiles,
) -> Report:
    """The page a stranger reads."""


@stage("omni_model.evaluation.report:write_smoke_report", seeded=False, figure="headline")
def write_smoke_report(recipe: ReportRecipe, overfit: Checkpoint, corpus: AudioCorpus) -> Report:
    """What the smoke proved, and what it did not."""


@stage("omni_model.evaluation.sound_report:write_sound_report", seeded=False, figure="headline")
def write_sound_report(
    recipe: ReportRecipe, corpus: AudioCorpus, encoder: EncoderFiles, features: FeatureShards
) -> Report:
    """What came in, what was left out and why, and a few clips to hear."""
