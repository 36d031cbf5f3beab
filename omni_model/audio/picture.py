"""A mel spectrogram to look at: with coloured half blocks or plain shades in a terminal, or as a PNG.

Time runs to the right, pitch upwards on the ear's own scale, brightness is 60 dB of loudness.

Axes: N samples, C columns of time, B bands from low to high.
"""

import io
from typing import TYPE_CHECKING

import numpy as np

from omni_model.audio.measures import HIGHEST_BAND_HZ, LOWEST_BAND_HZ, decibels, mel_bands, power_spectra
from omni_model.audio.pitch import HOP_SAMPLES
from omni_model.audio.waveform import SAMPLE_RATE_HZ

if TYPE_CHECKING:
    from rich.text import Text

RANGE_DB = 60.0
SHADES = " .:-=+*#%@"
TERMINAL_BANDS, PNG_BANDS, PNG_COLUMNS = 24, 64, 1600
# From silence to the loudest: nearly black, violet, red, orange, pale yellow.
COLOURS = ((12, 8, 30), (88, 20, 112), (196, 50, 80), (248, 148, 36), (252, 250, 180))
MAX_BLOCK_SAMPLES = 30 * SAMPLE_RATE_HZ


def brightness(samples: np.ndarray, num_columns: int, num_bands: int) -> np.ndarray:
    """Brightness 0..1 (B, C) of samples (N,) at 16 kHz; short sounds have fewer columns, one for 10 ms."""
    num_frames = len(samples) // HOP_SAMPLES
    num_columns = min(num_columns, num_frames)
    edges = np.linspace(0, num_frames, num_columns + 1).astype(int)
    frames = np.concatenate(
        [
            power_spectra(samples[start : start + MAX_BLOCK_SAMPLES]) @ mel_bands(num_bands).T
            for start in range(0, num_frames * HOP_SAMPLES, MAX_BLOCK_SAMPLES)
        ]
    )
    level = decibels(np.maximum.reduceat(frames[:num_frames], edges[:-1], axis=0).T)
    return np.asarray(np.clip(1 + (level - level.max()) / RANGE_DB, 0, 1))


def coloured(picture: np.ndarray) -> "Text":
    """Lines of half blocks, two bands (B, C) to a line, highest first, for rich to draw as it can."""
    from rich.style import Style
    from rich.text import Text

    lines = []
    for upper, lower in zip(picture[1::2][::-1], picture[::2][::-1], strict=True):
        line = Text(no_wrap=True)
        for above, below in zip(_colours(upper), _colours(lower), strict=True):
            line.append("▀", Style(color=f"rgb({above})", bgcolor=f"rgb({below})"))
        lines.append(line)
    return Text("\n").join(lines)


def _colours(values: np.ndarray) -> list[str]:
    """Red, green and blue of brightness (C,), as `12,8,30`."""
    places = np.linspace(0, 1, len(COLOURS))
    mixed = np.stack([np.interp(values, places, shade) for shade in np.array(COLOURS).T], axis=1)
    return [",".join(str(round(part)) for part in colour) for colour in mixed]


def plain(picture: np.ndarray) -> str:
    """Lines of ten shades in ASCII, two bands (B, C) to a line, highest first."""
    pairs = np.maximum(picture[1::2], picture[::2])[::-1]
    return "\n".join("".join(SHADES[int(value * (len(SHADES) - 1))] for value in row) for row in pairs)


def png(samples: np.ndarray) -> bytes:
    """A PNG of samples (N,) at 16 kHz; the same sound gives the same bytes."""
    from matplotlib.figure import Figure

    picture = brightness(samples, PNG_COLUMNS, PNG_BANDS)
    figure = Figure(figsize=(10, 4), dpi=120, layout="constrained")
    axes = figure.add_subplot()
    duration_s = len(samples) / SAMPLE_RATE_HZ
    image = axes.imshow(
        RANGE_DB * (picture - 1),
        origin="lower",
        aspect="auto",
        extent=(0, duration_s, 0, PNG_BANDS),
        cmap="magma",
    )
    ticks_hz = (100, 250, 500, 1000, 2000, 4000)
    axes.set_yticks([_band_of(hz) for hz in ticks_hz], [f"{hz:,}" for hz in ticks_hz])
    axes.set(xlabel="seconds", ylabel="Hz")
    figure.colorbar(image, ax=axes, label="dB below the loudest")
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", metadata={"Software": None})
    return buffer.getvalue()


def _band_of(hz: float) -> float:
    """Where a frequency lies among the picture's bands."""
    low, high, mel = (np.log10(1 + each / 700) for each in (LOWEST_BAND_HZ, HIGHEST_BAND_HZ, hz))
    return float((mel - low) / (high - low) * (PNG_BANDS + 1) - 0.5)
