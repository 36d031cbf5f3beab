"""Alignment: the projector learns to put sound where the GPT already understands words.

Encoder and GPT stay as they are; the loss is on the answers alone. Everything is asked in many wordings, with
the clip before or after the question, so that the projector learns the sound and not one prompt.

Distillation, where a recipe wants it, adds the answers that the same GPT gives when it reads in words what is
heard: not the transcript alone, which would teach to discard the manner (as arXiv 2410.01162 found), but a
caption that tells voice, pace, pitch and noise too.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from omni_model.artifacts import FeatureShards, GptCheckpoint, Instructions, TokenizerFiles
from omni_model.audio.reader import FeatureReader
from omni_model.config import JSON, AlignRecipe, Runtime
from omni_model.model.omni import OmniModel
from omni_model.model.projector import Projector
from omni_model.model.weights import load_gpt, save_projector
from omni_model.plain import to_plain
from omni_model.storage import Workspace
from omni_model.telemetry import mirrored
from omni_model.text.tokenizer import load_tokenizer
from omni_model.training.listening import Batch, Classroom
from omni_model.training.loop import train
from omni_model.training.optim import plain_adamw, set_lr
from omni_model.training.ranks import ALONE
from omni_model.training.schedule import cosine
from omni_model.training.setup import bring, settled_dtype
from omni_model.training.teaching import PROJECT, Teaching, belonging


def align(
    recipe: AlignRecipe,
    gpt: GptCheckpoint,
    tokenizer: TokenizerFiles,
    instructions: Instructions,
    *shards: FeatureShards,
    work: Workspace,
    runtime: Runtime,
) -> dict[str, JSON]:
    """Stage: train a projector on the mix's rows.

    Raises:
        BadInput: features, instructions, tokenizer and GPT do not belong together.
        RuntimeError: half-way, the loss does not mind which clip is heard.
    """
    features, words = FeatureReader(*shards), load_tokenizer(tokenizer.out)
    model = load_gpt(gpt.out, settled_dtype(recipe.dtype)).requires_grad_(False)
    device = bring(model, ranks=ALONE, work=work)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    shape = recipe.projector
    num_layers = shards[0].num_layers if shape.mix == "learned" else 1
    projector = Projector(features.width, model.config.n_embd, shape.stack, shape.hidden, num_layers)
    projector.init_weights(work.seed % 2**63)
    lessons, exam = (
        Classroom(features, instructions, split, words, device, hearing=True)
        for split in ("train", "validation")
    )
    objective = Alignment(recipe, OmniModel(model, projector.to(device)), lessons, exam, work.seed)
    with mirrored(work.metrics, work.directory, runtime.wandb, project=PROJECT, settings=to_plain(recipe)):
        curve = train(
            objective,
            steps=recipe.steps,
            partial=work.partial,
            metrics=work.metrics,
            checkpoint_every_s=runtime.checkpoint_every_s,
            evaluate_every=objective.look_every,
        )
        if any(not torch.equal(value, before[name]) for name, value in model.state_dict().items()):
            raise AssertionError("alignment changed the GPT, which is to stay frozen")
        work.metrics.summary(loss=curve.tail_mean(), **objective.conclude(work.out))
    save_projector(projector, work.out)
    curve.write(work.out)
    parameters = sum(p.numel() for p in projector.parameters())
    facts = belonging(gpt, features)
    return {"num_parameters": parameters, "steps": curve.steps, **facts}


class Alignment(Teaching):
    """The projector's parameters alone."""

    def __init__(
        self, recipe: AlignRecipe, model: OmniModel, lessons: Classroom, exam: Classroom, seed: int
    ) -> None:
        super().__init__(
            model,
            lessons,
            exam,
            {"projector": dict(model.projector.named_parameters())},
            rows_per_step=recipe.rows_per_step,
            steps=recipe.steps,
            min_gap=recipe.min_gap,
            field="align",
            seed=seed,
        )
        self.recipe = recipe
        self.optimizer = plain_adamw(model.projector.parameters(), recipe.lr)

    def set_schedule(self, step: int) -> None:
        set_lr(self.optimizer, cosine(step, self.recipe.steps, self.recipe.warmup_steps))

    def loss(self, step: int) -> Tensor:
        rows = self.lessons.training_rows(step, self.rows_per_step, self.seed)
        batch, share = self.lessons.batch(rows), self.recipe.distillation
        if not share:
            return batch.loss(self.model)
        described = self.lessons.batch(rows, self.lessons.describe)
        return (1 - share) * batch.loss(self.model) + share * self._divergence(batch, described)

    def _divergence(self, batch: Batch, described: Batch) -> Tensor:
        """Of the answers to sounds from those to their descriptions: mean KL in nats per learned token."""
        with torch.no_grad():
            taught = described.logits(self.model, scored=True).log_softmax(dim=-1)
        said = batch.logits(self.model, scored=True).log_softmax(dim=-1)
        return F.kl_div(said, taught, log_target=True, reduction="batchmean")
