"""Recipes of the text side."""

from dataclasses import dataclass

from omni_model.config.base import Recipe


@dataclass(frozen=True)
class TextRecipe(Recipe):
    """Sentences and questions about sounds, written from the grammar in `omni_model/text/grammar.json`."""

    num_documents: int = 24_000
    letters_share: float = 0.15
    words_share: float = 0.25
    questions_share: float = 0.45


@dataclass(frozen=True)
class TokenizerRecipe(Recipe):
    """`bpe` trains on the corpus; `bytes` is UTF-8 plus one beginning-of-sequence token, 257 in all."""

    choices = {"kind": ("bpe", "bytes")}

    kind: str = "bpe"
    vocab_size: int = 544


@dataclass(frozen=True)
class GptShape(Recipe):
    """Depth and widths of the language model."""

    n_layer: int
    n_embd: int
    n_head: int
    n_kv_head: int
    sequence_len: int
    window_pattern: str = "L"
    audio_value_embedding: str = "zero"
