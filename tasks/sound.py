"""Sounds, the encoder that hears them, and its features."""

from omni_model.artifacts import AudioCorpus, EncoderFiles, FeatureShards
from omni_model.config import (
    AugmentRecipe,
    CosyVoiceRecipe,
    EncoderRecipe,
    FeatureRecipe,
    FolderRecipe,
    IndexTtsRecipe,
    LibriSpeechRecipe,
    MicroEncoderRecipe,
    PretrainedEncoderRecipe,
    SineRecipe,
    SpeechRecipe,
    TextureRecipe,
)
from tasks.stage import stage

# --- made here -----------------------------------------------------------------------------------


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


@stage("omni_model.audio.augmentation:augment", packages=("numpy",), figure="num_clips")
def augment_corpus(recipe: AugmentRecipe, corpus: AudioCorpus) -> AudioCorpus:
    """Every clip as another microphone, room or line would give it."""


# --- brought in ----------------------------------------------------------------------------------


@stage(
    "omni_model.audio.folder:import_folder",
    packages=("numpy", "soundfile", "soxr"),
    seeded=False,
    figure="num_clips",
)
def import_folder(recipe: FolderRecipe) -> AudioCorpus:
    """Whatever audio files lie in a folder."""


@stage(
    "omni_model.audio.librispeech:import_librispeech",
    packages=("numpy", "soundfile", "soxr"),
    seeded=False,
    figure="num_clips",
)
def import_librispeech(recipe: LibriSpeechRecipe) -> AudioCorpus:
    """Read speech by many people, with what they read."""


@stage(
    "omni_model.audio.tts:synthesize_cosyvoice",
    packages=("numpy", "soundfile", "soxr"),
    seeded=False,
    figure="num_clips",
)
def synthesize_cosyvoice(recipe: CosyVoiceRecipe) -> AudioCorpus:
    """Sentences in many manners, by a CosyVoice server."""


@stage(
    "omni_model.audio.tts:synthesize_indextts",
    packages=("numpy", "soundfile", "soxr"),
    seeded=False,
    figure="num_clips",
)
def synthesize_indextts(recipe: IndexTtsRecipe) -> AudioCorpus:
    """Sentences in many emotions, by an IndexTTS server."""


# --- heard ---------------------------------------------------------------------------------------


@stage("omni_model.audio.encoder:make_encoder", packages=("torch", "transformers"), figure="weights")
def make_encoder(recipe: EncoderRecipe) -> EncoderFiles:
    """A Whisper encoder with random weights."""


@stage("omni_model.audio.fetch_encoder:fetch_encoder", seeded=False, figure="weights")
def fetch_encoder(recipe: PretrainedEncoderRecipe) -> EncoderFiles:
    """An encoder that somebody else has trained."""


@stage(
    "omni_model.training.pretrain_encoder:pretrain_encoder",
    packages=("torch", "transformers", "numpy"),
    figure="probe_after",
)
def pretrain_encoder(recipe: MicroEncoderRecipe, sounds: AudioCorpus, speech: AudioCorpus) -> EncoderFiles:
    """A micro Whisper taught to hear what the corpora are labelled with."""


@stage(
    "omni_model.audio.features:extract",
    packages=("torch", "transformers", "numpy", "soundfile", "soxr", "webdataset"),
    seeded=False,
    figure="num_frames",
)
def extract_features(recipe: FeatureRecipe, corpus: AudioCorpus, encoder: EncoderFiles) -> FeatureShards:
    """Frozen encoder features of every clip."""
