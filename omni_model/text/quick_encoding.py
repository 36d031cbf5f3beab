"""Many texts to ids in the shortest time.

`tokenizers` keeps track of where in the text every token stands, which nobody asks for when a corpus is read.
tiktoken does not and takes a quarter of the time; where a tokenizer's merges follow from its ranks, as those
that we train do, it makes the same ids (`omni_model.text.nanochat_tokenizer` says why).
"""

from collections.abc import Callable, Sequence
from pathlib import Path

from omni_model.config import BadInput
from omni_model.text.nanochat_tokenizer import ranks_of
from omni_model.text.tokenizer import SPECIAL_TOKENS, SPLIT_PATTERN, Tokenizer

# tiktoken gives up on a million spaces in a row: its pattern goes back over them one by one, on a stack.
MAX_CHARS = 100_000

Encode = Callable[[Sequence[str]], list[list[int]]]


def quick_encoder(directory: Path, tokenizer: Tokenizer, threads: int) -> Encode:
    """What `tokenizer.encode_batch` does, for the tokenizer of a payload directory, in `threads` threads.

    Where tiktoken is not installed or cannot make its ids, it is `tokenizer.encode_batch`.
    """
    try:
        import tiktoken

        ranks = ranks_of(directory)
    except (ImportError, BadInput):
        return tokenizer.encode_batch
    special = {name: tokenizer.special(name) for name in SPECIAL_TOKENS}
    encoding = tiktoken.Encoding("ours", pat_str=SPLIT_PATTERN, mergeable_ranks=ranks, special_tokens=special)

    def encode(texts: Sequence[str]) -> list[list[int]]:
        short = [text if len(text) <= MAX_CHARS else "" for text in texts]
        encoded: list[list[int]] = encoding.encode_ordinary_batch(short, num_threads=threads)
        return [
            ids if len(text) <= MAX_CHARS else tokenizer.encode(text)
            for text, ids in zip(texts, encoded, strict=True)
        ]

    return encode
