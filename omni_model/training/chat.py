"""Chat tuning: a base model learns to answer, from whole conversations and a little plain text beside them.

It reads everything and is taught only what the assistant says. The plain text of the corpus, in which every
token is learned, keeps what pretraining taught. A step's loss is the mean over all tokens it learns from, of
both kinds, on all ranks and in all microbatches: how a step is divided changes nothing but rounding.

Legend: B rows, T tokens a row (T+1 with the one that is only predicted).
"""

from __future__ import annotations

import contextlib
import json
import math
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor

from omni_model.artifacts import Conversations, GptCheckpoint, TextCorpus, TokenizerFiles
from omni_model.config import JSON, BadInput, ChatRecipe, Runtime
from omni_model.model.greedy import continue_greedily
from omni_model.model.weights import load_gpt, save_gpt
from omni_model.plain import to_plain
from omni_model.storage import Workspace
from omni_model.telemetry import mirrored
from omni_model.text.conversation import render_prompt
from omni_model.text.loader import BackgroundRows
from omni_model.text.tokenizer import Tokenizer, load_tokenizer
from omni_model.training.chat_rows import ChatRows, Rendered, reading_order, render_all
from omni_model.training.exchanges import NOT_SCORED
from omni_model.training.loop import Objective, train
from omni_model.training.microbatch import microbatch_rows
from omni_model.training.optim import set_lr, set_muon
from omni_model.training.ranks import Ranks
from omni_model.training.schedule import REFERENCE_BATCH_TOKENS, batch_scale, lr_multiplier
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

EVALUATIONS = 5  # during a run
HELD_OUT_TOKENS = 2**19  # read in an evaluation, at most
WORTH_A_WORKER = 10_000  # conversations
MOMENTUM_STEPS = 300  # over which Muon's momentum rises
PROMPTS = ("Hi! Who are you?", "What is 12 + 30?", "Name three animals.", "What can be heard in a kitchen?")
ANSWER_TOKENS = 48


def tune_chat(
    recipe: ChatRecipe,
    gpt: GptCheckpoint,
    tokenizer: TokenizerFiles,
    conversations: Conversations,
    text: TextCorpus,
    *,
    work: Workspace,
    runtime: Runtime,
) -> dict[str, JSON]:
    """Stage: teach a GPT the conversations.

    Raises:
        BadInput: GPT and tokenizer do not belong together, or the conversations teach nothing.
    """
    if tokenizer.vocab_size != gpt.vocab_size:
        raise BadInput(
            f"the GPT in {gpt.uri} has {gpt.vocab_size} tokens and the tokenizer in {tokenizer.uri} "
            f"{tokenizer.vocab_size}; tune the GPT with the tokenizer it was trained with"
        )
    ranks, words = join_ranks(), load_tokenizer(tokenizer.out)
    model = load_gpt(gpt.out, settled_dtype(recipe.dtype))
    batch_tokens = recipe.batch_tokens or tokens_in_pretraining(gpt.out)
    rows = rows_per_step(batch_tokens, model.config.sequence_len, ranks)
    row_tokens = model.config.sequence_len + 1
    rendered = _rendered(conversations, tokenizer, row_tokens, ranks, work, runtime)
    taught, held_out = rendered.divided()
    order = reading_order(taught, recipe.epochs, work.seed)
    ready = prepare(model, recipe.rates, ranks=ranks, work=work, batch_scale=batch_scale(batch_tokens))
    at_once = microbatch_rows(ready, rows // ranks.world, work=work, runtime=runtime)
    pace = Pace(work.metrics, step_tokens=batch_tokens, gpt=model, ranks=ranks)
    wish = runtime.wandb if ranks.first else "off"
    with (
        mirrored(work.metrics, work.directory, wish, project=PROJECT, settings=to_plain(recipe)),
        Replay(text.out, tokenizer.out, row_tokens, num_replayed(recipe.replay_share, rows)) as replay,
    ):
        lessons = ChatRows(rendered, order, row_tokens, words.bos_id)
        exam = ChatRows(rendered, held_out.tolist(), row_tokens, words.bos_id)
        objective = ChatTuning(recipe, ready, words, lessons, exam, replay, rows, at_once)
        curve = train(
            objective,
            steps=objective.steps,
            partial=work.partial,
            metrics=pace,
            ranks=ranks,
            checkpoint_every_s=runtime.checkpoint_every_s,
            evaluate_every=math.ceil(objective.steps / EVALUATIONS),
        )
        objective.conclude()
        if ranks.first:
            val_loss = objective.validation[-1]["loss"]
            skipped = len(rendered.lengths) - len(taught) - len(held_out)
            figures = {"loss": curve.tail_mean(), "val_loss": val_loss, "skipped": skipped}
            work.metrics.summary(**figures, **pace.summary())
            save_gpt(model, work.out)
            curve.write(work.out)
            objective.write(work.out, batch_tokens)
    shape = {"n_embd": model.config.n_embd, "vocab_size": model.config.vocab_size}
    return {"num_parameters": model.num_params(), "steps": curve.steps, **shape}


# --- what it begins with -------------------------------------------------------------------------


def tokens_in_pretraining(directory: Path) -> int:
    """Tokens of a step, as a pretrained GPT's payload tells; where it does not, 2^19."""
    path = directory / "training.json"
    return int(json.loads(path.read_text())["batch_tokens"]) if path.exists() else REFERENCE_BATCH_TOKENS


def num_replayed(share: float, rows: int) -> int:
    """How many of a step's rows are plain text: about their share, at least one of each kind."""
    return min(max(1, round(share * rows)), rows - 1) if share else 0


def _rendered(
    conversations: Conversations,
    tokenizer: TokenizerFiles,
    row_tokens: int,
    ranks: Ranks,
    work: Workspace,
    runtime: Runtime,
) -> Rendered:
    """The conversations as ids, which the first rank makes where an earlier attempt did not."""
    place, total, done = work.partial / "conversations", conversations.num_conversations, 0
    cores = runtime.workers or (os.cpu_count() or 1) // runtime.parallel_stages

    def told(count: int) -> None:
        nonlocal done
        done += count
        work.metrics.log(done, total)

    if ranks.first:
        num_workers = max(1, min(cores, total // WORTH_A_WORKER))
        render_all(conversations.out, tokenizer.out, row_tokens, place, num_workers, told)
    ranks.agree(None)
    return Rendered.read(place)


class Replay:
    """Rows of plain text, `rows` in every step, from a place in the corpus that a checkpoint can keep.

    The process that reads them starts with the first step, at `cursor`, and ends with the `with` block.
    """

    def __init__(self, corpus: Path, tokenizer: Path, row_tokens: int, rows: int) -> None:
        self.rows = rows
        self.cursor: JSON = None
        self._corpus, self._tokenizer, self._row_tokens = corpus, tokenizer, row_tokens
        self._reading = contextlib.ExitStack()
        self._reader: BackgroundRows | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self._reading.close()

    def next(self) -> np.ndarray:
        """The next step's (rows, T+1) int32, the same on every rank."""
        if not self.rows:
            return np.empty((0, self._row_tokens), np.int32)
        if self._reader is None:
            reader = BackgroundRows(
                self._corpus,
                "train",
                self._tokenizer,
                row_tokens=self._row_tokens,
                rows_per_step=self.rows,
                cursor=self.cursor,
            )
            self._reader = self._reading.enter_context(reader)
        rows, self.cursor = self._reader.next()
        return rows


# --- what it learns ------------------------------------------------------------------------------


class ChatTuning(Objective):
    """Step s reads the rows of conversations that are its turn, and the next of the plain text.

    State: where the plain text stands, and what evaluations found.
    """

    def __init__(
        self,
        recipe: ChatRecipe,
        ready: Ready,
        tokenizer: Tokenizer,
        conversations: ChatRows,
        held_out: ChatRows,
        replay: Replay,
        rows: int,
        at_once: int,
    ) -> None:
        self.recipe, self.gpt, self.ranks, self.tokenizer = recipe, ready.gpt, ready.ranks, tokenizer
        self.optimizer, self.loss_scale = ready.optimizer, ready.loss_scale
        self.conversations, self.held_out, self.replay = conversations, held_out, replay
        self.rows, self.at_once = rows, at_once
        self.chat_rows = rows - replay.rows
        self.steps = max(1, round(len(conversations) / self.chat_rows))
        own = rows // ready.ranks.world
        self.feed = RowFeed(ready.device, own, ready.gpt.config.sequence_len + 1)
        self.validation: list[dict[str, float]] = []
        self.samples: list[dict[str, JSON]] = []

    def tensors(self) -> Mapping[str, Tensor]:
        return dict(self.gpt.named_parameters())

    def set_schedule(self, step: int) -> None:
        recipe = self.recipe
        decay_fraction = 1 - recipe.constant_fraction
        shape = lr_multiplier(step, self.steps, recipe.warmup_steps, decay_fraction, 0.0)
        set_lr(self.optimizer, recipe.lr_fraction * shape)
        set_muon(self.optimizer, momentum=muon_momentum(step), weight_decay=0.0)

    def loss(self, step: int) -> Iterator[Tensor]:
        coded, all_learned = self.batch(step)
        rows = self.feed.carry(coded)
        for start in range(0, len(rows), self.at_once):
            part = slice(start, start + self.at_once)
            share = int(_num_learned(coded[part])) * self.ranks.world / all_learned
            yield self.gpt(*decode(rows[part])) * share

    def batch(self, step: int) -> tuple[np.ndarray, int]:
        """This rank's rows of a step (B, T+1), coded, and how many tokens the step teaches on all ranks."""
        first, count = step * self.chat_rows, self.chat_rows
        numbers = [number % len(self.conversations) for number in range(first, first + count)]
        plain = self.replay.next()
        own = self.ranks.part(self.rows)
        parts = [
            self.conversations.read(numbers[own]),
            plain[max(0, own.start - count) : max(0, own.stop - count)],
        ]
        return np.concatenate(parts), self.conversations.num_targets(numbers) + _num_learned(plain)

    def evaluate(self, step: int) -> dict[str, float]:
        with torch.compiler.set_stance("force_eager"):  # shapes of their own are not worth compiling
            loss = self.held_out_loss()
            self.validation.append({"step": step, "loss": loss})
            for prompt in PROMPTS if self.ranks.first else ():
                self.samples.append({"step": step, "prompt": prompt, "text": self.answer(prompt)})
        return {"val_loss": loss}

    def conclude(self) -> None:
        """Evaluate after the last step, where that was not its turn."""
        if not self.validation or self.validation[-1]["step"] < self.steps:
            self.evaluate(self.steps)

    def answer(self, question: str) -> str:
        """What the GPT says, by the likeliest token each time."""
        prompt = render_prompt(self.tokenizer, question)
        stop = (self.tokenizer.special("<|assistant_end|>"), self.tokenizer.bos_id)
        return self.tokenizer.decode(continue_greedily(self.gpt, prompt, ANSWER_TOKENS, stop))

    @torch.no_grad()
    def held_out_loss(self) -> float:
        """Mean loss per learned token of the conversations that are held out, of the first rows of them."""
        count = max(1, min(len(self.held_out), HELD_OUT_TOKENS // self.gpt.config.sequence_len))
        rows = torch.from_numpy(self.held_out.read(range(count)[self.ranks.part(count)]))
        sums = torch.zeros(2, dtype=torch.float64, device=self.gpt.cos.device)  # nats, tokens
        for start in range(0, len(rows), self.at_once):  # of few rows a rank may have none
            ids, targets = decode(rows[start : start + self.at_once].to(sums.device, torch.int64))
            losses = self.gpt(ids, targets, loss_reduction="none")
            sums += torch.stack([losses.double().sum(), (targets >= 0).sum().double()])
        nats, tokens = self.ranks.average(sums)().tolist()  # of the ranks; their number cancels
        return float(round(nats / tokens, 6))

    def state(self) -> dict[str, Any]:
        return {"cursor": self.replay.cursor, "validation": self.validation, "samples": self.samples}

    def restore(self, state: dict[str, Any]) -> None:
        self.replay.cursor = state["cursor"]
        self.validation, self.samples = list(state["validation"]), list(state["samples"])

    def write(self, out: Path, batch_tokens: int) -> None:
        """What evaluations found, and what the figures are made of."""
        training = {
            "batch_tokens": batch_tokens,
            "dtype": str(self.gpt.compute_dtype).removeprefix("torch."),
            "flops_per_token": self.gpt.flops_per_token(),
            "steps": self.steps,
            "tokens": self.steps * batch_tokens,
        }
        told = {"samples": self.samples, "validation": self.validation, "training": training}
        for name, content in told.items():
            text = json.dumps(content, sort_keys=True, indent=1) + "\n"
            (out / f"{name}.json").write_text(text, encoding="utf-8")


def muon_momentum(step: int) -> float:
    """.85 -> .95 over the first 300 steps."""
    return 0.85 + (0.95 - 0.85) * min(1.0, step / MOMENTUM_STEPS)


def decode(coded: Tensor) -> tuple[Tensor, Tensor]:
    """Ids and targets (B, T) of coded rows (B, T+1)."""
    targets = coded[:, 1:].clamp_min(NOT_SCORED)
    return torch.where(coded >= 0, coded, ~coded)[:, :-1], targets


def _num_learned(coded: np.ndarray) -> int:
    return int((coded[:, 1:] >= 0).sum())
