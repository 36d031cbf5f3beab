"""The smoke: five sine clips through the whole machine in under a minute."""

from omni_model.artifacts import Report
from omni_model.config import SmokeRecipe
from tasks.judging import write_smoke_report
from tasks.listening import overfit_captions
from tasks.sound import extract_features, make_encoder, synthesize_sines
from tasks.stage import Runner


def smoke(run: Runner, recipe: SmokeRecipe) -> Report:
    """Sound -> features -> a projector and a GPT that memorise five captions: plumbing, not hearing."""
    sines = run(synthesize_sines, recipe.sines)
    encoder = run(make_encoder, recipe.encoder)
    features = run(extract_features, recipe.features, sines, encoder)
    overfit = run(overfit_captions, recipe.overfit, features)
    return run(write_smoke_report, recipe.report, overfit, sines)
