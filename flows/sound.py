"""From somebody's recordings to frozen features, with a report of what came in and what was left out."""

from omni_model.artifacts import AudioCorpus, Report
from omni_model.config import (
    CosyVoiceRunRecipe,
    FolderRunRecipe,
    HearingRecipe,
    IndexTtsRunRecipe,
    LibriSpeechRunRecipe,
    SoundSetRunRecipe,
)
from tasks.judging import write_sound_report
from tasks.sound import (
    extract_features,
    fetch_encoder,
    import_folder,
    import_librispeech,
    import_sound_set,
    synthesize_cosyvoice,
    synthesize_indextts,
)
from tasks.stage import Runner


def folder(run: Runner, recipe: FolderRunRecipe) -> Report:
    """Any audio files of yours."""
    return _hear(run, recipe, run(import_folder, recipe.recordings))


def sound_set(run: Runner, recipe: SoundSetRunRecipe) -> Report:
    """A public set of sounds or of questions about sounds."""
    return _hear(run, recipe, run(import_sound_set, recipe.sounds))


def librispeech(run: Runner, recipe: LibriSpeechRunRecipe) -> Report:
    """A hundred hours of read English."""
    return _hear(run, recipe, run(import_librispeech, recipe.librispeech))


def cosyvoice(run: Runner, recipe: CosyVoiceRunRecipe) -> Report:
    """Your sentences in many manners, spoken by a CosyVoice server."""
    return _hear(run, recipe, run(synthesize_cosyvoice, recipe.cosyvoice))


def indextts(run: Runner, recipe: IndexTtsRunRecipe) -> Report:
    """Your sentences in many emotions, spoken by an IndexTTS server."""
    return _hear(run, recipe, run(synthesize_indextts, recipe.indextts))


def _hear(run: Runner, recipe: HearingRecipe, corpus: AudioCorpus) -> Report:
    encoder = run(fetch_encoder, recipe.encoder)
    features = run(extract_features, recipe.features, corpus, encoder)
    return run(write_sound_report, recipe.report, corpus, encoder, features)
