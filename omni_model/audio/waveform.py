"""From any audio file to 16 kHz mono samples and back, and every rate of the audio path, written once.

Whisper looks at 25 ms windows every 10 ms (100 mel frames a second) and its second convolution strides by two
(50 encoder frames a second). A clip is read at its true length: padding to 30 s, as the original program
does, gives other features, since the encoder has no mask.

A stranger's recording is changed as little as possible, and each change has a name: channels are averaged
("mixed down"), the rate is converted ("resampled"), an offset beyond 0.01 is taken away ("offset removed"),
and a peak beyond full scale is brought back to it ("scaled"). Loudness is left alone: it is to be heard.

Axes: N samples, n samples of a block, C channels.
"""

import io
import wave
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from omni_model.audio.decoders import PCM16_SCALE, Sound, open_sound
from omni_model.audio.unusable import Unusable

SAMPLE_RATE_HZ = 16_000
WINDOW_SAMPLES = 400
HOP_SAMPLES = 160
MEL_FRAME_RATE_HZ = SAMPLE_RATE_HZ // HOP_SAMPLES
FRAMES_PER_ENCODER_FRAME = 2
ENCODER_FRAME_RATE_HZ = MEL_FRAME_RATE_HZ // FRAMES_PER_ENCODER_FRAME

MIN_DURATION_S = 0.1
MAX_DURATION_S = 600.0
MIN_PEAK = 1e-4  # -80 dB of full scale: below it a file holds nothing
MAX_PEAK = 2.0**32  # beyond the scale of any integer that was stored as it is: a broken float
MAX_DC = 0.01


@dataclass(frozen=True)
class Levels:
    """What a whole recording tells about itself, and what is done to each of its samples.

    Attributes:
        form: the container, such as "wav" or "mp3".
        num_samples: at 16 kHz.
        offset, scale: samples become (sample - offset) / scale.
        changes: what was or will be done, in words that can be counted.
    """

    form: str
    source_rate_hz: int
    num_channels: int
    num_samples: int
    offset: float
    scale: float
    changes: tuple[str, ...]

    def apply(self, block: np.ndarray) -> np.ndarray:
        """A block (n,) without the offset and within -1..1; the block itself where nothing is to be done."""
        if self.offset:
            block = block - np.float32(self.offset)
        return block / np.float32(self.scale) if self.scale > 1 else block


@dataclass(frozen=True)
class Recording:
    """A whole file as it will be heard: samples (N,) float32 in -1..1 at 16 kHz, and how they came about."""

    samples: np.ndarray
    levels: Levels


def read_recording(
    source: Path | bytes, name: str = "", *, max_duration_s: float = MAX_DURATION_S
) -> Recording:
    """Decode a WAV, FLAC, OGG or MP3 file, or with the extra `media` WebM, MP4 or AAC.

    Args:
        source: a file, or the bytes of one.
        name: what to call it in errors; a path names itself.

    Raises:
        Unusable: unreadable, cut off, damaged, too long, too short, silent, or not finite.
        BadInput: the extra `media` is needed and not installed.
    """
    name = name or (str(source) if isinstance(source, Path) else "the audio")
    levels, blocks = survey(source, name, max_duration_s=max_duration_s, max_kept_s=max_duration_s)
    assert blocks is not None
    return Recording(np.ascontiguousarray(np.concatenate([levels.apply(block) for block in blocks])), levels)


def decode(source: Path | bytes, name: str = "", *, max_duration_s: float = MAX_DURATION_S) -> np.ndarray:
    """Samples (N,) float32 in -1..1 at 16 kHz of any audio file; see `read_recording`."""
    return read_recording(source, name, max_duration_s=max_duration_s).samples


def survey(
    source: Path | bytes, name: str, *, max_duration_s: float, max_kept_s: float
) -> tuple[Levels, list[np.ndarray] | None]:
    """Decode a whole file once, in bounded memory, and say whether and how it can be used.

    Returns:
        Its levels, and its raw blocks at 16 kHz if they last no longer than `max_kept_s`; else None, and
        `raw_blocks` decodes them once more.

    Raises:
        Unusable: as `read_recording`.
    """
    kept: list[np.ndarray] = []
    count, total, low, high = 0, 0.0, np.inf, -np.inf
    with open_sound(source, name) as sound:
        if sound.claimed_s > max_duration_s:
            raise _too_long(name, f"{sound.claimed_s:.0f} s", max_duration_s)
        for block in raw_blocks(sound, name):
            if not len(block):
                continue
            count, total = count + len(block), total + float(block.sum(dtype=np.float64))
            low, high = min(low, float(block.min())), max(high, float(block.max()))
            if count > max_duration_s * SAMPLE_RATE_HZ:
                raise _too_long(name, "longer", max_duration_s)
            if count <= max_kept_s * SAMPLE_RATE_HZ:
                kept.append(block)
            else:
                kept.clear()
    if count < MIN_DURATION_S * SAMPLE_RATE_HZ:
        raise _too_short(name, count)
    offset = total / count if abs(total / count) > MAX_DC else 0.0
    peak = max(high - offset, offset - low)
    if peak > MAX_PEAK:
        raise _not_finite(name)
    if peak < MIN_PEAK:
        raise _silent(name)
    changes = {
        "length not stated": sound.container.unstated,
        "mixed down": sound.num_channels > 1,
        "resampled": sound.rate_hz != SAMPLE_RATE_HZ,
        "offset removed": offset != 0,
        "scaled": peak > 1,
    }
    levels = Levels(
        form=sound.container.form,
        source_rate_hz=sound.rate_hz,
        num_channels=sound.num_channels,
        num_samples=count,
        offset=offset,
        scale=max(peak, 1.0),
        changes=tuple(name for name, done in changes.items() if done),
    )
    return levels, kept if count <= max_kept_s * SAMPLE_RATE_HZ else None


def raw_blocks(sound: Sound, name: str) -> Iterator[np.ndarray]:
    """Blocks (n,) float32 at 16 kHz of a file that is being read, channels averaged, levels as they are.

    The converter keeps its state from block to block, so the result is that of the whole file at once.

    Raises:
        Unusable: a sample is not finite, or the file turns out to be damaged.
    """
    stream = None
    if sound.rate_hz != SAMPLE_RATE_HZ:
        import soxr

        stream = soxr.ResampleStream(sound.rate_hz, SAMPLE_RATE_HZ, 1, dtype="float32", quality="HQ")
    for block in sound.blocks:
        with np.errstate(over="ignore", invalid="ignore"):  # what overflows is refused just below
            mono = block[:, 0] if block.shape[1] == 1 else block.mean(axis=1, dtype=np.float32)
        # One NaN would spread through the converter, and to every frame through the spectrogram's maximum.
        if not np.isfinite(mono).all():
            raise _not_finite(name)
        yield stream.resample_chunk(mono) if stream else mono
    if stream:
        yield stream.resample_chunk(np.empty(0, np.float32), last=True)


def _not_finite(name: str) -> Unusable:
    return Unusable(
        f"{name} holds samples that are not finite numbers; export it again as 16-bit WAV.", "not finite"
    )


def _silent(name: str) -> Unusable:
    return Unusable(f"{name} is silent; give a recording with sound in it.", "silent")


def _too_short(name: str, count: int) -> Unusable:
    lasts = f"lasts {count / SAMPLE_RATE_HZ:.3f} s"
    return Unusable(f"{name} {lasts}; at least {MIN_DURATION_S} s are needed.", "too short")


def _too_long(name: str, length: str, max_duration_s: float) -> Unusable:
    return Unusable(f"{name} lasts {length}; cut it into {max_duration_s:.0f} s pieces.", "too long")


def checked(samples: np.ndarray, name: str = "the audio") -> np.ndarray:
    """Samples (N,) at 16 kHz as contiguous float32, if there is something to hear in them.

    Raises:
        Unusable: shorter than 0.1 s, silent, or not finite.
    """
    if len(samples) < MIN_DURATION_S * SAMPLE_RATE_HZ:
        raise _too_short(name, len(samples))
    if not np.isfinite(samples).all():
        raise _not_finite(name)
    if np.abs(samples).max() < MIN_PEAK:
        raise _silent(name)
    return np.ascontiguousarray(samples, dtype=np.float32)


def to_pcm16(samples: np.ndarray) -> np.ndarray:
    """Float samples in -1..1 as int16; `decode` gives back exactly what it was given for int16 input."""
    return np.clip(np.rint(samples * PCM16_SCALE), -PCM16_SCALE, PCM16_SCALE - 1).astype("<i2")


def encode_wav(samples: np.ndarray) -> bytes:
    """A 16-bit mono 16 kHz WAV file of samples (N,), the same bytes every time."""
    buffer = io.BytesIO()
    with wave.open(buffer, "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(SAMPLE_RATE_HZ)
        file.writeframes(to_pcm16(samples).tobytes())
    return buffer.getvalue()


def num_encoder_frames(num_samples: int) -> int:
    """How many 50 Hz frames a clip of this many samples at 16 kHz has."""
    return num_samples // HOP_SAMPLES // FRAMES_PER_ENCODER_FRAME
