"""How long a GPT learns to hear on a card, and what recordings and their features need on disk.

A row of the mix is a clip and some words, so how long it is can only be guessed; the guess is told with the
figure. Nothing else is known of sounds before they are there, but for LibriSpeech, whose hours are published.
"""

from collections.abc import Mapping
from typing import Any

from flows.cards import Machine
from flows.foresight import SCORING_SHARE, START_S, Forecast
from flows.gpt_memory import BF16_BYTES, passing_bytes, weights_bytes
from omni_model.config import (
    AlignRecipe,
    EncoderRecipe,
    FeatureRecipe,
    GptShape,
    LibriSpeechRecipe,
    LoraRecipe,
    PretrainedEncoderRecipe,
    ProjectorShape,
)
from omni_model.config.depth import GptSize

FRAMES_PER_S = 50  # of every encoder that is read
HEARD_S, LONGEST_S = 7.0, 30.0  # of a row of the mix: between a phrase and a sentence that is read aloud
TEXT_TOKENS, LONGEST_TEXT_TOKENS = 120, 500
# Of the work of a training step the gradients of the weights are a third, and frozen weights have none.
FROZEN_SHARE = 2 / 3

HOURS = {"train-clean-100": 100.6, "train-clean-360": 363.6, "dev-clean": 5.4, "test-clean": 5.4}
SAMPLE_BYTES_PER_S = 32_000
WIDTHS = {"tiny": 384, "base": 512, "small": 768, "medium": 1024, "large": 1280}


def teaching(
    recipe: AlignRecipe | LoraRecipe,
    projector: ProjectorShape,
    shape: GptShape,
    vocab_size: int,
    machine: Machine,
) -> Forecast:
    """Projector or adapters learn; whatever the GPT multiplies by is frozen."""
    size = GptSize.of(shape, vocab_size)
    if machine.speed.flops is None:
        return Forecast()
    row_tokens = HEARD_S * FRAMES_PER_S / projector.stack + TEXT_TOKENS
    flops = recipe.steps * recipe.rows_per_step * row_tokens * size.flops_per_token * FROZEN_SHARE
    took = START_S + flops / (machine.speed.flops * SCORING_SHARE)
    longest = LONGEST_S * FRAMES_PER_S / projector.stack + LONGEST_TEXT_TOKENS
    rows = -(-recipe.rows_per_step * int(longest) // shape.sequence_len)  # as many tokens in whole rows
    # The weights lie there twice: as they are, and as they were, to see that they stay.
    lasting = 2 * weights_bytes(size) + BF16_BYTES * (size.blocks + size.head)
    words = (machine.speed.told, "half of that on short rows", f"{row_tokens:.0f} tokens a row")
    return Forecast(took, lasting + passing_bytes(shape, vocab_size, rows), assumed=words)


def disk_bytes(recipe: Any, inputs: Mapping[str, Any]) -> int | None:
    """What recordings of LibriSpeech need, and features of them; None where nobody knows."""
    if isinstance(recipe, LibriSpeechRecipe):
        return None if recipe.max_clips else _seconds(recipe, SAMPLE_BYTES_PER_S)
    if isinstance(recipe, FeatureRecipe):
        corpus, width = inputs["corpus"], _width(inputs["encoder"])
        if isinstance(corpus, LibriSpeechRecipe) and not corpus.max_clips and width:
            layers = len(recipe.layers) if recipe.mix == "concat" else 1
            return _seconds(corpus, FRAMES_PER_S * width * layers * BF16_BYTES)
    return None


def _seconds(part: LibriSpeechRecipe, bytes_per_s: int) -> int | None:
    return int(HOURS[part.part] * 3600 * bytes_per_s) if part.part in HOURS else None


def _width(encoder: Any) -> int | None:
    if isinstance(encoder, EncoderRecipe):
        return encoder.width
    if isinstance(encoder, PretrainedEncoderRecipe) and "whisper" in encoder.model:
        return next((width for name, width in WIDTHS.items() if name in encoder.model), None)
    return None
