"""nanochat's `tokenizer.pkl`, a pickled `tiktoken.Encoding`, read and written without tiktoken.

A pickle is a program: plain `pickle.load` calls whatever function the file names. The reader here knows one
name, tiktoken's class, and answers it with an empty class of ours, so that nothing in the file can run.

tiktoken stores no merges, only a rank for every token, and joins the neighbours whose bytes together have the
lowest rank. Our file wants the merges. They follow from the ranks: join a token's bytes under the ranks below
its own, and the two parts that are left are its merge. Where that holds for every token, both ways of
tokenizing make the same ids of every text: a stretch of text that ends as one token is joined as if it
stood alone, so no other two parts of that token ever meet.
"""

import io
import json
import pickle
from collections.abc import Mapping
from itertools import count, pairwise
from pathlib import Path
from typing import Any

from omni_model.artifacts import sha256_file
from omni_model.config import JSON, BadInput, OutsideFile, Runtime, TokenizerImportRecipe
from omni_model.storage import Workspace
from omni_model.text.tokenizer import SPECIAL_TOKENS, SPLIT_PATTERN, TOKENIZER_FILE, train_bpe

Ranks = dict[bytes, int]  # token -> rank, which is its id


def import_tokenizer(recipe: TokenizerImportRecipe, *, work: Workspace, runtime: Runtime) -> dict[str, JSON]:
    """Stage: `tokenizer.json` that makes the same ids as nanochat's `tokenizer.pkl`.

    Raises:
        BadInput: the file changed, is not a pickled encoding, or is not one of nanochat's.
    """
    ranks = read_ranks(unchanged(recipe.pickle))
    text = json.dumps(tokenizer_json(ranks), sort_keys=True, ensure_ascii=False)
    (work.out / TOKENIZER_FILE).write_text(text + "\n", encoding="utf-8")
    return {"vocab_size": len(ranks) + len(SPECIAL_TOKENS)}


def unchanged(file: OutsideFile) -> Path:
    """Where the file lies.

    Raises:
        BadInput: its bytes are not those that the recipe names.
    """
    path = Path(file.path)
    if sha256_file(path) != file.sha256:
        raise BadInput(f"{path} changed while it was being imported; import it again")
    return path


# --- the pickle ----------------------------------------------------------------------------------


class _Encoding:
    """Stands in for `tiktoken.core.Encoding`: keeps the state it is given."""

    state: object = None

    def __setstate__(self, state: object) -> None:
        self.state = state


class _OneNameUnpickler(pickle.Unpickler):
    """Reads a pickle that may name `tiktoken.core.Encoding` and nothing else."""

    def find_class(self, module_name: str, global_name: str) -> Any:
        if (module_name, global_name) != ("tiktoken.core", "Encoding"):
            raise pickle.UnpicklingError(f"it asks for {module_name}.{global_name}")
        return _Encoding


def read_ranks(path: Path) -> Ranks:
    """The ranks in a `tokenizer.pkl`.

    Raises:
        BadInput: it asks for anything but an encoding, is damaged, or is not one of nanochat's.
    """
    try:
        found = _OneNameUnpickler(io.BytesIO(path.read_bytes())).load()
    except OSError:
        raise
    except Exception as error:  # a malformed pickle can raise anything
        raise BadInput(f"{path} is not a pickled tokenizer of nanochat's: {error}") from None
    state = found.state if isinstance(found, _Encoding) else None
    if isinstance(state, str):
        raise BadInput(
            f"{path} only names tiktoken's own {state!r}; a tokenizer that nanochat trained is needed"
        )
    problem = _problem(state)
    if problem:
        raise BadInput(f"{path} is not a tokenizer of nanochat's: {problem}")
    assert isinstance(state, dict)
    return dict(state["mergeable_ranks"])


def _problem(state: object) -> str:
    """What is wrong with the state of an encoding, in words; empty when nothing is."""
    fields = {"name", "pat_str", "mergeable_ranks", "special_tokens"}
    if not isinstance(state, dict) or set(state) != fields:
        return f"it holds {type(state).__name__}, not the four fields of an encoding"
    ranks, special = state["mergeable_ranks"], state["special_tokens"]
    if state["pat_str"] != SPLIT_PATTERN:
        return "it splits text by another pattern"
    if not isinstance(ranks, dict) or any(type(token) is not bytes for token in ranks):
        return "its tokens are not bytes"
    if any(type(rank) is not int for rank in ranks.values()) or set(ranks.values()) != set(range(len(ranks))):
        return "its ranks do not count from 0 without gaps"
    if not all(bytes([byte]) in ranks for byte in range(256)) or b"" in ranks:
        return "it lacks single bytes"
    if special != {name: len(ranks) + i for i, name in enumerate(SPECIAL_TOKENS)}:
        return f"its special tokens are not {', '.join(SPECIAL_TOKENS)}, in this order after the ranks"
    return ""


def pickle_ranks(ranks: Mapping[bytes, int]) -> bytes:
    """A `tokenizer.pkl` that plain `pickle.load` opens where tiktoken is installed."""
    state = {
        "name": "rustbpe",
        "pat_str": SPLIT_PATTERN,
        "mergeable_ranks": dict(sorted(ranks.items(), key=lambda pair: pair[1])),
        "special_tokens": {name: len(ranks) + i for i, name in enumerate(SPECIAL_TOKENS)},
    }
    # Protocol 3 knows bytes and has no frames whose lengths would have to be mended.
    whole = pickle.dumps(state, protocol=3)
    start, body = whole[:2], whole[2:-1]
    name = pickle.GLOBAL + b"tiktoken.core\nEncoding\n"
    return start + name + pickle.EMPTY_TUPLE + pickle.NEWOBJ + body + pickle.BUILD + pickle.STOP


# --- ranks and merges ----------------------------------------------------------------------------


def recover_merges(ranks: Mapping[bytes, int]) -> list[tuple[bytes, bytes]]:
    """The two parts of every token longer than a byte, in the order of the ranks.

    Raises:
        BadInput: a token is not the sum of two tokens that the lower ranks lead to.
    """
    merges = []
    for token, rank in sorted(ranks.items(), key=lambda pair: pair[1]):
        if len(token) > 1:
            parts = _join(token, ranks, rank)
            if len(parts) != 2:
                raise BadInput(
                    f"the tokenizer's token {rank}, {token!r}, is not made of two earlier tokens, "
                    "so no list of merges makes its ids; only tokenizers trained by merging are read"
                )
            merges.append((parts[0], parts[1]))
    return merges


def _join(token: bytes, ranks: Mapping[bytes, int], below: int) -> list[bytes]:
    """The bytes of a token joined by ranks under `below`, lowest first, leftmost among equals."""
    parts = [token[i : i + 1] for i in range(len(token))]
    while len(parts) > 2:
        joined = [left + right for left, right in pairwise(parts)]
        rank, place = min((ranks.get(pair, below), place) for place, pair in enumerate(joined))
        if rank >= below:
            break
        parts[place : place + 2] = [joined[place]]
    return parts


def spelling() -> list[str]:
    """The visible character that stands for each byte in `tokenizer.json`, as GPT-2 chose them."""
    visible = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = count(0x100)
    return [chr(byte if byte in visible else next(others)) for byte in range(256)]


def tokenizer_json(ranks: Mapping[bytes, int]) -> dict[str, Any]:
    """The content of the `tokenizer.json` that makes the ids of these ranks."""
    shown = spelling()

    def spell(token: bytes) -> str:
        return "".join(shown[byte] for byte in token)

    plain: dict[str, Any] = json.loads(train_bpe([], 256 + len(SPECIAL_TOKENS)).to_str())
    plain["model"]["vocab"] = {spell(token): rank for token, rank in ranks.items()}
    plain["model"]["merges"] = [[spell(left), spell(right)] for left, right in recover_merges(ranks)]
    for place, token in enumerate(plain["added_tokens"]):
        token["id"] = len(ranks) + place
    return plain


def ranks_of(directory: Path) -> Ranks:
    """The ranks of a tokenizer payload of ours, for `pickle_ranks`.

    Raises:
        BadInput: the tokenizer is bytes, or tiktoken could not make its ids.
    """
    path = directory / TOKENIZER_FILE
    try:
        plain = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, json.JSONDecodeError):
        raise BadInput(f"{path} is missing or not JSON; name the directory of a tokenizer") from None
    if plain == {"kind": "bytes"}:
        raise BadInput(
            f"{path} is the tokenizer of plain bytes, whose special tokens are bytes themselves, which "
            "tokenizer.pkl cannot say; give --gpt alone to export the weights without a tokenizer"
        )
    bytes_of = {character: byte for byte, character in enumerate(spelling())}
    try:
        vocab = plain["model"]["vocab"]
        ranks = {bytes(bytes_of[c] for c in spelled): int(rank) for spelled, rank in vocab.items()}
        same = tokenizer_json(ranks) == plain
    except (KeyError, TypeError, ValueError, AttributeError):
        same = False
    if not same:
        raise BadInput(f"{path} is not a tokenizer that tiktoken's ranks can say; train one with kind bpe")
    return ranks
