"""The base model: a GPT, from random weights, learns to predict the next token of packed text.

Every step reads `batch_tokens` of the corpus, in the one order that the loader gives them, whatever the
number of ranks; its rows go through the device in microbatches whose gradients add up. Where the loader
stands is part of every checkpoint, so a training that is killed goes on with the very next row.

Legend: B rows, T tokens a row is trained on (a row has one more).
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from omni_model.artifacts import GptCheckpoint, TextCorpus, TokenizerFiles
from omni_model.config import JSON, BadInput, PretrainRecipe, Runtime
from omni_model.model.gpt import GPT
from omni_model.model.greedy import continue_greedily
from omni_model.model.weights import load_gpt, new_gpt, save_gpt
from omni_model.plain import to_plain
from omni_model.storage import Workspace
from omni_model.telemetry import mirrored
from omni_model.text.loader import BackgroundRows, validation_rows
from omni_model.text.tokenizer import Tokenizer, load_tokenizer, token_bytes
from omni_model.training.bits_per_byte import bits_per_byte
from omni_model.training.loop import Objective, train
from omni_model.training.microbatch import microbatch_rows
from omni_model.training.optim import set_lr, set_muon
from omni_model.training.ranks import Ranks
from omni_model.training.schedule import batch_scale, lr_multiplier, muon_momentum, muon_weight_decay
from omni_model.training.setup import (
    PROJECT,
    Pace,
    Ready,
    RowFeed,
    join_ranks,
    prepare,
    rows_per_step,
    settled_dtype,
)

PROMPTS = (
    "In the kitchen",
    "She heard",
    "The animal is",
    "How many",
    "If today is Monday, then tomorrow is",
    "Water is made of",
)
SAMPLE_TOKENS = 32
PLENTY_BYTES = 16  # of a corpus' files for each token of a step: then it certainly fills one


def pretrain(
    recipe: PretrainRecipe, text: TextCorpus, tokenizer: TokenizerFiles, *, work: Workspace, runtime: Runtime
) -> dict[str, JSON]:
    """Stage: train a GPT from scratch on the corpus' training split.

    Every rank calls it; the first one writes and tells.

    Raises:
        BadInput: a number left to be derived, a batch that does not divide among the ranks, a tokenizer other
            than its handle says, a corpus smaller than a step, or one without validation text.
    """
    ranks = join_ranks()
    source = Source.of(recipe, text, tokenizer, ranks, runtime)
    gpt = new_gpt(recipe.gpt, source.words.vocab_size, work.seed, settled_dtype(recipe.dtype))
    return _learn(recipe, gpt, source, ranks, work, runtime)


def continue_pretraining(
    recipe: PretrainRecipe,
    start: GptCheckpoint,
    text: TextCorpus,
    tokenizer: TokenizerFiles,
    *,
    work: Workspace,
    runtime: Runtime,
) -> dict[str, JSON]:
    """Stage: the same from weights that have learned something before; the optimizer begins anew.

    Rows may be longer now and windows others: weights know of neither.

    Raises:
        BadInput: as in `pretrain`, or the checkpoint has another shape or vocabulary.
    """
    ranks = join_ranks()
    source = Source.of(recipe, text, tokenizer, ranks, runtime)
    before = load_gpt(start.out)
    gpt = new_gpt(recipe.gpt, source.words.vocab_size, work.seed, settled_dtype(recipe.dtype))
    for field in dataclasses.fields(gpt.config):
        found, wanted = (getattr(config, field.name) for config in (before.config, gpt.config))
        if found != wanted and field.name not in ("sequence_len", "window_pattern"):
            raise BadInput(
                f"the GPT in {start.uri} has {field.name} {found} and recipe and tokenizer ask for {wanted}; "
                "set pretrain.gpt to the checkpoint's shape, or begin with another"
            )
    gpt.load_state_dict(before.state_dict())
    return _learn(recipe, gpt, source, ranks, work, runtime)


def _learn(
    recipe: PretrainRecipe, gpt: GPT, source: Source, ranks: Ranks, work: Workspace, runtime: Runtime
) -> dict[str, JSON]:
    held_out = source.held_out(recipe.validation_tokens)
    ready = prepare(
        gpt,
        recipe.rates,
        ranks=ranks,
        work=work,
        batch_scale=batch_scale(recipe.batch_tokens),
        weight_decay=recipe.weight_decay,
        fp8=recipe.fp8,
    )
    at_once = microbatch_rows(ready, source.rows // ranks.world, work=work, runtime=runtime)
    wish = runtime.wandb if ranks.first else "off"
    with (
        mirrored(work.metrics, work.directory, wish, project=PROJECT, settings=to_plain(recipe)),
        contextlib.closing(NextToken(recipe, ready, source, held_out, at_once)) as objective,
    ):
        pace = Pace(work.metrics, step_tokens=recipe.batch_tokens, gpt=gpt, ranks=ranks)
        curve = train(
            objective,
            steps=recipe.steps,
            partial=work.partial,
            metrics=pace,
            ranks=ranks,
            checkpoint_every_s=runtime.checkpoint_every_s,
            evaluate_every=math.gcd(recipe.validate_every, recipe.sample_every),
        )
        objective.conclude()
        if ranks.first:
            val_bpb = objective.validation[-1]["bpb"]
            work.metrics.summary(val_bpb=val_bpb, loss=curve.tail_mean(), **pace.summary())
            save_gpt(gpt, work.out)
            curve.write(work.out)
            objective.write(work.out)
    shape = {"n_embd": gpt.config.n_embd, "vocab_size": gpt.config.vocab_size}
    return {"num_parameters": gpt.num_params(), "steps": curve.steps, **shape}


@dataclasses.dataclass(frozen=True)
class Source:
    """Where the rows of a training come from. `rows` are those of a step, of all ranks together."""

    corpus: Path
    tokenizer: Path
    words: Tokenizer
    row_tokens: int
    rows: int
    part: slice
    threads: int

    @classmethod
    def of(
        cls,
        recipe: PretrainRecipe,
        text: TextCorpus,
        tokenizer: TokenizerFiles,
        ranks: Ranks,
        runtime: Runtime,
    ) -> Source:
        """BadInput where the recipe's numbers, the corpus and the tokenizer do not fit together."""
        if recipe.steps == 0:
            raise BadInput("pretrain.steps is 0; set it, or derive the recipe from its depth first")
        rows = rows_per_step(recipe.batch_tokens, recipe.gpt.sequence_len, ranks)
        row_tokens = recipe.gpt.sequence_len + 1
        words = load_tokenizer(tokenizer.out)
        if words.vocab_size != tokenizer.vocab_size:
            raise BadInput(
                f"the tokenizer in {tokenizer.out} has {words.vocab_size} ids and its record says "
                f"{tokenizer.vocab_size}; make it again"
            )
        if text.num_bytes < PLENTY_BYTES * recipe.batch_tokens:
            found = len(validation_rows(text.out, tokenizer.out, row_tokens, rows, "train"))
            if found < rows:
                raise BadInput(
                    f"the text corpus fills {found} rows of {row_tokens} tokens and a step reads {rows}; add "
                    "text, or set pretrain.batch_tokens lower"
                )
        cores = runtime.workers or max(1, (os.cpu_count() or 1) // runtime.parallel_stages)
        threads = max(1, cores // ranks.world)
        return cls(text.out, tokenizer.out, words, row_tokens, rows, ranks.part(rows), threads)

    def held_out(self, num_tokens: int) -> np.ndarray:
        """The first rows (N, T + 1) of the validation split, of about `num_tokens` in all."""
        return validation_rows(
            self.corpus, self.tokenizer, self.row_tokens, max(1, num_tokens // (self.row_tokens - 1))
        )

    def open(self, cursor: JSON) -> BackgroundRows:
        """This rank's rows from where the cursor stands."""
        return BackgroundRows(
            self.corpus,
            "train",
            self.tokenizer,
            row_tokens=self.row_tokens,
            rows_per_step=self.rows,
            part=self.part,
            cursor=cursor,
            threads=self.threads,
        )


class NextToken(Objective):
    """Batches in the loader's order. Its state: where the loader stands, and what evaluations found."""

    def __init__(
        self, recipe: PretrainRecipe, ready: Ready, source: Source, held_out: np.ndarray, at_once: int
    ) -> None:
        self.recipe, self.ready, self.source, self.at_once = recipe, ready, source, at_once
        self.gpt, self.optimizer, self.loss_scale = ready.gpt, ready.optimizer, ready.loss_scale
        self.held_out = held_out[ready.ranks.part(len(held_out))]
        self.num_bytes = torch.tensor(token_bytes(source.words), device=ready.device)
        self.cursor: JSON = None
        self.validation: list[dict[str, Any]] = []
        self.samples: list[dict[str, Any]] = []
        self._feed = RowFeed(ready.device, source.rows // ready.ranks.world, source.row_tokens)
        self._reading = contextlib.ExitStack()
        self._loader: BackgroundRows | None = None

    def tensors(self) -> Mapping[str, Tensor]:
        return dict(self.gpt.named_parameters())

    def set_schedule(self, step: int) -> None:
        recipe = self.recipe
        warmdown = recipe.warmdown_fraction
        lr = lr_multiplier(step, recipe.steps, recipe.warmup_steps, warmdown, recipe.final_lr_fraction)
        set_lr(self.optimizer, lr)
        momentum = muon_momentum(step, recipe.steps, warmdown_fraction=warmdown)
        weight_decay = muon_weight_decay(step, recipe.steps, recipe.weight_decay)
        set_muon(self.optimizer, momentum=momentum, weight_decay=weight_decay)

    def loss(self, step: int) -> Iterator[Tensor]:
        if self._loader is None:
            self._loader = self._reading.enter_context(self.source.open(self.cursor))
        rows, self.cursor = self._loader.next()
        parts = self._feed.carry(rows).split(self.at_once)
        for ids in parts:
            yield self.gpt(ids[:, :-1], ids[:, 1:]) / len(parts)

    def evaluate(self, step: int) -> dict[str, float]:
        last = step == self.recipe.steps
        with torch.compiler.set_stance("force_eager"):  # shapes of their own are not worth compiling
            if last or step % self.recipe.sample_every == 0:
                self._sample(step)
            if last or step % self.recipe.validate_every == 0:
                return {"val_bpb": self._validate(step)}
        return {}

    def conclude(self) -> None:
        """Evaluate after the last step, where that was not its turn."""
        if not self.validation or self.validation[-1]["step"] < self.recipe.steps:
            self.evaluate(self.recipe.steps)

    def _validate(self, step: int) -> float:
        starts = range(0, len(self.held_out), self.at_once)
        batches = (torch.from_numpy(self.held_out[start : start + self.at_once]) for start in starts)
        there = (ids.to(self.ready.device, torch.int64) for ids in batches)
        bpb = round(bits_per_byte(self.gpt, there, self.num_bytes, self.ready.ranks), 6)
        self.validation.append({"step": step, "bpb": bpb})
        return bpb

    def _sample(self, step: int) -> None:
        if not self.ready.ranks.first:
            return  # they are told what the first one wrote
        for prompt in PROMPTS:
            ids = [self.source.words.bos_id, *self.source.words.encode(prompt)]
            written = continue_greedily(self.gpt, ids, SAMPLE_TOKENS, stop=(self.source.words.bos_id,))
            self.samples.append({"step": step, "prompt": prompt, "text": self.source.words.decode(written)})

    def state(self) -> dict[str, Any]:
        return {"cursor": self.cursor, "validation": self.validation, "samples": self.samples}

    def restore(self, state: dict[str, Any]) -> None:
        if state["cursor"] != self.cursor:
            self.close()
        self.cursor, self.validation, self.samples = state["cursor"], state["validation"], state["samples"]

    def close(self) -> None:
        """Let the loader go; the next step opens it again where it stood."""
        self._reading.close()
        self._loader = None

    def write(self, out: Path) -> None:
        """What evaluations found, and what the figures are made of."""
        recipe = self.recipe
        training = {
            "batch_tokens": recipe.batch_tokens,
            "dtype": str(self.gpt.compute_dtype).removeprefix("torch."),
            "flops_per_token": self.gpt.flops_per_token(),
            "steps": recipe.steps,
            "tokens": recipe.steps * recipe.batch_tokens,
        }
        told = {"samples": self.samples, "validation": self.validation, "training": training}
        for name, content in told.items():
            text = json.dumps(content, sort_keys=True, indent=1) + "\n"
            (out / f"{name}.json").write_text(text, encoding="utf-8")
