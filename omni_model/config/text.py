"""Recipes of the text side: corpora, public data sets, the tokenizer and the shape of a language model."""

from dataclasses import dataclass

from omni_model.config.base import Recipe, unkeyed
from omni_model.config.outside import OutsideFolder


@dataclass(frozen=True)
class TextRecipe(Recipe):
    """Texts about sounds, voices, words, places and numbers, from the grammars in `omni_model/text`.

    The shares are of the documents: drills that bind letters to words, questions on bare words, questions on
    sentences, and stories (alone, with a question, or drills of their words); what is left are single
    sentences. `validation_documents` are written apart.
    """

    may_be_zero = (*Recipe.may_be_zero, "stories_share")

    num_documents: int = 24_000
    validation_documents: int = 1_000
    letters_share: float = 0.15
    words_share: float = 0.25
    questions_share: float = 0.45
    stories_share: float = 0.05


@dataclass(frozen=True)
class ClimbMixRecipe(Recipe):
    """The first `num_shards` parquet files of ClimbMix (100 MB each) and its last one, for validation.

    0 shards means as many as the training of this depth reads.
    """

    may_be_zero = (*Recipe.may_be_zero, "num_shards")

    num_shards: int = 0


@dataclass(frozen=True)
class MiniatureWebRecipe(Recipe):
    """Texts in the very form of ClimbMix's files: stories, and words that nobody knows.

    The web has more words than any grammar: `strange_words` a document, hardly two alike, so that a tokenizer
    finds as many merges here as it finds there. `validation_documents` are written apart.
    """

    num_documents: int = 2_000
    validation_documents: int = 200
    strange_words: int = 40


@dataclass(frozen=True)
class TextFolderRecipe(Recipe):
    """Texts of your own: any .txt, .jsonl and .parquet (a document a row) below a folder.

    `column` is the field or column that holds the text. A long .txt is cut at its paragraphs. Documents are
    laid in the order of their hashes, which also says which belong to validation.
    """

    folder: OutsideFolder = OutsideFolder()
    column: str = "text"
    validation_share: float = 0.01


@dataclass(frozen=True)
class TokenizerRecipe(Recipe):
    """`bpe` trains on the corpus; `bytes` is UTF-8 plus one beginning-of-sequence token, 257 in all.

    At most `max_chars` characters are read, of each document `max_document_chars`.
    """

    choices = {"kind": ("bpe", "bytes")}

    kind: str = "bpe"
    vocab_size: int = 544
    max_chars: int = 2_000_000_000
    max_document_chars: int = 10_000


@dataclass(frozen=True)
class GptShape(Recipe):
    """Depth and widths of the language model. Zeros are derived from a run's `depth`, where it has one."""

    may_be_zero = (*Recipe.may_be_zero, "n_layer", "n_embd", "n_head", "n_kv_head", "sequence_len")

    n_layer: int
    n_embd: int
    n_head: int
    n_kv_head: int
    sequence_len: int
    window_pattern: str = "L"
    audio_value_embedding: str = "zero"


# Every public set that is known, as `omni_model/text/public_sets.py` finds and reads it.
PUBLIC_SETS = ("smoltalk", "mmlu", "arc-easy", "arc-challenge", "gsm8k", "humaneval")


@dataclass(frozen=True)
class PublicSetsRecipe(Recipe):
    """Conversations and tasks as their makers publish them: parquet files from a mirror, or from `place`.

    `place` holds `NAME/SPLIT.parquet` (or `NAME/SPLIT-00000.parquet` and so on); `digest` says which.
    """

    names: tuple[str, ...] = PUBLIC_SETS
    digest: str = ""
    place: str = unkeyed("")


@dataclass(frozen=True)
class MiniatureSetsRecipe(Recipe):
    """Small sets of our own in the very formats of the public ones, about what the embedded corpus tells."""

    train_rows: int = 6_000
    test_rows: int = 200


@dataclass(frozen=True)
class CoreBundleRecipe(Recipe):
    """CORE's 22 tasks (DCLM, arXiv 2406.11794) as nanochat bundles them: a zip to download, or `place`."""

    sha256: str = ""
    digest: str = ""
    place: str = unkeyed("")


@dataclass(frozen=True)
class MiniatureCoreRecipe(Recipe):
    """Tasks of our own in CORE's format: all three kinds, about what the embedded corpus tells."""

    items_per_task: int = 50


@dataclass(frozen=True)
class ConversationsRecipe(Recipe):
    """What a base model is taught to chat with: how many rows of each set; 0 leaves a set out.

    More rows than a set has means that it is read again, in another order. `identity_rows` are about who
    the model is and come from the repository.
    """

    may_be_zero = (
        *Recipe.may_be_zero,
        "smoltalk_rows",
        "mmlu_rows",
        "arc_rows",
        "gsm8k_rows",
        "identity_rows",
    )

    smoltalk_rows: int = 460_000
    mmlu_rows: int = 200_000
    arc_rows: int = 7_000
    gsm8k_rows: int = 32_000
    identity_rows: int = 2_000
