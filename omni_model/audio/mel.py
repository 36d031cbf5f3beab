"""Whisper's log-mel spectrogram, equal to transformers' to 1e-6 and without its padding.

Axes: N samples, M mel bins, F mel frames (100 Hz).
"""

import functools
import math

import numpy as np
import torch
from torch.nn import functional as F

from omni_model.audio.waveform import (
    FRAMES_PER_ENCODER_FRAME,
    HOP_SAMPLES,
    SAMPLE_RATE_HZ,
    WINDOW_SAMPLES,
    checked,
)


def log_mel(samples: np.ndarray, num_mel_bins: int) -> torch.Tensor:
    """Whisper's log-mel spectrogram (M, F) of samples (N,) at 16 kHz, at the clip's own length.

    Equal to transformers' WhisperFeatureExtractor on the unpadded clip to 1e-6, except that an odd last
    frame is dropped: with it, the encoder's stride would read past the end, and batching would change it.

    Source: Radford et al. 2022, "Robust Speech Recognition via Large-Scale Weak Supervision", section 2.2.

    Raises:
        BadInput: shorter than 0.1 s, silent, or not finite.
    """
    wave_N = torch.from_numpy(checked(samples))
    # Not torch.stft: its result lies bin by bin, and everything after it would stride through memory.
    mirrored = F.pad(wave_N[None], (WINDOW_SAMPLES // 2, WINDOW_SAMPLES // 2), mode="reflect")[0]
    pieces = mirrored.unfold(0, WINDOW_SAMPLES, HOP_SAMPLES)[:-1]
    spectrum = torch.fft.rfft(pieces * _window())
    power = spectrum.real.square().addcmul_(spectrum.imag, spectrum.imag)
    log_FM = (power @ mel_filters(num_mel_bins).T).clamp_(min=1e-10).log10_()
    # 80 dB below the loudest of all frames, an odd last one included, as in transformers.
    log_FM.clamp_(min=float(log_FM.max()) - 8.0).add_(4.0).mul_(0.25)
    return log_FM[: len(log_FM) // FRAMES_PER_ENCODER_FRAME * FRAMES_PER_ENCODER_FRAME].T


@functools.cache
def _window() -> torch.Tensor:
    return torch.hann_window(WINDOW_SAMPLES)


@functools.cache
def mel_filters(num_mel_bins: int) -> torch.Tensor:
    """Triangular filters (M, 201) on Slaney's mel scale, each of unit area, from 0 Hz to 8 kHz.

    Made once per process: change a copy, never the tensor.

    Source: Slaney 1998, "Auditory Toolbox"; the same as librosa.filters.mel and openai-whisper's table.
    """
    bins_hz = np.linspace(0, SAMPLE_RATE_HZ / 2, WINDOW_SAMPLES // 2 + 1)
    edges_hz = _mel_to_hz(np.linspace(0, _hz_to_mel(SAMPLE_RATE_HZ / 2), num_mel_bins + 2))
    rising = (bins_hz - edges_hz[:-2, None]) / np.diff(edges_hz)[:-1, None]
    falling = (edges_hz[2:, None] - bins_hz) / np.diff(edges_hz)[1:, None]
    area = 2.0 / (edges_hz[2:] - edges_hz[:-2])
    return torch.from_numpy(np.maximum(0, np.minimum(rising, falling)) * area[:, None]).float()


# Slaney's scale: 3 mels per 200 Hz up to 1 kHz (15 mels), then 27 mels per factor of 6.4.
KNEE_HZ, KNEE_MEL, HZ_PER_MEL, MELS_PER_E_FOLD = 1000.0, 15.0, 200.0 / 3.0, 27.0 / math.log(6.4)


def _hz_to_mel(hz: float) -> float:
    return hz / HZ_PER_MEL if hz < KNEE_HZ else KNEE_MEL + math.log(hz / KNEE_HZ) * MELS_PER_E_FOLD


def _mel_to_hz(mel: np.ndarray) -> np.ndarray:
    return np.where(mel < KNEE_MEL, mel * HZ_PER_MEL, KNEE_HZ * np.exp((mel - KNEE_MEL) / MELS_PER_E_FOLD))
