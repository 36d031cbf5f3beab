"""The demo: from nothing to a small GPT that was taught to listen, with its score and a report."""

from omni_model.artifacts import Report
from omni_model.config import DemoRecipe
from tasks.judging import build_benchmark, map_embeddings, score_benchmark, write_report
from tasks.listening import align_projector, finetune_lora
from tasks.sound import extract_features, pretrain_encoder, synthesize_speech, synthesize_texture
from tasks.stage import Runner
from tasks.text import learn_lessons, train_tokenizer, write_corpus


def demo(run: Runner, recipe: DemoRecipe) -> Report:
    """Text and sound are prepared side by side, meet in the projector, and are judged on held-out voices."""
    text = run(write_corpus, recipe.text)
    tokenizer = run(train_tokenizer, recipe.tokenizer, text)
    gpt = run(learn_lessons, recipe.lessons, text, tokenizer)

    sounds = run(synthesize_texture, recipe.texture)
    speech = run(synthesize_speech, recipe.speech)
    benchmark = run(build_benchmark, recipe.benchmark, sounds, speech)
    encoder = run(pretrain_encoder, recipe.encoder, sounds, speech)
    heard_sounds = run(extract_features, recipe.features, sounds, encoder)
    heard_speech = run(extract_features, recipe.features, speech, encoder)

    heard = (heard_sounds, heard_speech)

    projector = run(align_projector, recipe.align, gpt, tokenizer, *heard)
    listener = run(finetune_lora, recipe.lora, gpt, projector, tokenizer, *heard)

    scores = run(score_benchmark, recipe.evaluation, benchmark, gpt, listener, tokenizer, *heard)
    embeddings = run(map_embeddings, recipe.embedding_map, gpt, listener, tokenizer, *heard)
    models = (gpt, projector, listener)
    return run(write_report, recipe.report, scores, embeddings, benchmark, *models, sounds, speech, encoder)
