"""Sounds, the encoder that hears them, and its features."""

from omni_model.artifacts import AudioCorpus, EncoderFiles, FeatureShards, SoundFiles
from omni_model.config import (
    AugmentRecipe,
    CosyVoiceRecipe,
    EncoderRecipe,
    FeatureRecipe,
    FolderRecipe,
    IndexTtsRecipe,
    LaidOutSetRecipe,
    LibriSpeechRecipe,
    MicroEncoderRecipe,
    MiniatureSoundsRecipe,
    PretrainedEncoderRecipe,
    SineRecipe,
    SoundSetRecipe,
    SpeechRecipe,
    StrangeRecipe,
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


@stage(
    "omni_model.audio.strange:synthesize_strange",
    packages=("numpy", "soxr"),
    exact_packages=("espeakng-loader",),
    figure="num_clips",
)
def synthesize_strange(recipe: StrangeRecipe) -> AudioCorpus:
    """Sounds that are not taught, to find out whether the listener notices."""


@stage("omni_model.audio.augmentation:augment", packages=("numpy",), figure="num_clips")
def augment_corpus(recipe: AugmentRecipe, corpus: AudioCorpus) -> AudioCorpus:
    """Every clip as another microphone, room or line would give it."""


@stage(
    "omni_model.audio.miniature_sounds:write_sounds",
    packages=("numpy", "pyarrow"),
    exact_packages=("espeakng-loader", "soundfile"),
    figure="num_files",
)
def write_sounds(recipe: MiniatureSoundsRecipe) -> SoundFiles:
    """Recordings laid out as the makers of public sets lay them out."""


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
    "omni_model.audio.sound_sets:import_sound_set",
    packages=("numpy", "soundfile", "soxr"),
    seeded=False,
    figure="num_clips",
)
def import_sound_set(recipe: SoundSetRecipe) -> AudioCorpus:
    """A public set of sounds or of questions about sounds."""


@stage(
    "omni_model.audio.librispeech:import_librispeech",
    packages=("numpy", "soundfile", "soxr"),
    seeded=False,
    figure="num_clips",
)
def import_librispeech(recipe: LibriSpeechRecipe) -> AudioCorpus:
    """Read speech by many people, with what they read."""


@stage(
    "omni_model.audio.sound_sets:read_sound_set",
    packages=("numpy", "soundfile", "soxr"),
    seeded=False,
    figure="num_clips",
)
def read_sound_set(recipe: LaidOutSetRecipe, files: SoundFiles) -> AudioCorpus:
    """A public set of sounds, from files that were laid out here."""


@stage(
    "omni_model.audio.librispeech:read_librispeech",
    packages=("numpy", "soundfile", "soxr"),
    seeded=False,
    figure="num_clips",
)
def read_librispeech(recipe: LibriSpeechRecipe, files: SoundFiles) -> AudioCorpus:
    """Read speech, from files that were laid out here."""


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
def pretrain_encoder(recipe: MicroEncoderRecipe, *corpora: AudioCorpus) -> EncoderFiles:
    """A micro Whisper taught to hear what the corpora are labelled with."""


@stage(
    "omni_model.audio.features:extract",
    packages=("torch", "transformers", "numpy", "soundfile", "soxr", "webdataset"),
    seeded=False,
    figure="num_frames",
)
def extract_features(recipe: FeatureRecipe, corpus: AudioCorpus, encoder: EncoderFiles) -> FeatureShards:
    """Frozen encoder features of every clip."""
