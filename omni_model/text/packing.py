"""Documents into rows of one length, every row starting with a document.

Best fit, as nanochat packs: a row takes the largest waiting document that still fits, the first of equals;
when none fits, the head of the shortest fills the row and its tail is dropped. So no token is padding and
every document is seen from its start.

Legend: T+1 tokens a row; inputs are row[:-1] and targets row[1:].
"""

from collections.abc import Iterator, Sequence

import numpy as np

from omni_model.config import BadInput
from omni_model.text.corpus import Document
from omni_model.text.tokenizer import Tokenizer

BUFFER_DOCUMENTS = 1000  # waiting documents to choose from, refilled before every placement

TokenDocument = tuple[list[int], list[int]]


def tokenize_document(tokenizer: Tokenizer, document: Document) -> TokenDocument:
    """Ids beginning with `<|bos|>`, and the mask of what is learned: all of a text, the letters of a drill.

    Raises:
        BadInput: an exchange; it is not packed, because its sound stands outside the text.
    """
    if "text" in document:
        ids = [tokenizer.bos_id, *tokenizer.encode(document["text"])]
        return ids, [1] * len(ids)
    if "pairs" not in document:
        raise BadInput(f"only texts and drills are packed, not {document!r}")
    ids = [tokenizer.bos_id, *tokenizer.encode(document["options"] + "\n")]
    mask = [0] * len(ids)
    for pair in document["pairs"]:
        for part, learned in zip(pair, (0, 1), strict=True):
            tokens = tokenizer.encode(f" {part}")
            ids += tokens
            mask += [learned] * len(tokens)
    return ids, mask


def pack(documents: Sequence[TokenDocument], row_tokens: int) -> tuple[np.ndarray, np.ndarray]:
    """Full rows (N, row_tokens) int32 of ids and of masks. The last, unfilled row is left out.

    Raises:
        BadInput: too little text for one row.
    """
    rows = list(_fill_rows(documents, row_tokens))
    if not rows:
        raise BadInput(
            f"the text corpus does not fill one row of {row_tokens} tokens; raise text.num_documents"
        )
    ids, masks = zip(*rows, strict=True)
    return np.array(ids, dtype=np.int32), np.array(masks, dtype=np.int32)


def _fill_rows(documents: Sequence[TokenDocument], row_tokens: int) -> Iterator[TokenDocument]:
    buffer: list[TokenDocument] = []
    upcoming = iter(documents)
    row: TokenDocument = ([], [])
    while True:
        while len(buffer) < BUFFER_DOCUMENTS and (document := next(upcoming, None)) is not None:
            buffer.append(document)
        if not buffer:
            return
        space = row_tokens - len(row[0])
        ids, mask = buffer.pop(_choose([len(ids) for ids, _ in buffer], space))
        row[0].extend(ids[:space])
        row[1].extend(mask[:space])
        if len(row[0]) == row_tokens:
            yield row
            row = ([], [])


def _choose(lengths: list[int], space: int) -> int:
    """Index of the largest length that fits, else of the shortest; the first among equals."""
    fitting = [length for length in lengths if length <= space]
    return lengths.index(max(fitting) if fitting else min(lengths))
