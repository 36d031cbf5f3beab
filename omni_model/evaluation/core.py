"""CORE: what a base model knows, asked in ways that need no instruction (DCLM, arXiv 2406.11794).

A base model only continues text, so a task is put as text to be continued, behind a few solved examples, and
nothing has to be parsed. Three kinds: *multiple choice*, where one context has several continuations and the
most likely one (mean loss per token) is the answer; *schema*, where several contexts have one continuation
and the context that makes it most likely is; *language modeling*, where every token of the continuation must
be the model's first choice. A task's accuracy is centred, (accuracy - guessing) / (1 - guessing), and CORE is
the mean over the tasks: 0 for guessing, 1 for perfect.

Prompts, draws and verdicts are nanochat's. What differs is how they are computed: the text that the options
of an item share, which is nearly all of it, is read once, and each option goes on from there in a cache.

Legend: P items (or options) that are read from their first token, R options, T tokens, V vocabulary.
"""

import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import takewhile

import torch
import torch.nn.functional as F
from torch import Tensor

from omni_model.config import BadInput
from omni_model.evaluation.core_tasks import LANGUAGE_MODELING, MULTIPLE_CHOICE, SCHEMA, Item, Task
from omni_model.model.gpt import GPT, window_sizes
from omni_model.text.tokenizer import Tokenizer

ORDER_SEED = 1337  # of the items, before they are cut to as many as wanted
EXAMPLES_SEED = 1234  # plus the item's place in that order

# At once: items rendered, positions read, entries of the table of logits, bytes of keys and values.
MAX_ITEMS, MAX_POSITIONS, MAX_LOGITS, MAX_CACHE_BYTES = 256, 2**13, 2**25, 2**29


@dataclass(frozen=True)
class Row:
    """Token ids of an option behind its examples, of which ids[start:] are scored."""

    ids: list[int]
    start: int


@dataclass(frozen=True)
class Scored:
    """Mean loss in nats of a row's scored tokens (nan: there are none); was each the model's first choice?"""

    loss: float
    exact: bool


def in_order(items: Sequence[Item], count: int) -> list[Item]:
    """The items in the order in which they are judged, cut to `count` (0: all)."""
    order = list(items)
    random.Random(ORDER_SEED).shuffle(order)
    return order[:count] if count else order


def judge(
    task: Task,
    items: Sequence[Item],
    gpt: GPT,
    tokenizer: Tokenizer,
    *,
    max_tokens: int,
    progress: Callable[[int], None] = lambda _: None,
) -> list[bool]:
    """Which items a model answers right. The examples of each are drawn from the other items.

    Args:
        max_tokens: rows that are longer lose their beginning.
        progress: told how many items are done, now and then.

    Raises:
        BadInput: too few items for the examples, or one that cannot be scored; the sentence names it.
    """
    verdicts: list[bool] = []
    for first in range(0, len(items), MAX_ITEMS):
        part = range(first, min(first + MAX_ITEMS, len(items)))
        rows = rows_of_items(task, items, part, tokenizer, max_tokens)
        scored = score(gpt, rows)
        verdicts += [is_right(task.kind, items[i].gold, each) for i, each in zip(part, scored, strict=True)]
        progress(part.stop)
    return verdicts


def is_right(kind: str, gold: int, scored: Sequence[Scored]) -> bool:
    """The verdict on an item from the scores of its options; of equal losses the first counts."""
    if kind == LANGUAGE_MODELING:
        return scored[0].exact
    return min(range(len(scored)), key=lambda option: scored[option].loss) == gold


def prompts(task: Task, items: Sequence[Item], index: int) -> list[str]:
    """The texts that an item becomes: one for each option; in language modeling without and with its end.

    Raises:
        BadInput: the task wants more examples than there are other items.
    """
    if task.num_fewshot > len(items) - 1:
        raise BadInput(
            f"{task.label} puts {task.num_fewshot} examples in front of an item and has {len(items)} items; "
            f"judge at least {task.num_fewshot + 1}"
        )
    # Drawn as if from a list without the item itself.
    drawn = random.Random(EXAMPLES_SEED + index).sample(range(len(items) - 1), task.num_fewshot)
    solved = [items[place + (place >= index)] for place in drawn]
    shots = "".join(task.delimiter.join(item.options[item.gold]) + "\n\n" for item in solved)
    texts = [shots + task.delimiter.join(option) for option in items[index].options]
    if task.kind != LANGUAGE_MODELING:
        return texts
    context, _ = items[index].options[0]
    # Without the blank at its end, which belongs to the first token of the continuation.
    return [(shots + context + task.delimiter).strip(), *texts]


def rows_of_items(
    task: Task, items: Sequence[Item], part: range, tokenizer: Tokenizer, max_tokens: int
) -> list[list[Row]]:
    """The rows of some items, every one beginning with <|bos|> unless it is too long and loses its beginning.

    Raises:
        BadInput: see `judge`.
    """
    texts = [prompts(task, items, index) for index in part]
    encoded = iter(tokenizer.encode_batch([text for each in texts for text in each]))
    found = []
    for index, each in zip(part, texts, strict=True):
        where = f"{task.label}, item {index} of those judged"
        rows = rows_of(task.kind, [[tokenizer.bos_id, *next(encoded)] for _ in each])
        if task.kind == LANGUAGE_MODELING and rows[0].start == len(rows[0].ids):
            raise BadInput(
                f"{where}: its continuation {items[index].options[0][1]!r} is no tokens of its own behind "
                "its context; mend it, or use a tokenizer that cuts words apart"
            )
        found.append([_cut(row, max_tokens, where) for row in rows])
    return found


def rows_of(kind: str, tokens: Sequence[list[int]]) -> list[Row]:
    """Rows from the token ids of an item's prompts.

    Scored is, in multiple choice, what follows the ids that all prompts begin with; in a schema, the ids that
    all end with; in language modeling, what the second prompt adds to the first (nothing, where the first is
    not its beginning).
    """
    if kind == MULTIPLE_CHOICE:
        start = common_prefix(tokens)
        return [Row(ids, start) for ids in tokens]
    if kind == SCHEMA:
        length = common_prefix([ids[::-1] for ids in tokens])
        # Prompts that are all alike have no first token with a predecessor: there is nothing to score.
        return [Row(ids, len(ids) - length or len(ids)) for ids in tokens]
    without, whole = tokens
    return [Row(whole, len(without) if whole[: len(without)] == without else len(whole))]


def common_prefix(sequences: Sequence[Sequence[int]]) -> int:
    """How many tokens all sequences begin with."""
    return sum(1 for _ in takewhile(lambda each: len(set(each)) == 1, zip(*sequences, strict=False)))


def _cut(row: Row, max_tokens: int, where: str) -> Row:
    cut = max(0, len(row.ids) - max_tokens)
    if cut and row.start <= cut:
        raise BadInput(
            f"{where}, scores {len(row.ids) - row.start} tokens and the model reads {max_tokens}; "
            "leave the item out or judge a model that reads more"
        )
    return Row(row.ids[cut:], row.start - cut)


# -- the model ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Trunk:
    """Token ids that some rows share, and (place of the row, its ids behind them, first scored) of each."""

    shared: list[int]
    branches: list[tuple[tuple[int, int], list[int], int]]

    @property
    def rest(self) -> int:
        return max(len(ids) for _, ids, _ in self.branches)


@torch.inference_mode()
def score(gpt: GPT, items: Sequence[Sequence[Row]]) -> list[list[Scored]]:
    """The scores of the rows of every item."""
    found: dict[tuple[int, int], Scored] = {}
    trunks = [trunk for number, rows in enumerate(items) for trunk in _trunks(number, rows)]
    for batch in _batches(gpt, trunks):
        found |= _score_batch(gpt, batch)
    return [[found[number, place] for place in range(len(rows))] for number, rows in enumerate(items)]


def _trunks(number: int, rows: Sequence[Row]) -> list[_Trunk]:
    """One trunk for all rows of an item, or one for each where the beginning of one was cut off."""
    shared = min(common_prefix([row.ids for row in rows]), *(row.start for row in rows))
    if shared == 0:
        return [
            _Trunk(row.ids[: row.start], [((number, place), row.ids[row.start :], 0)])
            for place, row in enumerate(rows)
        ]
    branches = [((number, place), row.ids[shared:], row.start - shared) for place, row in enumerate(rows)]
    return [_Trunk(rows[0].ids[:shared], branches)]


def _batches(gpt: GPT, trunks: Sequence[_Trunk]) -> Iterator[list[_Trunk]]:
    """Trunks of similar length together, as many as the limits of this module allow, and at least one."""
    batch: list[_Trunk] = []
    rows = rest = 0
    for trunk in sorted(trunks, key=lambda each: (len(each.shared), each.rest)):
        longest, rest = len(trunk.shared), max(rest, trunk.rest)
        rows += len(trunk.branches)
        fits = (
            (len(batch) + 1) * longest <= MAX_POSITIONS
            and rows * rest * gpt.config.vocab_size <= MAX_LOGITS
            and (len(batch) + 1 + rows) * _cache_bytes(gpt, longest + rest) <= MAX_CACHE_BYTES
        )
        if batch and not fits:
            yield batch
            batch, rows, rest = [], len(trunk.branches), trunk.rest
        batch.append(trunk)
    if batch:
        yield batch


def _cache_bytes(gpt: GPT, capacity: int) -> int:
    """Bytes of a cache's keys and values for one row."""
    slots = sum(min(window + 1, capacity) for window in window_sizes(gpt.config))
    return 2 * slots * gpt.config.n_kv_head * gpt.config.head_dim * gpt.cos.element_size()


def _score_batch(gpt: GPT, trunks: Sequence[_Trunk]) -> dict[tuple[int, int], Scored]:
    """Read every trunk, then go on from it with each of its rows; the last token of a row is never read."""
    device = gpt.cos.device
    branches = [branch for trunk in trunks for branch in trunk.branches]
    owners = torch.tensor([p for p, trunk in enumerate(trunks) for _ in trunk.branches], device=device)
    shared, shared_lengths = _padded([trunk.shared for trunk in trunks], device)
    rest, rest_lengths = _padded([ids for _, ids, _ in branches], device)
    starts = torch.tensor([start for _, _, start in branches], device=device)

    cache = gpt.new_cache(len(trunks), shared.size(1) + rest.size(1))
    logits = gpt(shared, text_lengths=shared_lengths, cache=cache, logits="last")[owners]  # (R, 1, V)
    if rest.size(1) > 1:
        cache = cache.select(owners)
        read = (rest_lengths - 1).clamp_min(0)
        logits = torch.cat([logits, gpt(rest[:, :-1], text_lengths=read, cache=cache)], dim=1)  # (R, T, V)

    losses = F.cross_entropy(logits.flatten(0, 1), rest.flatten(), reduction="none").view_as(rest).double()
    place = torch.arange(rest.size(1), device=device)
    scored = (place >= starts.unsqueeze(1)) & (place < rest_lengths.unsqueeze(1))  # (R, T)
    means = torch.where(scored, losses, 0.0).sum(1) / scored.sum(1)
    exact = ((logits.argmax(-1) == rest) | ~scored).all(1)
    told = zip(branches, means.tolist(), exact.tolist(), strict=True)
    return {key: Scored(mean, right) for (key, _, _), mean, right in told}


def _padded(rows: Sequence[list[int]], device: torch.device) -> tuple[Tensor, Tensor]:
    """(B, T) filled with 0 on the right, T at least 1, and the lengths (B,)."""
    padded = torch.zeros(len(rows), max(1, *map(len, rows)), dtype=torch.long)
    for place, row in enumerate(rows):
        padded[place, : len(row)] = torch.tensor(row)
    return padded.to(device), torch.tensor([len(row) for row in rows], device=device)
