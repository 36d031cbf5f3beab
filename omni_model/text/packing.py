"""Documents into rows of one length, every row starting with a document.

Best fit, as nanochat packs: a row takes the largest waiting document that still fits, the first of equals;
when none fits, the head of the shortest fills the row and its tail is dropped. So no token is padding and
every document is seen from its start. A thousand or more documents wait to be chosen from.

The waiting documents are kept sorted by (length, arrival), so a choice takes two bisections instead of a look
at every document.

Legend: C channels of a document (ids alone: none; ids and a loss mask: 2), n its tokens, T+1 tokens a row;
inputs are row[:-1] and targets row[1:].
"""

from bisect import bisect_left, insort
from collections.abc import Iterator, Sequence

import numpy as np

from omni_model.config import BadInput
from omni_model.text.lessons import Document
from omni_model.text.tokenizer import Tokenizer

BUFFER_DOCUMENTS = 1000  # waiting documents to choose from, refilled before every placement

TokenDocument = tuple[list[int], list[int]]
Place = tuple[int, int, int]  # file, row group and row of a document in its corpus
Batch = list[tuple[np.ndarray, Place | None]]  # documents, each with its place


class Packer:
    """Places documents in rows of `row_tokens`. Its state is the documents that wait, in order of arrival."""

    def __init__(self, row_tokens: int) -> None:
        self.row_tokens = row_tokens
        self._arrived = 0
        self._sorted: list[tuple[int, int]] = []  # (length, arrival) of all that wait
        self._waiting: dict[int, tuple[np.ndarray, Place | None]] = {}  # by arrival, in this order

    def places(self) -> Iterator[Place | None]:
        """Where the documents that wait are from, in order of arrival."""
        return (place for _, place in self._waiting.values())

    def add(self, tokens: np.ndarray, place: Place | None = None) -> None:
        """Let a document of at least one token, (C, n) or (n,) int32, wait."""
        length = tokens.shape[-1]
        if length > self.row_tokens:  # a copy, so that the long document itself need not stay in memory
            tokens = tokens[..., : self.row_tokens].copy()
        self._waiting[self._arrived] = tokens, place
        insort(self._sorted, (length, self._arrived))
        self._arrived += 1

    def rows(self, batches: Iterator[Batch]) -> Iterator[np.ndarray]:
        """Rows (C, T+1) or (T+1,) int32 until all documents are placed; an unfilled last one is left out.

        A batch is asked for whenever fewer than BUFFER_DOCUMENTS wait, before the next one is placed.
        """
        row, filled = np.empty(0), 0
        while self._refill(batches):
            space = self.row_tokens - filled
            part = self._take(space)[..., :space]
            if not filled:
                row = np.empty((*part.shape[:-1], self.row_tokens), np.int32)
            row[..., filled : filled + part.shape[-1]] = part
            filled += part.shape[-1]
            if filled == self.row_tokens:
                yield row
                filled = 0

    def _refill(self, batches: Iterator[Batch]) -> bool:
        """Whether any document waits, now that as many do as there should be, if there are."""
        while len(self._sorted) < BUFFER_DOCUMENTS and (batch := next(batches, None)) is not None:
            for tokens, place in batch:
                self.add(tokens, place)
        return bool(self._sorted)

    def _take(self, space: int) -> np.ndarray:
        """The longest document of at most `space` tokens, else the shortest; the earliest of equals."""
        chosen = 0
        if after := bisect_left(self._sorted, (space + 1, 0)):
            longest = self._sorted[after - 1][0]
            chosen = bisect_left(self._sorted, (longest, 0), hi=after)
        return self._waiting.pop(self._sorted.pop(chosen)[1])[0]


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
    one_by_one: Iterator[Batch] = ([(np.array(document, np.int32), None)] for document in documents)
    rows = list(Packer(row_tokens).rows(one_by_one))
    if not rows:
        raise BadInput(
            f"the text corpus does not fill one row of {row_tokens} tokens; raise text.num_documents"
        )
    ids, masks = np.stack(rows, axis=1)
    return ids, masks
