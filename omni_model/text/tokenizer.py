"""Text to ids and back, with nanochat's special tokens.

Two kinds share one interface: byte-pair encoding trained on our corpus, with nanochat's split pattern and its
nine special tokens after the merges; and plain UTF-8 bytes. Special tokens never come out of plain text: they
are placed by name only, so no document can forge a turn of the conversation.
"""

import itertools
import json
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from omni_model.artifacts import TextCorpus
from omni_model.config import JSON, BadInput, Runtime, TokenizerRecipe
from omni_model.storage import Workspace
from omni_model.text.corpus import TEXT, read_texts, shard_paths, text_bytes

if TYPE_CHECKING:
    import tokenizers

# nanochat's names in nanochat's order: ids follow the merges in this order.
SPECIAL_TOKENS = (
    "<|bos|>",
    "<|user_start|>",
    "<|user_end|>",
    "<|assistant_start|>",
    "<|assistant_end|>",
    "<|python_start|>",
    "<|python_end|>",
    "<|output_start|>",
    "<|output_end|>",
)
BOS = SPECIAL_TOKENS[0]

# GPT-4's pattern with numbers cut into pairs of digits instead of triples, as nanochat has it.
SPLIT_PATTERN = (
    r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}+|\p{N}{1,2}"
    r"| ?[^\s\p{L}\p{N}]++[\r\n]*|\s*[\r\n]|\s+(?!\S)|\s+"
)

TOKENIZER_FILE = "tokenizer.json"
BATCH_TEXTS = 512
MEASURED_DOCUMENTS = 1000
TOLD_EVERY_CHARS = 5_000_000


class Tokenizer(Protocol):
    """What every room needs of a tokenizer."""

    @property
    def vocab_size(self) -> int: ...

    @property
    def bos_id(self) -> int: ...

    def encode(self, text: str) -> list[int]:
        """Ids of plain text; a special token's name in `text` is spelled out, never a special id."""
        ...

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """The ids of each text, as `encode` makes them."""
        ...

    def decode(self, ids: list[int]) -> str:
        """The text of ids; special ids show as their names, broken UTF-8 as U+FFFD."""
        ...

    def special(self, name: str) -> int:
        """The id of `<|bos|>` and its like.

        Raises:
            BadInput: no such special token.
        """
        ...

    def num_bytes(self, id: int) -> int:
        """UTF-8 bytes of text that an id spells; 0 for a special token."""
        ...


class BpeTokenizer:
    """Byte-pair encoding as read from a `tokenizer.json` of the `tokenizers` library."""

    def __init__(self, model: "tokenizers.Tokenizer") -> None:
        self._model = model
        self._model.encode_special_tokens = True  # the name of a special token in plain text stays plain text
        found = {name: self._model.token_to_id(name) for name in SPECIAL_TOKENS}
        ids = {name: i for name, i in found.items() if i is not None}
        missing = [name for name in SPECIAL_TOKENS if name not in ids]
        if missing:
            raise BadInput(f"tokenizer.json lacks {', '.join(missing)}; train the tokenizer again")
        self._special: dict[str, int] = ids
        self._special_ids = frozenset(ids.values())

    @property
    def vocab_size(self) -> int:
        return int(self._model.get_vocab_size(with_added_tokens=True))

    @property
    def bos_id(self) -> int:
        return self._special[BOS]

    def encode(self, text: str) -> list[int]:
        return list(self._model.encode(text, add_special_tokens=False).ids)

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        # "fast" leaves out where in the text each token stands, which nobody asks for.
        return [list(each.ids) for each in self._model.encode_batch_fast(texts, add_special_tokens=False)]

    def decode(self, ids: list[int]) -> str:
        return str(self._model.decode([int(i) for i in ids], skip_special_tokens=False))

    def special(self, name: str) -> int:
        return _named(self._special, name)

    def num_bytes(self, id: int) -> int:
        # A byte-level vocabulary writes one character for every byte, be the bytes whole UTF-8 or not.
        return 0 if id in self._special_ids else len(self._model.id_to_token(id) or "")


class ByteTokenizer:
    """UTF-8 bytes 0..255 and `<|bos|>` = 256.

    The other eight special tokens are the bytes 0xF8..0xFF, which no UTF-8 text can contain, so 257 ids hold
    whole conversations.
    """

    vocab_size = 257
    bos_id = 256

    def __init__(self) -> None:
        self._special = {BOS: 256} | {name: 0xF8 + i for i, name in enumerate(SPECIAL_TOKENS[1:])}
        self._names = {i: name for name, i in self._special.items()}

    def encode(self, text: str) -> list[int]:
        return list(text.encode("utf-8"))

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        return [self.encode(text) for text in texts]

    def decode(self, ids: list[int]) -> str:
        spelled = b"".join(self._names[i].encode() if i in self._names else bytes([i]) for i in map(int, ids))
        return spelled.decode("utf-8", errors="replace")

    def special(self, name: str) -> int:
        return _named(self._special, name)

    def num_bytes(self, id: int) -> int:
        return 0 if id in self._names else 1


def _named(special: dict[str, int], name: str) -> int:
    if name not in special:
        raise BadInput(f"{name!r} is not a special token; one of {', '.join(special)}")
    return special[name]


def load_tokenizer(directory: Path) -> Tokenizer:
    """The tokenizer in a payload directory.

    Raises:
        BadInput: no `tokenizer.json` there, or not one of ours.
    """
    path = directory / TOKENIZER_FILE
    try:
        text = path.read_text(encoding="utf-8")
        plain = json.loads(text)
    except (FileNotFoundError, json.JSONDecodeError):
        raise BadInput(f"{path} is not a tokenizer; train one first") from None
    if plain == {"kind": "bytes"}:
        return ByteTokenizer()
    import tokenizers

    try:
        model = tokenizers.Tokenizer.from_str(text)
    except Exception as error:  # the Rust library raises bare Exception
        raise BadInput(f"{path} cannot be read by the tokenizers library: {error}") from None
    return BpeTokenizer(model)


def token_bytes(tokenizer: Tokenizer) -> list[int]:
    """UTF-8 bytes that each id spells, 0 for special tokens: what bits per byte are counted by."""
    return [tokenizer.num_bytes(id) for id in range(tokenizer.vocab_size)]


def train_tokenizer(
    recipe: TokenizerRecipe, text: TextCorpus, *, work: Workspace, runtime: Runtime
) -> dict[str, JSON]:
    """Stage: `tokenizer.json` for the corpus. Its figure is measured on validation documents.

    Raises:
        BadInput: a vocabulary too small for 256 bytes and the special tokens, or no whole corpus.
    """
    path = work.out / TOKENIZER_FILE
    if recipe.kind == "bytes":
        path.write_text('{"kind":"bytes"}\n', encoding="utf-8")
        tokenizer: Tokenizer = ByteTokenizer()
    else:
        model = train_bpe(_training_texts(recipe, text, work), recipe.vocab_size)
        plain = json.loads(model.to_str())
        path.write_text(json.dumps(plain, sort_keys=True, ensure_ascii=False) + "\n", encoding="utf-8")
        tokenizer = BpeTokenizer(model)
    held_out = itertools.islice(read_texts(text.out, "validation"), MEASURED_DOCUMENTS)
    sample = [document[: recipe.max_document_chars] for document in held_out]
    num_tokens = sum(map(len, tokenizer.encode_batch(sample)))
    num_bytes = sum(len(document.encode()) for document in sample)
    work.metrics.summary(
        vocab_size=tokenizer.vocab_size, bytes_per_token=round(num_bytes / max(1, num_tokens), 3)
    )
    return {"vocab_size": tokenizer.vocab_size}


def _training_texts(recipe: TokenizerRecipe, text: TextCorpus, work: Workspace) -> Iterator[str]:
    """The starts of the training documents until `max_chars` characters have been read.

    Whoever reads them keeps counts of words alone, so no more than a row group is in memory.
    """
    # Characters are fewer than bytes, and the ends of long documents are left out: at most so much.
    available = sum(text_bytes(path, TEXT) for path in shard_paths(text.out, "train"))
    num_chars, told = 0, 0
    for document in read_texts(text.out, "train"):
        start = document[: min(recipe.max_document_chars, recipe.max_chars - num_chars)]
        num_chars += len(start)
        if num_chars - told >= TOLD_EVERY_CHARS:
            told = num_chars
            work.metrics.log(num_chars, min(recipe.max_chars, available))
        yield start
        if num_chars >= recipe.max_chars:
            return


def train_bpe(texts: Iterable[str], vocab_size: int) -> "tokenizers.Tokenizer":
    """Byte-level BPE with `vocab_size` ids in all: 256 bytes, merges, then the special tokens.

    A corpus with few distinct words yields fewer merges than asked for.
    """
    num_merged = vocab_size - len(SPECIAL_TOKENS)
    if num_merged < 256:
        raise BadInput(
            f"tokenizer.vocab_size {vocab_size} is below {256 + len(SPECIAL_TOKENS)}; use at least 320"
        )
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

    model = Tokenizer(models.BPE())
    split = pre_tokenizers.Split(Regex(SPLIT_PATTERN), behavior="isolated")
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    model.pre_tokenizer = pre_tokenizers.Sequence([split, byte_level])
    model.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=num_merged, initial_alphabet=alphabet, special_tokens=[], show_progress=False
    )
    model.train_from_iterator(_batches(texts), trainer)
    model.add_special_tokens(list(SPECIAL_TOKENS))
    return model


def _batches(texts: Iterable[str]) -> Iterator[list[str]]:
    """Lists of texts: asked for one by one, the library's threads would wait for Python."""
    rest = iter(texts)
    while batch := list(itertools.islice(rest, BATCH_TEXTS)):
        yield batch
