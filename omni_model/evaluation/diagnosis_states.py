"""What passes through a listener: the rows that clips and texts become, at chosen depths of the GPT.

Depth 0 is what the table of embeddings, or the projector, hands over; depth k is the stream behind layer k.
Rows are told as they are, with their length, because a layer reads them normed and adds to them unnormed.
Clips are heard without any text: a layer looks back only, so none behind them could change their rows.

Legend: B batch, F frames, D frame width, S positions, C model width, n soft tokens or tokens of a text.
"""

import contextlib
from collections.abc import Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from omni_model.audio.reader import FeatureReader
from omni_model.model.omni import OmniModel, Sounds
from omni_model.model.projector import NUM_MARKERS
from omni_model.text.tokenizer import Tokenizer

BATCH_FRAMES = 32_768  # of a batch of clips, padding included
BATCH_TOKENS = 8192  # of a batch of texts
EPSILON = 1e-12

Name = TypeVar("Name", str, int)


@dataclass(frozen=True)
class Reading:
    """A text to be read: its ids, and where the part begins whose rows are wanted."""

    ids: list[int]
    first: int


@dataclass(frozen=True)
class Heard:
    """A clip on its way in: frames (F, D), and by depth its rows (n, C) without markers."""

    key: str
    frames: np.ndarray
    rows: Mapping[int, np.ndarray]


class Cloud:
    """Points of one kind at one depth, each the mean of normed rows, and how long the rows were before."""

    def __init__(self) -> None:
        self._points: dict[Hashable, np.ndarray] = {}
        self._squares, self._numbers = 0.0, 0

    def add(self, name: Hashable, rows: np.ndarray) -> None:
        """One more point, from rows (n, C)."""
        self._points[name] = normed(rows).mean(axis=0)
        self._squares += float(np.square(rows, dtype=np.float64).sum())
        self._numbers += rows.size

    def points(self, names: Iterable[Hashable]) -> np.ndarray:
        """(N, C) float64, in the order of the names."""
        return np.stack([self._points[name] for name in names])

    @property
    def rms(self) -> float:
        """Root mean square of all numbers in the rows, before the norm."""
        return float(np.sqrt(self._squares / max(self._numbers, 1)))


def normed(rows: np.ndarray) -> np.ndarray:
    """Rows (n, C) of root mean square 1 each, float64: what a layer reads."""
    rows = rows.astype(np.float64)
    return np.asarray(rows / np.sqrt(np.square(rows).mean(axis=1, keepdims=True) + EPSILON))


def depths_of(num_layers: int) -> tuple[int, ...]:
    """The input, a quarter and half of the way, and the last layer, without what coincides."""
    return tuple(sorted({0, num_layers // 4, middle_of(num_layers), num_layers}))


def middle_of(num_layers: int) -> int:
    """The depth half of the way through."""
    return max(1, num_layers // 2)


def depth_name(depth: int, num_layers: int) -> str:
    """A depth in words."""
    if depth == 0:
        return "input"
    return "last layer" if depth == num_layers else f"after {depth} of {num_layers} layers"


@torch.inference_mode()
def hear_clips(
    model: OmniModel, features: FeatureReader, clips: Sequence[Mapping[str, Any]], depths: Sequence[int]
) -> Iterator[Heard]:
    """Every clip once, shortest first, in batches; `clips` are metadata with `key` and `num_frames`."""
    device = model.gpt.cos.device
    for keys in batches({clip["key"]: clip["num_frames"] for clip in clips}, BATCH_FRAMES):
        frames, padded, counts = load_frames(features, keys, device)
        with outputs_of(_entries(model, depths, model.projector)) as seen:
            model(
                torch.zeros((len(keys), 0), dtype=torch.long, device=device),
                sounds=Sounds.in_front(padded, counts),
                logits="last",
            )
        ends = (model.projector.output_lengths(counts) - NUM_MARKERS // 2).tolist()
        streams = {depth: stream.float().cpu().numpy() for depth, stream in seen.items()}
        for place, (key, clip, end) in enumerate(zip(keys, frames, ends, strict=True)):
            rows = {d: stream[place, NUM_MARKERS // 2 : end] for d, stream in streams.items()}
            yield Heard(key, clip, rows)


def load_frames(
    features: FeatureReader, keys: Sequence[str], device: torch.device
) -> tuple[list[np.ndarray], Tensor, Tensor]:
    """Frames (F, D) of each clip; the same as one batch (B, F, D) on the device, with its lengths (B,)."""
    frames = [features.frames(key) for key in keys]
    padded = pad_sequence([torch.from_numpy(each) for each in frames], batch_first=True).to(device)
    return frames, padded, torch.tensor([len(each) for each in frames], device=device)


@torch.inference_mode()
def read_texts(
    model: OmniModel, readings: Sequence[Reading], depths: Sequence[int]
) -> list[dict[int, np.ndarray]]:
    """By depth the rows (n, C) of each reading's wanted part, in the order given."""
    device = model.gpt.cos.device
    found: dict[int, dict[int, np.ndarray]] = {}
    for numbers in batches({number: len(each.ids) for number, each in enumerate(readings)}, BATCH_TOKENS):
        ids = [torch.tensor(readings[number].ids) for number in numbers]
        lengths = torch.tensor([len(each) for each in ids], device=device)
        with outputs_of(_entries(model, depths, model.gpt.transformer["wte"])) as seen:
            model(pad_sequence(ids, batch_first=True).to(device), text_lengths=lengths, logits="last")
        streams = {depth: stream.float().cpu().numpy() for depth, stream in seen.items()}
        for place, number in enumerate(numbers):
            first, end = readings[number].first, len(readings[number].ids)
            found[number] = {depth: stream[place, first:end] for depth, stream in streams.items()}
    return [found[number] for number in range(len(readings))]


def reading_of(tokenizer: Tokenizer, text: str, carrier: str = "", limit: int | None = None) -> Reading:
    """`text` behind <|bos|> and the carrier's words; its first `limit` tokens, if it has more."""
    before = [tokenizer.bos_id, *tokenizer.encode(carrier)]
    return Reading([*before, *tokenizer.encode(f" {text}" if carrier else text)[:limit]], len(before))


@contextlib.contextmanager
def outputs_of(modules: Mapping[int, nn.Module]) -> Iterator[dict[int, Tensor]]:
    """What each module gave last, by its number, while the context is open; of several values the first."""
    seen: dict[int, Tensor] = {}

    def keep(number: int, output: Tensor | tuple[Tensor, ...]) -> None:
        seen[number] = output[0] if isinstance(output, tuple) else output

    hooks = [
        module.register_forward_hook(lambda _module, _inputs, output, number=number: keep(number, output))
        for number, module in modules.items()
    ]
    try:
        yield seen
    finally:
        for hook in hooks:
            hook.remove()


def batches(lengths: Mapping[Name, int], budget: int) -> Iterator[list[Name]]:
    """Names in batches of similar length, shortest first; a batch fills `budget` places, padding included."""
    batch: list[Name] = []
    for name in sorted(lengths, key=lambda name: (lengths[name], name)):
        if batch and (len(batch) + 1) * lengths[name] > budget:
            yield batch
            batch = []
        batch.append(name)
    if batch:
        yield batch


def _entries(model: OmniModel, depths: Sequence[int], entry: nn.Module) -> dict[int, nn.Module]:
    """The module whose output is the stream at each depth; `entry` is that of depth 0."""
    layers: Any = model.gpt.transformer["h"]
    return {depth: layers[depth - 1] if depth else entry for depth in depths}
