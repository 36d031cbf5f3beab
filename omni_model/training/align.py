"""Alignment: the projector learns to put sound where the GPT already understands words.

Encoder and GPT stay as they are; the loss is on the answers alone. Everything is asked in many wordings, so
that the projector learns the sound and not one prompt.
"""

from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor

from omni_model.artifacts import FeatureShards, GptCheckpoint, TokenizerFiles
from omni_model.audio.reader import FeatureReader
from omni_model.config import JSON, AlignRecipe, Runtime
from omni_model.model.omni import OmniModel
from omni_model.model.projector import Projector
from omni_model.model.weights import load_gpt, save_projector
from omni_model.storage import Workspace
from omni_model.text.conversation import Exchange
from omni_model.text.tokenizer import load_tokenizer
from omni_model.training.listening import (
    Classroom,
    Clip,
    ask_caption,
    ask_choice,
    ask_open,
    caption_losses,
    choice_accuracy,
    loudness_ratio,
)
from omni_model.training.loop import Objective, train
from omni_model.training.optim import plain_adamw, set_lr
from omni_model.training.schedule import cosine


def align(
    recipe: AlignRecipe,
    gpt: GptCheckpoint,
    tokenizer: TokenizerFiles,
    sounds: FeatureShards,
    speech: FeatureShards,
    *,
    work: Workspace,
    runtime: Runtime,
) -> dict[str, JSON]:
    """Stage: train a projector on the training split of both corpora.

    Raises:
        BadInput: features, tokenizer and GPT do not belong together.
    """
    features, words = FeatureReader(sounds, speech), load_tokenizer(tokenizer.out)
    model = load_gpt(gpt.out).requires_grad_(False)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    projector = Projector(
        features.width, model.config.n_embd, recipe.projector.stack, recipe.projector.hidden
    )
    projector.init_weights(work.seed % 2**63)
    listener = OmniModel(model, projector)
    classroom = Classroom(features, "train", words)
    objective = Alignment(recipe, listener, classroom, work.seed)
    curve = train(
        objective,
        steps=recipe.steps,
        partial=work.partial,
        metrics=work.metrics,
        checkpoint_every_s=runtime.checkpoint_every_s,
    )
    if any(not torch.equal(value, before[name]) for name, value in model.state_dict().items()):
        raise AssertionError("alignment changed the GPT, which is to stay frozen")
    validation = Classroom(features, "validation", words)
    own, other = caption_losses(listener, validation, work.seed)
    work.metrics.summary(
        loss=curve.tail_mean(),
        validation_accuracy=choice_accuracy(listener, validation, work.seed),
        validation_caption_loss=own,
        shuffled_audio_gap=round(other - own, 4),
        audio_text_rms_ratio=loudness_ratio(listener, validation, work.seed),
    )
    save_projector(projector, work.out)
    curve.write(work.out)
    parameters = sum(p.numel() for p in projector.parameters())
    facts = {"input_width": features.width, "n_embd": model.config.n_embd}
    return {"num_parameters": parameters, "steps": curve.steps, **facts}


class Alignment(Objective):
    """Captions and questions; the projector's parameters alone."""

    clip_norm = 1.0

    def __init__(self, recipe: AlignRecipe, model: OmniModel, classroom: Classroom, seed: int) -> None:
        self.recipe, self.model, self.classroom, self.seed = recipe, model, classroom, seed
        self.optimizer = plain_adamw(model.projector.parameters(), recipe.lr)

    def tensors(self) -> Mapping[str, Tensor]:
        return dict(self.model.projector.named_parameters())

    def set_schedule(self, step: int) -> None:
        set_lr(self.optimizer, cosine(step, self.recipe.steps, self.recipe.warmup_steps))

    def loss(self, step: int) -> Tensor:
        batch = self.classroom.training_batch(step, self.recipe.rows_per_step, self.seed, any_asking)
        return batch.loss(self.model)


def any_asking(clip: Clip, rng: np.random.Generator) -> Exchange:
    """Half captions, a quarter open questions, a quarter multiple choice."""
    ask = (ask_caption, ask_caption, ask_open, ask_choice)[rng.integers(4)]
    return ask(clip, rng)
