"""Any audio file as a stream of blocks: soundfile for WAV, FLAC, Ogg and MP3, PyAV for WebM, MP4 and AAC.

Only one block is held at a time, whatever the header claims, so memory does not grow with a recording. The
container has been walked before (`omni_model.audio.containers`), and what the decoder gives is counted
against what the file says it has: libsndfile's own words for a damaged file are unreliable.

Axes: n frames of a block, C channels.
"""

import contextlib
import hashlib
import io
import itertools
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

import numpy as np

from omni_model.audio.containers import Container, examine
from omni_model.audio.unusable import Unusable, truncated
from omni_model.config import BadInput

if TYPE_CHECKING:
    import av
    import soundfile

FILE_RATES_HZ = (8_000, 192_000)
MAX_CHANNELS = 8
BLOCK_FRAMES = 1 << 16
PCM16_SCALE = 32_768
INT32_SCALE = 1 << 31
UNKNOWN_FRAMES = 1 << 60  # libsndfile's number for a file that does not say how long it is
MP3_SLACK_FRAMES = 1152  # what decoders may leave out at the ends of an MP3
MAX_UNTITLED_MP3_BYTES = 1 << 29
PYAV_SLACK_S = 0.1  # containers round durations, and codecs start late


@dataclass(frozen=True)
class Sound:
    """A file being read: `blocks` are (n, C) float32 at `rate_hz`, to be taken once and in order.

    Attributes:
        claimed_s: how long the file says it is; 0 where it does not say.
    """

    container: Container
    rate_hz: int
    num_channels: int
    claimed_s: float
    blocks: Iterator[np.ndarray]


@contextlib.contextmanager
def open_sound(source: Path | bytes, name: str) -> Iterator[Sound]:
    """Open an audio file and judge its header; the blocks are judged while they are read.

    Raises:
        Unusable: no audio, cut off, damaged, or a rate or number of channels that is out of bounds.
        BadInput: WebM, MP4 or AAC while the extra `media` is not installed.
    """
    with contextlib.ExitStack() as closing:
        try:
            file: BinaryIO = io.BytesIO(source) if isinstance(source, bytes) else source.open("rb")
            container = examine(closing.enter_context(file), name)
        except OSError as error:
            raise Unusable(
                f"{name} cannot be opened ({error.strerror or error}); give an audio file.", "unreadable"
            ) from None
        file.seek(0)
        if container.pcm16:
            sound = _open_pcm16(file, container, name)
        elif container.form in ("matroska", "mov", "aac"):
            sound = _open_pyav(file, container, name, closing)
        else:
            # A path lets libsndfile read by itself, which is faster than calling back.
            opened = file if isinstance(source, bytes) else os.fsencode(source)
            sound = _open_soundfile(_titled(file, container, name) or opened, container, name, closing)
        low, high = FILE_RATES_HZ
        if not low <= sound.rate_hz <= high:
            raise Unusable(
                f"{name} is sampled at {sound.rate_hz} Hz; {low} to {high} Hz can be read.", "wrong rate"
            )
        if not 1 <= sound.num_channels <= MAX_CHANNELS:
            raise Unusable(
                f"{name} has {sound.num_channels} channels; at most {MAX_CHANNELS} can be read.",
                "too many channels",
            )
        yield sound


def _open_pcm16(file: BinaryIO, container: Container, name: str) -> Sound:
    """16-bit WAV needs no library. These are the corpora's own files: exactly what `to_pcm16` was given."""
    assert container.pcm16 is not None
    rate_hz, num_channels, offset, num_frames = container.pcm16
    file.seek(offset)

    def blocks() -> Iterator[np.ndarray]:
        for first in range(0, num_frames, BLOCK_FRAMES):
            content = file.read(min(BLOCK_FRAMES, num_frames - first) * num_channels * 2)
            pcm = np.frombuffer(content, "<i2").reshape(-1, num_channels)
            yield pcm.astype(np.float32) / np.float32(PCM16_SCALE)

    return Sound(container, rate_hz, num_channels, num_frames / max(rate_hz, 1), blocks())


def _titled(file: BinaryIO, container: Container, name: str) -> BinaryIO | None:
    """An MP3 behind the header it lacks, or None where it lacks none."""
    if not container.mp3_header:
        return None
    if file.seek(0, os.SEEK_END) > MAX_UNTITLED_MP3_BYTES:
        raise Unusable(f"{name} is long and does not say how long; export it again.", "too long")
    file.seek(container.mp3_start)
    return io.BytesIO(container.mp3_header + file.read())


def _open_soundfile(
    opened: BinaryIO | bytes, container: Container, name: str, closing: contextlib.ExitStack
) -> Sound:
    import soundfile  # not at the top: readers of features need no audio library

    class Stream(soundfile.SoundFile):
        """A file read straight on. Else each read ends in a seek, which fails where the length is unknown."""

        def seekable(self) -> bool:
            return False

    try:
        reader = closing.enter_context(Stream(opened))
    except soundfile.LibsndfileError as error:
        raise Unusable(
            f"{name} cannot be read as audio ({_words(error.error_string)}); give WAV, FLAC, OGG or MP3.",
            "not audio",
        ) from None
    claimed = reader.frames if reader.frames < UNKNOWN_FRAMES else 0
    blocks = _soundfile_blocks(reader, container, claimed, name)
    return Sound(container, reader.samplerate, reader.channels, claimed / max(reader.samplerate, 1), blocks)


def _soundfile_blocks(
    reader: "soundfile.SoundFile", container: Container, claimed: int, name: str
) -> Iterator[np.ndarray]:
    import soundfile

    is_flac, done = container.form == "flac", 0
    has_md5 = bool(container.md5) and container.num_bits in (8, 16, 24)
    digest = hashlib.md5(usedforsecurity=False)
    while True:
        try:
            # Integers of a FLAC are what its MD5 is about.
            block = reader.read(BLOCK_FRAMES, dtype="int32" if is_flac else "float32", always_2d=True)
        except soundfile.LibsndfileError as error:
            words = _words(error.error_string)
            raise Unusable(
                f"{name} breaks off after {done} of {claimed} samples ({words}); copy it again.",
                "truncated" if "sync" in words or "seek" in words else "damaged",
            ) from None
        if not len(block):
            break
        done += len(block)
        if is_flac:
            if has_md5:
                digest.update(_packed(block, container.num_bits))
            block = block.astype(np.float32)
            block *= np.float32(1 / INT32_SCALE)
        yield block
    is_mp3 = reader.subtype.startswith("MPEG")  # in a file of its own or in a WAV
    if done < claimed - (MP3_SLACK_FRAMES if is_mp3 else 0):
        raise truncated(name, done, claimed, "samples")
    if has_md5 and digest.digest() != container.md5:
        raise Unusable(f"{name} holds other samples than its checksum says; copy it again.", "lying header")


def _words(message: object) -> str:
    return str(message).removeprefix("Error : ").rstrip(".")


def _packed(block: np.ndarray, num_bits: int) -> bytes:
    """Samples as FLAC's MD5 takes them, little-endian and no wider than they are.

    libsndfile hands them over as the upper bits of int32 (n, C).
    """
    if num_bits == 16:
        return block.astype("<i4", copy=False).view("<i2")[:, 1::2].tobytes()
    return block.astype("<i4", copy=False).view(np.uint8).reshape(-1, 4)[:, 4 - num_bits // 8 :].tobytes()


def _open_pyav(file: BinaryIO, container: Container, name: str, closing: contextlib.ExitStack) -> Sound:
    try:
        import av
    except ImportError:
        raise BadInput(
            f"{name} is WebM, MP4 or AAC, which needs PyAV; pip install 'nanochat-omni[media]', "
            "or convert it to WAV, FLAC, OGG or MP3."
        ) from None
    try:
        # The format is forced: FFmpeg's guess could be a playlist that names other files.
        media = closing.enter_context(av.open(file, "r", format=container.form, metadata_errors="ignore"))
    except (av.FFmpegError, ValueError) as error:
        raise Unusable(
            f"{name} cannot be read as audio ({_words(error)}); convert it.", "not audio"
        ) from None
    frames = _pyav_frames(media, name)
    first = next(frames, None)
    if first is None:
        raise Unusable(f"{name} holds no sound; give a recording.", "not audio")
    stream = media.streams.audio[0]
    claimed_s = 0.0
    if container.form == "mov" and stream.duration and stream.time_base:
        claimed_s = float(stream.duration * stream.time_base)
    if container.form == "matroska" and len(media.streams) == 1:  # else it is about the pictures too
        claimed_s = (media.duration or 0) / av.time_base
    rate_hz, num_channels = first.sample_rate, first.layout.nb_channels

    def blocks() -> Iterator[np.ndarray]:
        done = 0
        for frame in itertools.chain([first], frames):
            if (frame.sample_rate, frame.layout.nb_channels) != (rate_hz, num_channels):
                raise Unusable(f"{name} changes its rate or channels midway; convert it.", "damaged")
            done += frame.samples
            yield _pyav_block(frame)
        if done < (claimed_s - PYAV_SLACK_S) * rate_hz:
            raise truncated(name, done, round(claimed_s * rate_hz), "samples")

    return Sound(container, rate_hz, num_channels, claimed_s, blocks())


def _pyav_frames(media: "av.container.InputContainer", name: str) -> "Iterator[av.AudioFrame]":
    import av

    try:
        if media.streams.audio:
            yield from media.decode(media.streams.audio[0])
    # A damaged packet comes to light as one of many errors, and sometimes as a failed index.
    except (av.FFmpegError, ValueError, IndexError) as error:
        raise Unusable(f"{name} is damaged ({_words(error)}); copy it again.", "damaged") from None


def _pyav_block(frame: "av.AudioFrame") -> np.ndarray:
    """Samples (n, C) float32 of one frame, which holds them by channel or interleaved, as any type."""
    samples = frame.to_ndarray()
    by_time = samples.T if frame.format.is_planar else samples.reshape(-1, frame.layout.nb_channels)
    if by_time.dtype == np.uint8:
        return (by_time.astype(np.float32) - 128) / 128
    scale = 1 if by_time.dtype.kind == "f" else 1 << (8 * by_time.dtype.itemsize - 1)
    return by_time.astype(np.float32) / np.float32(scale)
