"""From a recording of any length to clips: cut where it is quietest, every sample kept, memory bounded.

A long recording is cut by looking back from the limit: within the last third before it, the middle of the
quietest fifth of a second. That is a pause where there is one, and else the least audible place. The cuts
depend on nothing but the samples, so they are the same in one piece or in blocks.

The whole recording is decoded once before its first clip is made. Only then is it known whether the file is
whole, and which offset and scale belong to all of it; a file that breaks off gives no clip rather than the
first few. Short ones are remembered from that first pass, long ones are decoded again.

Axes: N samples at 16 kHz, n samples of a block.
"""

import contextlib
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np

from omni_model.audio.clips import Clip, Dropped
from omni_model.audio.decoders import open_sound
from omni_model.audio.unusable import Unusable
from omni_model.audio.waveform import (
    MIN_DURATION_S,
    MIN_PEAK,
    SAMPLE_RATE_HZ,
    Levels,
    raw_blocks,
    survey,
)
from omni_model.config import BadInput

MAX_CLIP_S = 30.0
MAX_RECORDING_S = 24 * 3600.0
MAX_KEPT_S = 600.0  # what one pass remembers: 40 MB
LEAST_CLIP_LIMIT_S = 1.0
SEARCH_SHARE = 3  # the cut lies in the last third before the limit
HOP_SAMPLES = SAMPLE_RATE_HZ // 100
PAUSE_HOPS = 20
MIN_SAMPLES = round(MIN_DURATION_S * SAMPLE_RATE_HZ)


def split(samples: np.ndarray, max_clip_s: float = MAX_CLIP_S) -> list[tuple[int, int]]:
    """Where to cut samples (N,): (start, stop) of consecutive pieces that together are all of them.

    No piece is longer than `max_clip_s`; none is shorter than 0.1 s unless the whole is.

    Raises:
        BadInput: a limit below one second.
    """
    limit, start, pieces = _limit(max_clip_s), 0, []
    while len(samples) - start > limit:
        stop = start + _quietest(samples[start : start + limit])
        pieces.append((start, stop))
        start = stop
    return [*pieces, (start, len(samples))]


def _limit(max_clip_s: float) -> int:
    if max_clip_s < LEAST_CLIP_LIMIT_S:
        raise BadInput(f"max_clip_s is {max_clip_s:g}; clips need at least {LEAST_CLIP_LIMIT_S:g} s.")
    return int(max_clip_s * SAMPLE_RATE_HZ)


def _quietest(samples: np.ndarray) -> int:
    """Where to cut before the end of samples (n,), given that more follow: both sides last at least 0.1 s."""
    first = len(samples) - len(samples) // SEARCH_SHARE
    window = samples[first : len(samples) - MIN_SAMPLES]
    hops = window[: len(window) // HOP_SAMPLES * HOP_SAMPLES].reshape(-1, HOP_SAMPLES)
    power = np.square(hops, dtype=np.float64).sum(axis=1)
    width = min(PAUSE_HOPS, len(power))
    energy = np.convolve(power, np.ones(width), "valid")
    latest = len(energy) - 1 - int(energy[::-1].argmin())  # of equally quiet places, for fewer pieces
    return first + latest * HOP_SAMPLES + width * HOP_SAMPLES // 2


def clips(
    source: Path | bytes, name: str = "", *, max_clip_s: float = MAX_CLIP_S
) -> Iterator[Clip | Dropped]:
    """Every clip of a recording in order, and each piece that holds nothing as Dropped ("silent piece").

    A clip's `changes` say what was done to it, "split" among them; its provenance where it comes from.

    Raises:
        Unusable: the recording as a whole gives nothing; always before the first clip.
        BadInput: a limit below one second, the extra `media` is needed, or the file changes meanwhile.
    """
    limit = _limit(max_clip_s)
    name = name or (str(source) if isinstance(source, Path) else "the audio")
    levels, kept = survey(source, name, max_duration_s=MAX_RECORDING_S, max_kept_s=MAX_KEPT_S)
    origin = {
        "source_format": levels.form,
        "source_rate_hz": levels.source_rate_hz,
        "source_channels": levels.num_channels,
    }
    is_split = levels.num_samples > limit
    start = 0
    for piece in _pieces(map(levels.apply, kept or _again(source, name, levels)), limit):
        start_s, stop_s = start / SAMPLE_RATE_HZ, (start + len(piece)) / SAMPLE_RATE_HZ
        start += len(piece)
        if not is_split:
            yield Clip(piece, provenance=origin, changes=levels.changes)
        elif np.abs(piece).max() < MIN_PEAK:
            yield Dropped(f"{name} from {start_s:.2f} to {stop_s:.2f} s", "silent piece")
        else:
            place = {"start_s": round(start_s, 6)}
            yield Clip(piece, provenance=origin | place, changes=(*levels.changes, "split"))


def _pieces(blocks: Iterable[np.ndarray], limit: int) -> Iterator[np.ndarray]:
    """The pieces of `split`, while no more than a piece and a block are held."""
    held = np.empty(0, np.float32)
    for block in blocks:
        held = np.concatenate([held, block])
        while len(held) > limit:
            cut = _quietest(held[:limit])
            yield held[:cut]
            held = held[cut:]
    yield held


def _again(source: Path | bytes, name: str, levels: Levels) -> Iterator[np.ndarray]:
    """Decode a recording for the second time, and insist that it is the one that was surveyed."""
    count = 0
    with contextlib.suppress(Unusable), open_sound(source, name) as sound:
        for block in raw_blocks(sound, name):
            count += len(block)
            yield block
    if count != levels.num_samples:
        raise BadInput(f"{name} changed while it was read; wait until it is whole and run again.")
