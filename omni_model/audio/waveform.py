"""From any audio file to 16 kHz mono samples and back, and every rate of the audio path, written once.

Whisper looks at 25 ms windows every 10 ms (100 mel frames a second) and its second convolution strides by two
(50 encoder frames a second). A clip is read at its true length: padding to 30 s, as the original program
does, gives other features, since the encoder has no mask.

Axes: N samples.
"""

import io
import wave
from pathlib import Path

import numpy as np

from omni_model.config import BadInput

SAMPLE_RATE_HZ = 16_000
WINDOW_SAMPLES = 400
HOP_SAMPLES = 160
MEL_FRAME_RATE_HZ = SAMPLE_RATE_HZ // HOP_SAMPLES
FRAMES_PER_ENCODER_FRAME = 2
ENCODER_FRAME_RATE_HZ = MEL_FRAME_RATE_HZ // FRAMES_PER_ENCODER_FRAME

MIN_DURATION_S = 0.1
MAX_DURATION_S = 600.0
MIN_PEAK = 1e-4  # -80 dB of full scale: below it a file holds nothing
MAX_DC = 0.01
FILE_RATES_HZ = (8_000, 192_000)
MAX_CHANNELS = 8
PCM16_SCALE = 32_768


def decode(source: Path | bytes, name: str = "", *, max_duration_s: float = MAX_DURATION_S) -> np.ndarray:
    """Samples (N,) float32 in -1..1 at 16 kHz of a WAV, FLAC, OGG or MP3 file, channels averaged.

    Args:
        source: a file, or the bytes of one.
        name: what to call it in errors; a path names itself.

    Raises:
        BadInput: unreadable, cut off, too long, too short, silent, or not finite.
    """
    name = name or (str(source) if isinstance(source, Path) else "the audio")
    try:
        content = source if isinstance(source, bytes) else source.read_bytes()
    except OSError as error:
        raise BadInput(f"{name} cannot be opened ({error.strerror}); give an audio file.") from None
    samples, rate_hz = _read(content, name, max_duration_s)
    if not np.isfinite(samples).all():
        raise BadInput(f"{name} holds samples that are not finite numbers; export it again as 16-bit WAV.")
    mono = samples.mean(axis=1, dtype=np.float32)
    if rate_hz != SAMPLE_RATE_HZ:
        import soxr

        mono = soxr.resample(mono, rate_hz, SAMPLE_RATE_HZ, quality="HQ")
    return checked(_tamed(mono), name)


def _read(content: bytes, name: str, max_duration_s: float) -> tuple[np.ndarray, int]:
    """Samples (N, channels) float32 and their rate. The header is judged before anything is decoded."""
    import soundfile  # not at the top: readers of features need no audio library

    if not content:
        raise BadInput(f"{name} is empty; give a WAV, FLAC, OGG or MP3 file.")
    low, high = FILE_RATES_HZ
    try:
        header = soundfile.info(io.BytesIO(content))
        if not low <= header.samplerate <= high or header.channels > MAX_CHANNELS:
            raise BadInput(
                f"{name} has {header.channels} channels at {header.samplerate} Hz; "
                f"at most {MAX_CHANNELS} channels at {low} to {high} Hz can be read."
            )
        if header.duration > max_duration_s:
            raise BadInput(
                f"{name} lasts {header.duration:.0f} s; cut it into {max_duration_s:.0f} s pieces."
            )
        samples, rate_hz = soundfile.read(io.BytesIO(content), dtype="float32", always_2d=True)
    except soundfile.LibsndfileError as error:
        reason = error.error_string.rstrip(".")
        raise BadInput(f"{name} cannot be read as audio ({reason}); give WAV, FLAC, OGG or MP3.") from None
    if len(samples) < header.frames:
        raise BadInput(f"{name} ends after {len(samples)} of {header.frames} samples; copy it again.")
    return samples, rate_hz


def _tamed(samples: np.ndarray) -> np.ndarray:
    """Without an offset, and within -1..1. Loudness is left alone: it is something to hear."""
    if not len(samples):
        return samples
    if abs(offset := float(samples.mean())) > MAX_DC:
        samples = samples - np.float32(offset)
    peak = float(np.abs(samples).max())
    return samples / np.float32(peak) if peak > 1 else samples


def checked(samples: np.ndarray, name: str = "the audio") -> np.ndarray:
    """Samples (N,) at 16 kHz as contiguous float32, if there is something to hear in them.

    Raises:
        BadInput: shorter than 0.1 s, silent, or not finite.
    """
    if len(samples) < MIN_DURATION_S * SAMPLE_RATE_HZ:
        raise BadInput(
            f"{name} lasts {len(samples) / SAMPLE_RATE_HZ:.3f} s; at least {MIN_DURATION_S} s are needed."
        )
    # One NaN would spread to every frame through the spectrogram's maximum.
    if not np.isfinite(samples).all():
        raise BadInput(f"{name} holds samples that are not finite numbers; export it again as 16-bit WAV.")
    if np.abs(samples).max() < MIN_PEAK:
        raise BadInput(f"{name} is silent; give a recording with sound in it.")
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
