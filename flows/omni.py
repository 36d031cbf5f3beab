"""A listener of useful size: a language model that chats is taught to hear, and must prove it.

The rehearsal is the same graph at the same shapes; only where data come from differs.
"""

from collections.abc import Sequence

from flows import base
from flows.base import Talker
from omni_model.artifacts import AudioCorpus, EncoderFiles, Report
from omni_model.config import HearingHalfRecipe, OmniRecipe, OmniRehearsalRecipe, ReportRecipe
from tasks.judging import build_benchmark, diagnose, learn_familiarity, score_benchmark, write_report
from tasks.listening import align_projector, finetune_lora, mix_instructions
from tasks.sound import (
    augment_corpus,
    extract_features,
    fetch_encoder,
    import_librispeech,
    import_sound_set,
    make_encoder,
    read_librispeech,
    read_sound_set,
    synthesize_speech,
    synthesize_strange,
    synthesize_texture,
    write_sounds,
)
from tasks.stage import Runner
from tasks.text import write_core, write_sets, write_web_text


def omni(run: Runner, recipe: OmniRecipe) -> Report:
    """ClimbMix, public conversations, LibriSpeech and whisper-base: a day on a card."""
    talker = base.learn_from_climbmix(run, recipe)

    read = [run(import_librispeech, part) for part in recipe.librispeech.parts()]
    public = [run(import_sound_set, each) for each in recipe.folders.sets()]
    encoder = run(fetch_encoder, recipe.encoder)
    return _listen(run, recipe, recipe.report, talker, encoder, read, public)


def omni_rehearsal(run: Runner, recipe: OmniRehearsalRecipe) -> Report:
    """The same at its true shapes in minutes: random weights, and miniatures of every kind of file."""
    text, core, sets = (
        run(write_web_text, recipe.text),
        run(write_core, recipe.core),
        run(write_sets, recipe.sets),
    )
    talker = base.learn_to_talk(run, recipe, text, core, sets)

    files = run(write_sounds, recipe.sounds)
    read = [run(read_librispeech, part, files) for part in recipe.librispeech.parts()]
    public = [run(read_sound_set, each, files) for each in recipe.sound_sets]
    encoder = run(make_encoder, recipe.encoder)
    return _listen(run, recipe, recipe.report, talker, encoder, read, public)


def _listen(
    run: Runner,
    recipe: HearingHalfRecipe,
    report: ReportRecipe,
    talker: Talker,
    encoder: EncoderFiles,
    read: Sequence[AudioCorpus],
    public: Sequence[AudioCorpus],
) -> Report:
    sounds = run(synthesize_texture, recipe.texture)
    speech = run(augment_corpus, recipe.augment, run(synthesize_speech, recipe.speech))

    # What people read aloud is learned from and written down, not asked about: all that is known of it is a
    # voice, and books share short sentences, which a benchmark must not.
    asked = (sounds, speech, *public)
    corpora = (*asked, *read)
    benchmark = run(build_benchmark, recipe.benchmark, *asked)
    instructions = run(mix_instructions, recipe.instructions, talker.conversations, *corpora)
    heard = [run(extract_features, recipe.features, corpus, encoder) for corpus in corpora]
    strange = run(extract_features, recipe.features, run(synthesize_strange, recipe.strange), encoder)

    gpt, tokenizer = talker.chat, talker.tokenizer
    projector = run(align_projector, recipe.align, gpt, tokenizer, instructions, *heard)
    listener = run(finetune_lora, recipe.lora, gpt, projector, tokenizer, instructions, *heard)

    taught = (gpt, listener, tokenizer)
    scores = run(score_benchmark, recipe.scoring, benchmark, *taught, encoder, *heard)
    diagnosis = run(diagnose, recipe.diagnosis, *taught, *heard)
    familiarity = run(learn_familiarity, recipe.familiarity, *taught, strange, *heard)

    judged, models = (scores, diagnosis, familiarity, benchmark), (gpt, projector, listener, encoder)
    return run(write_report, report, *judged, *models, *corpora)
