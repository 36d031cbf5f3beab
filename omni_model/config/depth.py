"""One dial: from the depth of a language model follows everything else, in order, each with its reason.

The rules and their constants are nanochat's, which tuned them on its model of 12 layers. Whatever a recipe
states itself is kept, and what comes after follows from that. Counts here are closed formulas over the shape,
so that a plan needs no tensor: they equal those of the real module.

Legend: L layers, C width, H heads, G kv heads, D head dim, V vocabulary. Standard library only.
"""

import dataclasses
import math
from dataclasses import dataclass
from typing import TypeVar, cast

from omni_model.config.base import BadInput
from omni_model.config.runs import BaseClimbMixRecipe, DeepRecipe
from omni_model.config.text import GptShape, TokenizerRecipe

HEAD_DIM = 128
CHANNELS_PER_LAYER = 64
REFERENCE_DEPTH = 12
REFERENCE_BATCH_TOKENS = 2**19  # at which learning rates and decay were tuned, on the reference depth
REFERENCE_WEIGHT_DECAY = 0.28
BATCH_EXPONENT = 0.383  # "Power Lines", arXiv 2505.13738
BYTES_VOCABULARY = 257

SHARD_CHARS = 250e6  # of ClimbMix; a file is about 100 MB
SHARD_BYTES = 100e6
MAX_SHARDS = 6542
CHARS_PER_TOKEN = 4.5  # of web text under 32768 merges; fewer merges make shorter tokens and need less text
CROPPED_SHARE = 0.35  # of the tokens fall off where rows of 2048 are filled with whole documents
SHARD_MARGIN = 1.1

VE_GATE_CHANNELS = 12
SMEAR_CHANNELS = 24
SHORT_WINDOW_DIVISOR = 4

Deep = TypeVar("Deep", bound=DeepRecipe)


@dataclass(frozen=True)
class GptSize:
    """Parameters of a GPT by what they are for, and what a token costs to train on.

    Attributes:
        tables: token and value embeddings, which are looked up and never multiplied.
        blocks: matrices of the layers.
        head: from the last layer to the logits.
        small: everything else.
        flops_per_token: forward and backward: 6 per multiplied parameter and 12 C reach per layer (PaLM,
            appendix B), reach being the positions a layer sees.
    """

    tables: int
    blocks: int
    head: int
    small: int
    flops_per_token: int

    @property
    def parameters(self) -> int:
        """All of them."""
        return self.tables + self.blocks + self.head + self.small

    @property
    def scaling_parameters(self) -> int:
        """Those that scaling laws count: the blocks' matrices and the head."""
        return self.blocks + self.head

    @classmethod
    def of(cls, shape: GptShape, vocab_size: int) -> "GptSize":
        """The size of a GPT whose shape has no zeros any more."""
        layers, width = shape.n_layer, shape.n_embd
        kv_width = width // shape.n_head * shape.n_kv_head
        gated = value_embedding_layers(shape)
        rows = padded(vocab_size)
        attention, mlp = 2 * width * (width + kv_width), 8 * width * width
        blocks = layers * (attention + mlp) + gated * VE_GATE_CHANNELS * shape.n_kv_head
        head = rows * width
        reach = sum(min(window, shape.sequence_len) for window in windows(shape))
        return cls(
            tables=rows * (width + gated * kv_width),
            blocks=blocks,
            head=head,
            small=2 * layers + 2 + SMEAR_CHANNELS,  # resid and x0 of every layer, smear, backout
            flops_per_token=6 * (blocks + head + SMEAR_CHANNELS) + 12 * width * reach,
        )


def padded(vocab_size: int) -> int:
    """Rows of embeddings and head: whole blocks of 64, which matrix units like."""
    return -(-vocab_size // 64) * 64


def value_embedding_layers(shape: GptShape) -> int:
    """How many layers have value embeddings: every other one, the last one always."""
    return (shape.n_layer + 1) // 2


def windows(shape: GptShape) -> list[int]:
    """Positions each layer sees behind the current one; S is a quarter, in blocks of 128; the last is L."""
    short = -(-shape.sequence_len // SHORT_WINDOW_DIVISOR // 128) * 128
    pattern = shape.window_pattern.upper()
    letters = [pattern[layer % len(pattern)] for layer in range(shape.n_layer - 1)] + ["L"]
    return [short if letter == "S" else shape.sequence_len for letter in letters]


def vocabulary(tokenizer: TokenizerRecipe) -> int:
    """Ids that a tokenizer has."""
    return BYTES_VOCABULARY if tokenizer.kind == "bytes" else tokenizer.vocab_size


def derive(recipe: Deep) -> Deep:
    """The recipe with every zero filled in from its `depth`; deriving it again changes nothing.

    Raises:
        BadInput: what is stated leaves no whole heads, no whole rows in a batch, or not one step.
    """
    pretrain, ratio = recipe.pretrain, recipe.tokens_per_parameter
    vocab_size = vocabulary(recipe.tokenizer)

    # 1. The shape, wide in proportion to its depth.
    shape = _shape(pretrain.gpt, recipe.depth, recipe.sequence_len)

    # 2. How long: tokens in proportion to the parameters that scale, as Chinchilla found (arXiv 2203.15556).
    length = int(ratio * GptSize.of(shape, vocab_size).scaling_parameters)
    nothing = dataclasses.replace(pretrain.gpt, n_layer=0, n_embd=0, n_head=0, n_kv_head=0)
    reference = _shape(nothing, REFERENCE_DEPTH, shape.sequence_len)
    reference_length = ratio * GptSize.of(reference, vocab_size).scaling_parameters

    # 3. The batch that uses data best grows as length^0.383; in rows a power of two, which cards can share.
    optimum = REFERENCE_BATCH_TOKENS * (length / reference_length) ** BATCH_EXPONENT
    rows = 2 ** max(0, round(math.log2(optimum / shape.sequence_len)))
    batch_tokens = pretrain.batch_tokens or rows * shape.sequence_len
    if batch_tokens % shape.sequence_len:
        raise BadInput(
            f"pretrain.batch_tokens {batch_tokens} is not a whole number of rows of {shape.sequence_len} "
            "tokens; set a multiple of that"
        )

    # 4. Steps: whole batches only. Where they are stated, they say how long the training really is.
    steps = pretrain.steps or length // batch_tokens
    if steps == 0:
        raise BadInput(
            f"tokens_per_parameter {ratio:g} makes {length} tokens, less than one batch of {batch_tokens}; "
            "set more, or pretrain.batch_tokens lower"
        )
    length = steps * batch_tokens if pretrain.steps else length

    # 5. Learning rates go with the square root of the batch, the rule for Adam; the optimizer sees to that.
    #    Weight decay: its time scale, in epochs, stays as batch and length change (arXiv 2405.13698).
    batch_scale = (batch_tokens / REFERENCE_BATCH_TOKENS) ** 0.5
    weight_decay = pretrain.weight_decay or REFERENCE_WEIGHT_DECAY * batch_scale * reference_length / length

    derived = dataclasses.replace(
        recipe,
        pretrain=dataclasses.replace(
            pretrain, gpt=shape, steps=steps, batch_tokens=batch_tokens, weight_decay=weight_decay
        ),
        # 6. Chat goes on in the batches that the learning rates were made for.
        chat=dataclasses.replace(recipe.chat, batch_tokens=recipe.chat.batch_tokens or batch_tokens),
    )
    if isinstance(derived, BaseClimbMixRecipe):
        # 7. As much text as that reads. Were it less, training would read some of it twice.
        chars = 1.0 if recipe.tokenizer.kind == "bytes" else CHARS_PER_TOKEN
        shards = math.ceil(SHARD_MARGIN * length * chars / (1 - CROPPED_SHARE) / SHARD_CHARS)
        num_shards = derived.climbmix.num_shards or min(shards, MAX_SHARDS)
        climbmix = dataclasses.replace(derived.climbmix, num_shards=num_shards)
        return cast(Deep, dataclasses.replace(derived, climbmix=climbmix))
    return derived


def _shape(stated: GptShape, depth: int, sequence_len: int) -> GptShape:
    layers = stated.n_layer or depth
    # 64 channels a layer, in whole heads of 128: the shape that matrix units like.
    width = stated.n_embd or math.ceil(CHANNELS_PER_LAYER * layers / HEAD_DIM) * HEAD_DIM
    heads = stated.n_head or math.ceil(width / HEAD_DIM)
    kv_heads = stated.n_kv_head or heads  # each head its own keys: small models have memory for them
    if width % heads or heads % kv_heads:
        raise BadInput(
            f"pretrain.gpt: a width of {width} in {heads} heads that share {kv_heads} kv heads does not come "
            "out even; set n_embd, n_head and n_kv_head together"
        )
    return dataclasses.replace(
        stated,
        n_layer=layers,
        n_embd=width,
        n_head=heads,
        n_kv_head=kv_heads,
        sequence_len=stated.sequence_len or sequence_len,
    )
