"""How long a text run will take on a card, and how much memory and disk, before anything is computed.

Time is arithmetic over speed: the work of a training is known in advance, to the operation, and how fast a
card does it has been measured by an earlier run or is assumed, and then said so. Memory and disk are sums
over shapes (`flows/gpt_memory.py`). All of it is "about", and what it rests on is told with the figure. Of
omni_model only the vocabulary is needed, so that a plan stays instant.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from flows.cards import GIB, Card, Machine, find_card, speed
from flows.gpt_memory import BF16_BYTES, checkpoint_bytes, fits, fitting_rows, training_bytes, weights_bytes
from omni_model.config import (
    BaseClimbMixRecipe,
    BaseEvaluationRecipe,
    ChatEvaluationRecipe,
    ChatRecipe,
    ClimbMixRecipe,
    ConversationsRecipe,
    CoreBundleRecipe,
    GptShape,
    MiniatureCoreRecipe,
    MiniatureSetsRecipe,
    PretrainRecipe,
    PublicSetsRecipe,
)
from omni_model.config.depth import CHARS_PER_TOKEN, SHARD_BYTES, GptSize, derive
from omni_model.telemetry import markdown_table

# A training stage compiles its kernels and tries which microbatch fits before the first step counts.
START_S = 180.0
# Scoring makes small, ragged batches, which use a card about half as well as training does.
SCORING_SHARE = 0.5
SCORING_BYTES = int(2.5 * GIB)  # of fp32 logits, several times over, and of keys and values
# One layer's kernels for one token of an answer take as long to launch as to run.
DECODED_LAYER_S = 0.25e-3
DECODED_TOKENS = 200  # of an answer, on average

# Tokens of a row as the chat format writes it, and rows of the public test sets.
ROW_TOKENS = {"smoltalk": 850, "mmlu": 130, "arc": 100, "gsm8k": 220, "identity": 120}
CHOICES, GENERATED = (
    {"arc-easy": 2376, "arc-challenge": 1172, "mmlu": 14_042},
    {"gsm8k": 1319, "humaneval": 164},
)
CHOICE_TOKENS = 150
CORE_TASKS, MINIATURE_TASKS = 22, 3
CORE_ITEMS = 4_000  # of a task, on average, where all are asked
CORE_ITEM_TOKENS = 800  # with the examples before it, which are read once for all options

SETS_BYTES, CORE_BYTES = int(1.3e9), int(0.4e9)  # as published, unpacked
PACKED_SHARE = 0.4  # of text, as parquet keeps it
SMALL_BYTES = 2**22  # tokenizers, scores, reports


@dataclass(frozen=True)
class Forecast:
    """What a stage will take; None where nothing can be said.

    Attributes:
        gpu_bytes: peak of all tensors on one card.
        rows: rows of text a card takes at once; 0 where not even one fits.
        disk_bytes: what the stage needs while it runs; `kept_bytes` of them stay.
        assumed: what the figures rest on, in words.
    """

    seconds: float | None = None
    gpu_bytes: int | None = None
    rows: int | None = None
    disk_bytes: int | None = None
    kept_bytes: int | None = None
    assumed: tuple[str, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """Its fields in a row of `omni plan --json`."""
        return {
            "predicted_s": self.seconds,
            "predicted_gpu_bytes": self.gpu_bytes,
            "predicted_rows": self.rows,
            "predicted_bytes": self.disk_bytes,
            "assumed": "; ".join(self.assumed),
        }


def pretraining(recipe: PretrainRecipe, vocab_size: int, machine: Machine) -> Forecast:
    """Training and the validations between; FLOPs by the formula of `GptSize`."""
    tokens = recipe.steps * recipe.batch_tokens
    validations = recipe.steps // recipe.validate_every + 1
    forward = validations * recipe.validation_tokens / 3  # a forward pass is a third of the training's work
    return _training(recipe.gpt, vocab_size, tokens + forward, recipe.batch_tokens, machine, ())


def chat_tuning(
    recipe: ChatRecipe, shape: GptShape, vocab_size: int, rows: ConversationsRecipe, machine: Machine
) -> Forecast:
    """Every row once an epoch, and the plain text that is replayed."""
    tokens = recipe.epochs * _conversation_tokens(rows, shape) / (1 - recipe.replay_share)
    assumed = (f"{ROW_TOKENS['smoltalk']} tokens a conversation",)
    return _training(shape, vocab_size, tokens, recipe.batch_tokens or shape.sequence_len, machine, assumed)


def _training(
    shape: GptShape,
    vocab_size: int,
    tokens: float,
    batch_tokens: int,
    machine: Machine,
    assumed: tuple[str, ...],
) -> Forecast:
    size, card, gpus = GptSize.of(shape, vocab_size), machine.card, machine.gpus
    kept = weights_bytes(size)
    disk = kept + 2 * checkpoint_bytes(size)  # the last checkpoint stays until the next is whole
    if card.peak_flops is None:
        took = None if machine.speed.flops is None else tokens * size.flops_per_token / machine.speed.flops
        return Forecast(took, disk_bytes=disk, kept_bytes=kept, assumed=(machine.speed.told, *assumed))
    share = max(1, batch_tokens // shape.sequence_len // gpus)
    usable = card.usable_bytes
    rows = machine.microbatch_rows or fitting_rows(shape, vocab_size, usable, share, gpus=gpus)
    needed = training_bytes(shape, vocab_size, max(1, rows), gpus=gpus)
    if not fits(shape, vocab_size, usable, max(1, rows), gpus=gpus):
        words = (
            f"rows at once: {max(1, rows)} need {needed / GIB:.1f} GiB and some gaps, of {usable / GIB:.1f}"
        )
        return Forecast(None, needed, 0, disk, kept, (words, *assumed))
    assert machine.speed.flops is not None
    took = START_S + tokens * size.flops_per_token / (machine.speed.flops * gpus)
    grounds = (machine.speed.told, "bfloat16", *assumed)
    grounds += (f"{gpus} cards lose nothing",) if gpus > 1 else ()
    return Forecast(took, needed, rows, disk, kept, grounds)


def _conversation_tokens(rows: ConversationsRecipe, shape: GptShape) -> float:
    lengths = {name: min(tokens, shape.sequence_len) for name, tokens in ROW_TOKENS.items()}
    return float(sum(getattr(rows, f"{name}_rows") * length for name, length in lengths.items()))


def base_evaluation(
    recipe: BaseEvaluationRecipe,
    shape: GptShape,
    vocab_size: int,
    core: CoreBundleRecipe | MiniatureCoreRecipe,
    machine: Machine,
) -> Forecast:
    """Bits per byte of two splits, and CORE."""
    if isinstance(core, MiniatureCoreRecipe):
        items = MINIATURE_TASKS * min(core.items_per_task, recipe.core_items_per_task or core.items_per_task)
    else:
        items = CORE_TASKS * (recipe.core_items_per_task or CORE_ITEMS)
    tokens = 2 * recipe.split_tokens + items * CORE_ITEM_TOKENS
    return _scoring(shape, vocab_size, tokens, 0.0, machine, (f"{CORE_ITEM_TOKENS} tokens an item of CORE",))


def chat_evaluation(
    recipe: ChatEvaluationRecipe,
    shape: GptShape,
    vocab_size: int,
    sets: PublicSetsRecipe | MiniatureSetsRecipe,
    machine: Machine,
) -> Forecast:
    """Multiple choice by one pass, sums and programs token by token, one after the other."""
    most = recipe.items_per_task or math.inf
    if isinstance(sets, MiniatureSetsRecipe):
        most = min(most, sets.test_rows)
    chosen, written = (sum(min(count, most) for count in each.values()) for each in (CHOICES, GENERATED))
    length = min(DECODED_TOKENS, recipe.max_answer_tokens)
    decoding_s = written * length * shape.n_layer * DECODED_LAYER_S
    words = (f"{length} tokens an answer, {DECODED_LAYER_S * 1e3:g} ms a token and layer",)
    return _scoring(shape, vocab_size, chosen * CHOICE_TOKENS, decoding_s, machine, words)


def _scoring(
    shape: GptShape,
    vocab_size: int,
    tokens: float,
    decoding_s: float,
    machine: Machine,
    assumed: tuple[str, ...],
) -> Forecast:
    if machine.card.peak_flops is None or machine.speed.flops is None:
        return Forecast(disk_bytes=SMALL_BYTES, kept_bytes=SMALL_BYTES)
    size = GptSize.of(shape, vocab_size)
    took = tokens * size.flops_per_token / 3 / (machine.speed.flops * SCORING_SHARE) + decoding_s
    weights = weights_bytes(size) + BF16_BYTES * (size.blocks + size.head)
    words = (machine.speed.told, "half of that in scoring", *assumed)
    return Forecast(took, weights + SCORING_BYTES, None, SMALL_BYTES, SMALL_BYTES, words)


def disk_bytes(recipe: Any) -> int | None:
    """What a stage that fetches or writes text leaves on disk; None: not known before it is there."""
    if isinstance(recipe, ClimbMixRecipe):
        return int((recipe.num_shards + 1) * SHARD_BYTES)  # and the one for validation
    if isinstance(recipe, PublicSetsRecipe):
        return SETS_BYTES
    if isinstance(recipe, CoreBundleRecipe):
        return CORE_BYTES
    if isinstance(recipe, ConversationsRecipe):
        tokens = sum(getattr(recipe, f"{name}_rows") * length for name, length in ROW_TOKENS.items())
        return int(tokens * CHARS_PER_TOKEN * PACKED_SHARE)
    return None


# --- the table of infra/README.md -----------------------------------------------------------------

TABLE_HEAD = ("model", "card", "rows at once", "GPU memory", "pretraining", "chat", "evaluations", "disk")


def table(depths: Iterable[int] = (12, 20, 26), cards: Iterable[str] = ("5090", "4090", "h100")) -> str:
    """The forecasts of `base` at some depths on some cards, one of each, as Markdown."""
    rows = []
    for depth in depths:
        recipe = derive(BaseClimbMixRecipe(depth=depth))
        for name in cards:
            card = find_card(name)
            rows.append([f"d{depth}", card.model.removesuffix(" 80GB HBM3"), *_cells(recipe, card)])
    return markdown_table(TABLE_HEAD, rows)


def _cells(recipe: BaseClimbMixRecipe, card: Card) -> list[str]:
    shape, vocab_size = recipe.pretrain.gpt, recipe.tokenizer.vocab_size
    machine = Machine(card, speed(card, (), shape.n_layer))
    trained = pretraining(recipe.pretrain, vocab_size, machine)
    tuned = chat_tuning(recipe.chat, shape, vocab_size, recipe.conversations, machine)
    evaluated = (
        base_evaluation(recipe.evaluation, shape, vocab_size, recipe.core, machine),
        chat_evaluation(recipe.chat_evaluation, shape, vocab_size, recipe.sets, machine),
    )
    fetched = sum(
        disk_bytes(each) or 0 for each in (recipe.climbmix, recipe.sets, recipe.core, recipe.conversations)
    )
    kept = 2 * (trained.kept_bytes or 0) + fetched
    disk = f"{kept / 1e9:.0f} GB, {(kept + _passing(tuned)) / 1e9:.0f} at most"
    if not trained.rows:
        return ["none fits", f"{(trained.gpu_bytes or 0) / GIB:.1f} GiB for one row", "", "", "", disk]
    times = (trained.seconds, tuned.seconds, sum(each.seconds or 0 for each in evaluated))
    memory = f"{(trained.gpu_bytes or 0) / GIB:.1f} GiB"
    return [str(trained.rows), memory, *(seconds(each or 0) for each in times), disk]


def _passing(forecast: Forecast) -> int:
    return (forecast.disk_bytes or 0) - (forecast.kept_bytes or 0)


def seconds(value: float) -> str:
    """A duration as a person would say it."""
    if value < 90:
        return f"{value:.1f} s"
    if value < 5400:
        return f"{value / 60:.0f} min"
    return f"{value / 3600:.1f} h" if value < 36_000 else f"{value / 3600:.0f} h"
