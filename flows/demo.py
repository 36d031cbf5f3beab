"""The demo: from nothing to a small GPT that was taught to listen, with its score and a report."""

from omni_model.artifacts import Report
from omni_model.config import DemoRecipe
from tasks.judging import build_benchmark, diagnose, learn_familiarity, score_benchmark, write_report
from tasks.listening import align_projector, build_instructions, finetune_lora
from tasks.sound import (
    augment_corpus,
    extract_features,
    pretrain_encoder,
    synthesize_speech,
    synthesize_strange,
    synthesize_texture,
)
from tasks.stage import Runner
from tasks.text import learn_lessons, train_tokenizer, write_corpus


def demo(run: Runner, recipe: DemoRecipe) -> Report:
    """Text and sound are prepared side by side, meet in the projector, and are judged on held-out voices."""
    text = run(write_corpus, recipe.text)
    tokenizer = run(train_tokenizer, recipe.tokenizer, text)
    gpt = run(learn_lessons, recipe.lessons, text, tokenizer)

    sounds = run(synthesize_texture, recipe.texture)
    speech = run(augment_corpus, recipe.augment, run(synthesize_speech, recipe.speech))
    benchmark = run(build_benchmark, recipe.benchmark, sounds, speech)
    instructions = run(build_instructions, recipe.instructions, sounds, speech)

    encoder = run(pretrain_encoder, recipe.encoder, sounds, speech)
    heard = [run(extract_features, recipe.features, corpus, encoder) for corpus in (sounds, speech)]

    projector = run(align_projector, recipe.align, gpt, tokenizer, instructions, *heard)
    listener = run(finetune_lora, recipe.lora, gpt, projector, tokenizer, instructions, *heard)

    taught = (gpt, listener, tokenizer)
    scores = run(score_benchmark, recipe.evaluation, benchmark, *taught, encoder, *heard)
    diagnosis = run(diagnose, recipe.diagnosis, *taught, *heard)
    strange = run(extract_features, recipe.features, run(synthesize_strange, recipe.strange), encoder)
    familiarity = run(learn_familiarity, recipe.familiarity, *taught, strange, *heard)

    judged, models = (scores, diagnosis, familiarity, benchmark), (gpt, projector, listener, encoder)
    return run(write_report, recipe.report, *judged, *models, sounds, speech)
