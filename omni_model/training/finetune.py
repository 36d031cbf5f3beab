"""Instruction tuning: the GPT learns to answer about sound, through low-rank adapters.

The base weights stay; LoRA (arXiv 2106.09685) adds a little to each matrix, and the projector goes on at a
rate of its own. Rows without sound are mixed in, so that what was known before is kept; how well it is kept
is measured before and after.
"""

import torch

from omni_model.artifacts import (
    FeatureShards,
    GptCheckpoint,
    Instructions,
    ProjectorCheckpoint,
    TokenizerFiles,
)
from omni_model.audio.reader import FeatureReader
from omni_model.config import JSON, LoraRecipe, Runtime
from omni_model.model.lora import add_lora, lora_parameters, save_adapter
from omni_model.model.omni import OmniModel
from omni_model.model.weights import join, load_gpt, load_projector, save_projector
from omni_model.plain import to_plain
from omni_model.storage import Workspace
from omni_model.telemetry import mirrored
from omni_model.text.tokenizer import load_tokenizer
from omni_model.training.listening import Classroom
from omni_model.training.loop import train
from omni_model.training.optim import set_lr
from omni_model.training.ranks import ALONE
from omni_model.training.schedule import cosine
from omni_model.training.setup import bring, settled_dtype
from omni_model.training.teaching import PROJECT, Teaching, belonging, check_belonging, text_ability


def finetune(
    recipe: LoraRecipe,
    gpt: GptCheckpoint,
    projector: ProjectorCheckpoint,
    tokenizer: TokenizerFiles,
    instructions: Instructions,
    *shards: FeatureShards,
    work: Workspace,
    runtime: Runtime,
) -> dict[str, JSON]:
    """Stage: train LoRA adapters and the projector on the mix's rows.

    Raises:
        BadInput: features, instructions, tokenizer, projector and GPT do not belong together.
        RuntimeError: half-way, the loss does not mind which clip is heard.
    """
    features, words = FeatureReader(*shards), load_tokenizer(tokenizer.out)
    check_belonging(projector, gpt, features)
    base = load_gpt(gpt.out, settled_dtype(recipe.dtype))
    device = bring(base, ranks=ALONE, work=work)
    model = join(add_lora(base, recipe.rank, recipe.alpha, work.seed % 2**63), load_projector(projector.out))
    model.to(device)
    lessons, exam = (
        Classroom(features, instructions, split, words, device) for split in ("train", "validation")
    )
    before = text_ability(model, exam)
    objective = Finetuning(recipe, model, lessons, exam, work.seed)
    with mirrored(work.metrics, work.directory, runtime.wandb, project=PROJECT, settings=to_plain(recipe)):
        curve = train(
            objective,
            steps=recipe.steps,
            partial=work.partial,
            metrics=work.metrics,
            checkpoint_every_s=runtime.checkpoint_every_s,
            evaluate_every=objective.look_every,
        )
        work.metrics.summary(loss=curve.tail_mean(), **objective.conclude(work.out, before))
    save_adapter(model.gpt, work.out / "adapter")
    save_projector(model.projector, work.out / "projector")
    curve.write(work.out)
    parameters = sum(tensor.numel() for tensor in objective.tensors().values())
    facts = belonging(gpt, features) | {"rank": recipe.rank}
    return {"num_parameters": parameters, "steps": curve.steps, **facts}


class Finetuning(Teaching):
    """Adapter and projector, each at its own learning rate."""

    def __init__(
        self, recipe: LoraRecipe, model: OmniModel, lessons: Classroom, exam: Classroom, seed: int
    ) -> None:
        parts = {
            "adapter": lora_parameters(model.gpt),
            "projector": dict(model.projector.named_parameters()),
        }
        super().__init__(
            model,
            lessons,
            exam,
            parts,
            rows_per_step=recipe.rows_per_step,
            steps=recipe.steps,
            min_gap=recipe.min_gap,
            field="lora",
            seed=seed,
        )
        self.recipe = recipe
        rates = (recipe.lr, recipe.projector_lr)
        groups = [
            {"params": list(part.values()), "lr": lr, "initial_lr": lr}
            for part, lr in zip(parts.values(), rates, strict=True)
        ]
        self.optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.95), weight_decay=0.0)

    def set_schedule(self, step: int) -> None:
        set_lr(self.optimizer, cosine(step, self.recipe.steps, self.recipe.warmup_steps))
