"""What of a sound can be measured without any model: spectra, steady noise, onsets, timbre, flat tops, band.

Everything is an estimate from 32 ms of sound every 10 ms, made for clips whose truth is known and measured on
them; `readout` says how far each can be trusted.

Axes: N samples, F frames (100 Hz), P frequencies (257 from 0 to 8 kHz), B bands of the ear.
"""

import functools
import math
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from omni_model.audio.pitch import HOP_SAMPLES, pitch_track
from omni_model.audio.waveform import SAMPLE_RATE_HZ

FRAME_RATE_HZ = SAMPLE_RATE_HZ // HOP_SAMPLES
WINDOW_SAMPLES = 512
HZ_PER_BIN = SAMPLE_RATE_HZ / WINDOW_SAMPLES
NUM_BANDS, LOWEST_BAND_HZ, HIGHEST_BAND_HZ = 24, 60, 7_600

SOUNDING_DB = 30.0  # what is further below the loudest frame does not count as sounding
OVER_NOISE = 2.0
NOISE_QUANTILE, NOISE_SMOOTHING_FRAMES, NOISE_SMOOTHING_BINS = 0.05, 5, 12
NOISE_QUANTILE_SHARE = 0.335  # of white noise's power, what so smoothed a quantile gives
ONSET_DB, ONSET_FLOOR_DB, ONSET_NOISE_DB = 9.0, 30.0, 3.0

TIMBRE_FLOOR_DB = 50.0
NUM_PARTIAL_BINS = 12
MIN_TIMBRE_MOTION_DB, MAX_PARTIALS_SHARE = 4.2, 0.98
VOICE_SPREAD_NATS, MIN_TIMBRE_CHANGE = (1.45, 2.35), 0.15

BAND_DB, BAND_STEP_HZ = 60.0, 100
FLAT_TOP_SHARE, MIN_FLAT_TOP_SAMPLES = 0.05, 3
MIN_CLIPPED_SHARE, FLAT_TOP_EXCESS = 1e-3, 3.0


@dataclass(frozen=True)
class Piece:
    """A piece of a recording, measured every 10 ms.

    Attributes:
        power: (F,) mean square.
        sounding: (F,) whether it is more than noise and pause.
        noise: (P,) power of the steady noise below each frame.
        spectrum: (P,) power, summed over the frames that sound.
        bands_db: (F, B), everything near the noise raised to one floor.
        clean_bands: (F, B) power above the noise.
        partials: (F,) share of the power that the twelve strongest of the P frequencies have.
        pitch_hz: (F,), 0 where there is none.
        onsets_s: since the piece began.
    """

    power: np.ndarray
    sounding: np.ndarray
    noise: np.ndarray
    spectrum: np.ndarray
    bands_db: np.ndarray
    clean_bands: np.ndarray
    partials: np.ndarray
    pitch_hz: np.ndarray
    onsets_s: tuple[float, ...]


def measure(samples: np.ndarray, loudest: float) -> Piece:
    """Measure samples (N,) at 16 kHz; `loudest` is the mean square of the loudest 10 ms of the recording."""
    spectra = power_spectra(samples)
    noise = noise_spectrum(spectra)
    power, faintest = spectra.sum(axis=1), loudest / 10 ** (SOUNDING_DB / 10)
    sounding = power > max(faintest, OVER_NOISE * float(noise.sum()))
    if not sounding.any():  # it is all noise, or a pause
        sounding = power > faintest
    bands, quiet = spectra @ mel_bands(NUM_BANDS).T, OVER_NOISE * noise @ mel_bands(NUM_BANDS).T
    lowest = np.maximum(quiet, bands.max() / 10 ** (TIMBRE_FLOOR_DB / 10))
    strongest = -np.partition(-spectra, NUM_PARTIAL_BINS, axis=1)[:, :NUM_PARTIAL_BINS].sum(axis=1)
    return Piece(
        power=power,
        sounding=sounding,
        noise=noise,
        spectrum=spectra[sounding].sum(axis=0),
        bands_db=decibels(np.maximum(bands, lowest)),
        clean_bands=np.maximum(spectra - OVER_NOISE * noise, 0) @ mel_bands(NUM_BANDS).T,
        partials=strongest / np.maximum(power, 1e-20),
        pitch_hz=pitch_track(samples),
        onsets_s=tuple(frame / FRAME_RATE_HZ for frame in onset_frames(power, float(noise.sum()))),
    )


def decibels(power: np.ndarray) -> np.ndarray:
    """10 log10 of a power of any shape; nothing at all is -200 dB."""
    return np.asarray(10 * np.log10(power + 1e-20))


def power_spectra(samples: np.ndarray) -> np.ndarray:
    """Power (F, P) of 32 ms around every 10 ms of samples (N,); a frame's add up to its mean square."""
    window = np.hanning(WINDOW_SAMPLES + 2)[1:-1]
    # Mirrored, because a sound that begins or ends at full strength would click against silence.
    padded = np.pad(samples, WINDOW_SAMPLES // 2, mode="reflect")
    frames = np.lib.stride_tricks.sliding_window_view(padded, WINDOW_SAMPLES)[::HOP_SAMPLES]
    frames = frames[: max(1, len(samples) // HOP_SAMPLES)]
    power = np.square(np.abs(np.fft.rfft(frames * window)))
    power *= 2 / (WINDOW_SAMPLES * np.square(window).sum())
    power[:, [0, -1]] /= 2  # all others stand for a negative frequency too
    return power


@functools.cache
def mel_bands(num_bands: int) -> np.ndarray:
    """Triangular filters (B, P), evenly spaced on the mel scale from 60 to 7,600 Hz (O'Shaughnessy 1987)."""
    low, high = (2595 * math.log10(1 + hz / 700) for hz in (LOWEST_BAND_HZ, HIGHEST_BAND_HZ))
    edges_hz = 700 * (10 ** (np.linspace(low, high, num_bands + 2) / 2595) - 1)
    hz = np.arange(WINDOW_SAMPLES // 2 + 1) * HZ_PER_BIN
    # No narrower than the spectrum can tell apart.
    below, above = (
        np.maximum(step, HZ_PER_BIN)[:, None] for step in (np.diff(edges_hz)[:-1], np.diff(edges_hz)[1:])
    )
    centre = edges_hz[1:-1, None]
    return np.maximum(0, np.minimum(1 - (centre - hz) / below, 1 - (hz - centre) / above))


def noise_spectrum(spectra: np.ndarray) -> np.ndarray:
    """Power (P,) of the steady noise below spectra (F, P), by each frequency's quietest moments.

    Source: Martin 2001, "Noise power spectral density estimation based on optimal smoothing and minimum
    statistics", simplified to a quantile; the median over neighbours steps over the lines of steady tones.
    """
    width = min(NOISE_SMOOTHING_FRAMES, len(spectra))
    sums = np.cumsum(np.pad(spectra, ((1, 0), (0, 0))), axis=0)
    smooth = np.maximum(sums[width:] - sums[:-width], 0) / width
    quietest = np.quantile(smooth, NOISE_QUANTILE, axis=0)
    padded = np.pad(quietest, NOISE_SMOOTHING_BINS, mode="edge")
    neighbours = np.lib.stride_tricks.sliding_window_view(padded, 2 * NOISE_SMOOTHING_BINS + 1)
    return np.asarray(np.median(neighbours, axis=1) / NOISE_QUANTILE_SHARE)


def onset_frames(power: np.ndarray, noise: float) -> list[float]:
    """Where power (F,) rises by 9 dB or more from a dip to a peak: its steepest moment, in frames.

    Rises within the noise are none: all that is near it, or 30 dB below the loudest, is one floor.
    """
    level = decibels(power)
    floor = max(float(level.max()) - ONSET_FLOOR_DB, 10 * math.log10(noise + 1e-20) + ONSET_NOISE_DB)
    level = np.maximum(level, min(floor, float(level.max()) - ONSET_DB))
    found: list[tuple[int, int]] = []
    dip = peak = 0
    rising = False
    for frame, value in enumerate(level):
        if not rising and value <= level[dip]:
            dip = frame
        elif not rising and value >= level[dip] + ONSET_DB:
            rising, peak = True, frame
        elif rising and value > level[peak]:
            peak = frame
        elif rising and value <= level[peak] - ONSET_DB:
            found.append((dip, peak))
            rising, dip = False, frame
    if rising:
        found.append((dip, peak))
    return [dip + int(np.diff(level[dip : peak + 1]).argmax()) + 0.5 for dip, peak in found]


def sounds_like_speech(pieces: Iterable[Piece], snr_db: float) -> bool:
    """A rule of thumb, by timbre: how power is shared among bands of the ear, the frame's own level aside.

    It is speech if it stands above the noise, and either its timbre moves (each band varies by 4.2 dB or more
    on average) while it is not made of a few partials alone, or its power spreads over about as many bands as
    a voice's formants do (an entropy of 1.45 to 2.35 nats: tones have less, noises more) and not always the
    same ones.
    """
    heard = [piece for piece in pieces if piece.sounding.any()]
    if snr_db <= 0 or not heard:
        return False
    bands_db = np.concatenate([piece.bands_db[piece.sounding] for piece in heard])
    timbre_db = bands_db - bands_db.mean(axis=1, keepdims=True)
    partials = np.median(np.concatenate([piece.partials[piece.sounding] for piece in heard]))
    if timbre_db.std(axis=0).mean() >= MIN_TIMBRE_MOTION_DB and partials < MAX_PARTIALS_SHARE:
        return True
    bands = np.concatenate([piece.clean_bands[piece.sounding] for piece in heard])
    share = bands / np.maximum(bands.sum(axis=1, keepdims=True), 1e-20)
    spread_nats = -(share * np.log(share + 1e-12)).sum(axis=1).mean()
    change = np.abs(share - share.mean(axis=0)).sum(axis=1).mean() / 2
    low, high = VOICE_SPREAD_NATS
    return bool(low < spread_nats < high and change > MIN_TIMBRE_CHANGE)


def bandwidth_hz(spectrum: np.ndarray, noise: np.ndarray) -> int:
    """The end of the highest 100 Hz of a spectrum (P,) that stand out of its noise (P,).

    To stand out is to have twice the noise's power and no less than 60 dB below the strongest 100 Hz.
    """
    step = (np.arange(len(spectrum)) * HZ_PER_BIN // BAND_STEP_HZ).astype(int)
    steps, quiet = np.bincount(step, weights=spectrum), np.bincount(step, weights=noise)
    found = np.flatnonzero((steps > steps.max() / 10 ** (BAND_DB / 10)) & (steps > OVER_NOISE * quiet))
    return int(min((found[-1] + 1) * BAND_STEP_HZ, SAMPLE_RATE_HZ // 2)) if len(found) else 0


def clipped_share(blocks: Iterable[np.ndarray]) -> float:
    """Share of samples, in blocks (n, channels), on the flat tops that too much gain leaves; 0 if none are.

    A flat top is three or more samples in a row within 5 % of the peak. A slow wave has such rows too, but
    then many samples within the next 5 %, which clipping leaves nearly empty. Noise that came later hides
    flat tops: of speech clipped by 12 to 20 dB all is told where it lies 35 dB above such noise, 72 % in all.
    """
    peak, top, below, count = 0.0, 0, 0, 0
    for block in blocks:
        size = np.abs(block)
        count += size.size
        if (highest := float(size.max(initial=0))) > peak:  # what was counted was no top
            peak, top, below = highest, 0, 0
        high = size > (1 - FLAT_TOP_SHARE) * peak
        rows = high[2:] & high[1:-1] & high[:-2]
        in_row = np.zeros_like(high)
        for shift in range(MIN_FLAT_TOP_SAMPLES):
            in_row[shift : shift + len(rows)] |= rows
        top += int(in_row.sum())
        below += int((size > (1 - 2 * FLAT_TOP_SHARE) * peak).sum() - high.sum())
    share = top / max(count, 1)
    return share if share > MIN_CLIPPED_SHARE and top > FLAT_TOP_EXCESS * below else 0.0
