"""Every recipe, and the runtime that never counts.

A *recipe* is a frozen dataclass of literals. Its values are identity: they enter the key of the stage
that reads them, so changing one re-runs that stage and nothing before it. `Runtime` holds everything
that must not change a result: store, threads, devices, how often to save. Standard library only.

A field added to a recipe later is declared with `added(default, as_before=...)`: at the value that means
"as before" it is left out of the key, so results made before the field existed stay current. One declared
with `unkeyed(default)` never counts: it says where something lies, not what it is.
"""

from omni_model.config.base import JSON, BadInput, Recipe, added, unkeyed
from omni_model.config.judging import BenchmarkRecipe, EmbeddingMapRecipe, EvaluationRecipe, ReportRecipe
from omni_model.config.learning import (
    AlignRecipe,
    LoraRecipe,
    MicroEncoderRecipe,
    OverfitRecipe,
    PretrainRecipe,
    ProjectorShape,
)
from omni_model.config.outside import GptImportRecipe, OutsideFile, OutsideFolder, TokenizerImportRecipe
from omni_model.config.runs import (
    CosyVoiceRunRecipe,
    DemoRecipe,
    FolderRunRecipe,
    HearingRecipe,
    IndexTtsRunRecipe,
    LibriSpeechRunRecipe,
    Runtime,
    SmokeRecipe,
)
from omni_model.config.sound import (
    AugmentRecipe,
    CosyVoiceRecipe,
    EncoderRecipe,
    FeatureRecipe,
    FolderRecipe,
    IndexTtsRecipe,
    LibriSpeechRecipe,
    PretrainedEncoderRecipe,
    SineRecipe,
    SpeechRecipe,
    SplitSizes,
    SpokenLine,
    TextureRecipe,
)
from omni_model.config.text import GptShape, TextRecipe, TokenizerRecipe

__all__ = [
    "JSON",
    "AlignRecipe",
    "AugmentRecipe",
    "BadInput",
    "BenchmarkRecipe",
    "CosyVoiceRecipe",
    "DemoRecipe",
    "EmbeddingMapRecipe",
    "EncoderRecipe",
    "EvaluationRecipe",
    "FeatureRecipe",
    "FolderRecipe",
    "GptImportRecipe",
    "GptShape",
    "IndexTtsRecipe",
    "LibriSpeechRecipe",
    "LoraRecipe",
    "MicroEncoderRecipe",
    "OutsideFile",
    "OutsideFolder",
    "OverfitRecipe",
    "PretrainRecipe",
    "PretrainedEncoderRecipe",
    "ProjectorShape",
    "Recipe",
    "ReportRecipe",
    "Runtime",
    "SineRecipe",
    "SmokeRecipe",
    "SpeechRecipe",
    "SplitSizes",
    "SpokenLine",
    "TextRecipe",
    "TextureRecipe",
    "TokenizerImportRecipe",
    "TokenizerRecipe",
    "added",
    "CosyVoiceRunRecipe",
    "FolderRunRecipe",
    "HearingRecipe",
    "IndexTtsRunRecipe",
    "LibriSpeechRunRecipe",
    "unkeyed",
]
