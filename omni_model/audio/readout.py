"""What can be heard in a recording before any model: level, noise, pitch, pace, onsets, band, speech or not.

Everything is measured on the samples as an encoder gets them (16 kHz, one channel). Nothing is learned; each
number is an estimate whose error was measured on clips with a known truth:

| what | how far it can be trusted |
|---|---|
| level | exact; of what sounds, within 0.6 dB in nine clips of ten |
| noise | 0 to 30 dB below a voice or tone: within 2.5 dB in nine of ten; whispers read as noisier |
| pitch | the median of a tone of 90 to 4,000 Hz: within 3 % in 140 of 140 |
| onsets | beeps: all counted, within 10 ms; words: one for a syllable, give or take one in a short phrase |
| speech or not | synthetic voices against tones, noises and beeps: 98 % right, 95 % at 5 dB of noise |

Real voices, music and crowds were not there to be measured: for them these are indications.
"""

import dataclasses
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from omni_model.audio.decoders import open_sound
from omni_model.audio.ingest import MAX_CLIP_S, split
from omni_model.audio.measures import (
    FRAME_RATE_HZ,
    bandwidth_hz,
    clipped_share,
    measure,
    sounds_like_speech,
)
from omni_model.audio.pitch import HOP_SAMPLES
from omni_model.audio.waveform import SAMPLE_RATE_HZ, Recording, read_recording

MAX_LISTEN_S = 3600.0
LOWEST_DB, MAX_SNR_DB = -120.0, 80.0
MAX_VOICE_HZ = 500.0  # what is higher in speech is a hiss
TOO_QUIET_DBFS = -50.0
NOISY_DB, CLEAR_DB = 10.0, 20.0  # in noise, nobody can tell what is missing above
NARROW_HZ = 4_100


@dataclass(frozen=True)
class Pitch:
    """Of the frames that have one: median, 5th and 95th percentile in Hz, and between these in semitones."""

    median_hz: float
    low_hz: float
    high_hz: float
    range_semitones: float


@dataclass(frozen=True)
class Heard:
    """What is heard in a recording.

    Attributes:
        format, rate_hz, num_channels: of the file as it was found.
        rms_dbfs, sounding_dbfs, peak_dbfs: relative to full scale; the root mean square of everything, and
            of what sounds. A full-scale sine has -3 dB.
        snr_db: everything but the steady noise against that noise, at most 80.
        pitch: None where nothing is voiced.
        voiced_share: of the time that sounds.
        pace_hz: onsets per second, from the first to the end of what sounds; in speech, syllables.
        bandwidth_hz: above it nothing stands out; at most the 8,000 Hz that an encoder hears.
        clipped_share: of the samples, those on flat tops.
        num_pieces: how many clips a corpus would make of it.
        changes: what was done to it, as a corpus would count it.
    """

    format: str
    rate_hz: int
    num_channels: int
    duration_s: float
    rms_dbfs: float
    sounding_dbfs: float
    peak_dbfs: float
    snr_db: float
    pitch: Pitch | None
    voiced_share: float
    pace_hz: float
    num_onsets: int
    onsets_s: tuple[float, ...]
    bandwidth_hz: int
    is_speech: bool
    clipped_share: float
    num_pieces: int
    changes: tuple[str, ...]
    warnings: tuple[str, ...] = ()


def listen(source: Path | bytes, name: str = "") -> tuple[Heard, np.ndarray]:
    """What is heard in an audio file of up to an hour, and its samples (N,) at 16 kHz.

    Raises:
        BadInput: the file is missing, no audio, cut off, damaged, silent, too short or too long.
    """
    name = name or (str(source) if isinstance(source, Path) else "the audio")
    recording = read_recording(source, name, max_duration_s=MAX_LISTEN_S)
    with open_sound(source, name) as sound:  # once more, because converting the rate rounds flat tops
        clipped = clipped_share(sound.blocks)
    heard = describe(recording, clipped)
    return dataclasses.replace(heard, warnings=tuple(_warnings(heard))), recording.samples


def describe(recording: Recording, clipped: float) -> Heard:
    """What is heard in a recording with `clipped` of its samples on flat tops, without warnings."""
    samples, levels = recording.samples, recording.levels
    hops = samples[: len(samples) // HOP_SAMPLES * HOP_SAMPLES].reshape(-1, HOP_SAMPLES)
    loudest = float(np.square(hops, dtype=np.float64).mean(axis=1).max())
    cuts = split(samples)
    pieces = [measure(samples[start:stop], loudest) for start, stop in cuts]
    onsets_s = tuple(
        round(start / SAMPLE_RATE_HZ + onset, 3)
        for (start, _), piece in zip(cuts, pieces, strict=True)
        for onset in piece.onsets_s
    )
    sounding = np.concatenate([piece.sounding for piece in pieces])
    power = np.concatenate([piece.power for piece in pieces])
    end_s = (len(sounding) - int(sounding[::-1].argmax())) / FRAME_RATE_HZ
    noise = np.sum([piece.noise * len(piece.power) for piece in pieces], axis=0)
    snr_db = _snr_db(float(power.mean()), float(noise.sum()) / len(power))
    is_speech = sounds_like_speech(pieces, snr_db)
    pitch_hz = np.concatenate([piece.pitch_hz for piece in pieces])
    voiced = sounding[: len(pitch_hz)] & (pitch_hz > 0) & ((pitch_hz < MAX_VOICE_HZ) | (not is_speech))
    return Heard(
        format=levels.form,
        rate_hz=levels.source_rate_hz,
        num_channels=levels.num_channels,
        duration_s=round(len(samples) / SAMPLE_RATE_HZ, 3),
        rms_dbfs=_db(float(np.square(samples, dtype=np.float64).mean())),
        sounding_dbfs=_db(float(power[sounding].mean()) if sounding.any() else 0.0),
        peak_dbfs=_db(float(np.abs(samples).max()) ** 2),
        snr_db=snr_db,
        pitch=_pitch(pitch_hz[voiced]),
        voiced_share=round(float(voiced.sum()) / max(int(sounding.sum()), 1), 3),
        pace_hz=round(len(onsets_s) / max(end_s - onsets_s[0], 0.1), 2) if onsets_s else 0.0,
        num_onsets=len(onsets_s),
        onsets_s=onsets_s,
        bandwidth_hz=bandwidth_hz(
            np.sum([piece.spectrum for piece in pieces], axis=0),
            noise * (sounding.mean() if snr_db > 0 else 0),  # else the noise is what there is to hear
        ),
        is_speech=is_speech,
        clipped_share=round(clipped, 5),
        num_pieces=len(pieces),
        changes=levels.changes,
    )


def _snr_db(total: float, noise: float) -> float:
    signal = max(total - noise, total / 100)
    return round(min(MAX_SNR_DB, 10 * math.log10(signal / max(noise, 1e-20))), 1)


def _db(power: float) -> float:
    return round(max(LOWEST_DB, 10 * math.log10(power)), 1) if power > 0 else LOWEST_DB


def _pitch(voiced_hz: np.ndarray) -> Pitch | None:
    if not len(voiced_hz):
        return None
    low, median, high = (float(hz) for hz in np.percentile(voiced_hz, [5, 50, 95]))
    return Pitch(round(median, 1), round(low, 1), round(high, 1), round(12 * math.log2(high / low), 1))


def _warnings(heard: Heard) -> Iterator[str]:
    """What whoever made the recording may want to know, a few words each."""
    if heard.clipped_share:
        yield f"clipped: {100 * heard.clipped_share:.1f} % of its samples lie on flat tops"
    if heard.sounding_dbfs < TOO_QUIET_DBFS:
        yield f"too quiet: {heard.sounding_dbfs:.0f} dB of full scale where it sounds"
    if heard.is_speech and heard.snr_db < NOISY_DB:
        yield f"noisy: the voice stands {heard.snr_db:.0f} dB above the noise"
    if heard.is_speech and heard.bandwidth_hz <= NARROW_HZ and heard.snr_db > CLEAR_DB:
        yield f"narrow: nothing above {heard.bandwidth_hz:,} Hz, as on a telephone"
    if heard.num_pieces > 1:
        yield f"long: a corpus splits it into {heard.num_pieces} pieces of at most {MAX_CLIP_S:.0f} s"
    told = {
        "mixed down": f"mono from {heard.num_channels} channels",
        "resampled": f"resampled from {heard.rate_hz:,} Hz to {SAMPLE_RATE_HZ:,} Hz",
        "offset removed": "an offset from zero was removed",
        "scaled": "peaks beyond full scale were scaled down to it",
        "length not stated": "the header does not say how long it is",
    }
    yield from (told.get(change, change) for change in heard.changes)
