"""Sounds, the encoder that hears them, and its features."""

from omni_model.artifacts import AudioCorpus, EncoderFiles, FeatureShards
from omni_model.config import EncoderRecipe, FeatureRecipe, SineRecipe, SpeechRecipe, TextureRecipe
from tasks.stage import stage


@stage("omni_model.audio.sines:synthesize", packages=("numpy",), seeded=False, figure="num_clips")
def synthesize_sines(recipe: SineRecipe) -> AudioCorpus:
    """Five sine clips of five seconds with captions."""


@stage("omni_model.audio.texture:synthesize", packages=("numpy",), figure="num_clips")
def synthesize_texture(recipe: TextureRecipe) -> AudioCorpus:
    """Tones, sweeps, tremolo, noises and beeps."""


@stage(
    "omni_model.audio.speech:synthesize",
    packages=("numpy", "soxr"),
    exact_packages=("espeakng-loader",),
    figure="num_clips",
)
def synthesize_speech(recipe: SpeechRecipe) -> AudioCorpus:
    """Short phrases in many voices."""


@stage("omni_model.audio.encoder:make_encoder", packages=("torch", "transformers"), figure="weights")
def make_encoder(recipe: EncoderRecipe) -> EncoderFiles:
    """A Whisper encoder with random weights."""


@stage(
    "omni_model.audio.features:extract",
    packages=("torch", "transformers", "numpy", "soundfile", "soxr", "webdataset"),
    seeded=False,
    figure="num_frames",
)
def extract_features(recipe: FeatureRecipe, corpus: AudioCorpus, encoder: EncoderFiles) -> FeatureShards:
    """Frozen encoder features of every clip."""
