"""What the listener is worth: questions, scores, a map of its embeddings, and the page that shows them."""

from omni_model.artifacts import (
    AdapterCheckpoint,
    AudioCorpus,
    Benchmark,
    Checkpoint,
    Diagnosis,
    EncoderFiles,
    Familiarity,
    FeatureShards,
    GptCheckpoint,
    ProjectorCheckpoint,
    Report,
    Scores,
    TokenizerFiles,
)
from omni_model.config import (
    BenchmarkRecipe,
    DiagnosisRecipe,
    EvaluationRecipe,
    FamiliarityRecipe,
    ReportRecipe,
)
from tasks.stage import stage


@stage(
    "omni_model.evaluation.benchmark:build_benchmark", packages=("numpy",), seeded=False, figure="num_items"
)
def build_benchmark(recipe: BenchmarkRecipe, *corpora: AudioCorpus) -> Benchmark:
    """AudioBench-mini's questions and sounds, frozen before training."""


@stage(
    "omni_model.evaluation.scoring:score_benchmark",
    packages=("torch", "transformers", "numpy"),
    figure="accuracy",
)
def score_benchmark(
    recipe: EvaluationRecipe,
    benchmark: Benchmark,
    gpt: GptCheckpoint,
    adapter: AdapterCheckpoint,
    tokenizer: TokenizerFiles,
    encoder: EncoderFiles,
    *features: FeatureShards,
) -> Scores:
    """Accuracy with intervals, beside every baseline."""


@stage(
    "omni_model.evaluation.familiarity:learn_familiarity", packages=("torch", "numpy"), figure="words_limit"
)
def learn_familiarity(
    recipe: FamiliarityRecipe,
    gpt: GptCheckpoint,
    adapter: AdapterCheckpoint,
    tokenizer: TokenizerFiles,
    strange: FeatureShards,
    *features: FeatureShards,
) -> Familiarity:
    """What was taught, so that strange sounds are told; and what is understood of a foreign synthesizer."""


@stage(
    "omni_model.evaluation.diagnosis:diagnose",
    packages=("torch", "numpy", "matplotlib", "jiwer"),
    figure="num_points",
)
def diagnose(
    recipe: DiagnosisRecipe,
    gpt: GptCheckpoint,
    adapter: AdapterCheckpoint,
    tokenizer: TokenizerFiles,
    *features: FeatureShards,
) -> Diagnosis:
    """Where textures live, where sounds land among words, and how rightly speech is written down."""


@stage("omni_model.evaluation.report:write_report", packages=("soundfile",), seeded=False, figure="headline")
def write_report(
    recipe: ReportRecipe,
    scores: Scores,
    diagnosis: Diagnosis,
    familiarity: Familiarity,
    benchmark: Benchmark,
    pretrained: GptCheckpoint,
    aligned: ProjectorCheckpoint,
    tuned: AdapterCheckpoint,
    encoder: EncoderFiles,
    *corpora: AudioCorpus,
) -> Report:
    """The page a stranger reads, and one with every question."""


@stage("omni_model.evaluation.report:write_smoke_report", seeded=False, figure="headline")
def write_smoke_report(recipe: ReportRecipe, overfit: Checkpoint, corpus: AudioCorpus) -> Report:
    """What the smoke proved, and what it did not."""


@stage("omni_model.evaluation.sound_report:write_sound_report", seeded=False, figure="headline")
def write_sound_report(
    recipe: ReportRecipe, corpus: AudioCorpus, encoder: EncoderFiles, features: FeatureShards
) -> Report:
    """What came in, what was left out and why, and a few clips to hear."""
