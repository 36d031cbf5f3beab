"""Instruction tuning: the GPT learns to answer about sound, through low-rank adapters.

The base weights stay; LoRA (arXiv 2106.09685) adds a little to each matrix, and the projector goes on at a
rate of its own. Mostly multiple choice over every label a clip has, and some captions.
"""

from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor

from omni_model.artifacts import FeatureShards, GptCheckpoint, ProjectorCheckpoint, TokenizerFiles
from omni_model.audio.reader import FeatureReader
from omni_model.config import JSON, BadInput, LoraRecipe, Runtime
from omni_model.model.lora import add_lora, lora_parameters, save_adapter
from omni_model.model.omni import OmniModel
from omni_model.model.weights import join, load_gpt, load_projector, save_projector
from omni_model.storage import Workspace
from omni_model.text.conversation import Exchange
from omni_model.text.tokenizer import load_tokenizer
from omni_model.training.listening import (
    Classroom,
    Clip,
    ask_caption,
    ask_choice,
    caption_losses,
    choice_accuracy,
)
from omni_model.training.loop import Objective, train
from omni_model.training.optim import set_lr
from omni_model.training.schedule import cosine


def finetune(
    recipe: LoraRecipe,
    gpt: GptCheckpoint,
    projector: ProjectorCheckpoint,
    tokenizer: TokenizerFiles,
    sounds: FeatureShards,
    speech: FeatureShards,
    *,
    work: Workspace,
    runtime: Runtime,
) -> dict[str, JSON]:
    """Stage: train LoRA adapters and the projector on the training split of both corpora.

    Raises:
        BadInput: features, tokenizer, projector and GPT do not belong together.
    """
    features, words = FeatureReader(sounds, speech), load_tokenizer(tokenizer.out)
    if projector.input_width != features.width:
        raise BadInput(
            f"the projector reads frames {projector.input_width} wide and the features are {features.width} "
            "wide; align a projector on these features"
        )
    base = load_gpt(gpt.out)
    model = join(add_lora(base, recipe.rank, recipe.alpha, work.seed % 2**63), load_projector(projector.out))
    objective = Finetuning(recipe, model, Classroom(features, "train", words), work.seed)
    curve = train(
        objective,
        steps=recipe.steps,
        partial=work.partial,
        metrics=work.metrics,
        checkpoint_every_s=runtime.checkpoint_every_s,
    )
    validation = Classroom(features, "validation", words)
    own, other = caption_losses(model, validation, work.seed)
    work.metrics.summary(
        loss=curve.tail_mean(),
        validation_accuracy=choice_accuracy(model, validation, work.seed),
        validation_caption_loss=own,
        shuffled_audio_gap=round(other - own, 4),
    )
    save_adapter(model.gpt, work.out / "adapter")
    save_projector(model.projector, work.out / "projector")
    curve.write(work.out)
    parameters = sum(tensor.numel() for tensor in objective.tensors().values())
    facts = {"input_width": features.width, "n_embd": base.config.n_embd, "rank": recipe.rank}
    return {"num_parameters": parameters, "steps": curve.steps, **facts}


class Finetuning(Objective):
    """Multiple choice and captions; adapter and projector, each at its own learning rate."""

    clip_norm = 1.0

    def __init__(self, recipe: LoraRecipe, model: OmniModel, classroom: Classroom, seed: int) -> None:
        self.recipe, self.model, self.classroom, self.seed = recipe, model, classroom, seed
        self._adapter = {f"gpt.{name}": p for name, p in lora_parameters(model.gpt).items()}
        self._projector = {f"projector.{name}": p for name, p in model.projector.named_parameters()}
        rates = ((self._adapter, recipe.lr), (self._projector, recipe.projector_lr))
        groups = [{"params": list(part.values()), "lr": lr, "initial_lr": lr} for part, lr in rates]
        self.optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.95), weight_decay=0.0)

    def tensors(self) -> Mapping[str, Tensor]:
        return self._adapter | self._projector

    def set_schedule(self, step: int) -> None:
        set_lr(self.optimizer, cosine(step, self.recipe.steps, self.recipe.warmup_steps))

    def loss(self, step: int) -> Tensor:
        batch = self.classroom.training_batch(step, self.recipe.rows_per_step, self.seed, self._ask)
        return batch.loss(self.model)

    def _ask(self, clip: Clip, rng: np.random.Generator) -> Exchange:
        return ask_caption(clip, rng) if rng.random() < self.recipe.caption_share else ask_choice(clip, rng)
