"""Sounds that say nothing: tones that rise, waver and flutter, noises, beeps, and silence. numpy alone.

Every label of a clip is one range of `LABELS` below; the clip's number is drawn inside it, in cells that
belong to the clip's split (see `label_ranges`), and everything that is no label (overtones, duration, room
noise, where the first beep starts) varies freely. Labels of one clip are independent of each other. Silence
has no label: it is the noise of a room, which is all there is to tell such clips apart, so that its level is
drawn in cells as well.
"""

import itertools
import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from omni_model.audio.clips import SPLITS, Clip, ClipPlan, Event, clip_rng
from omni_model.audio.corpora import write_corpus
from omni_model.audio.label_ranges import (
    LOUDNESS_DBFS,
    ROOM_NOISE_DBFS,
    Range,
    at_level,
    balanced,
    draw,
    with_room,
)
from omni_model.audio.waveform import SAMPLE_RATE_HZ
from omni_model.config import JSON, BadInput, Runtime, TextureRecipe
from omni_model.storage import Workspace

# What each value of each category means. A value with no range of its own has nothing to vary.
PITCH_HZ = {
    "deep": Range(90, 150, log=True),
    "low": Range(270, 450, log=True),
    "high": Range(800, 1330, log=True),
    "shrill": Range(2200, 3600, log=True),
}
CONTOUR_SEMITONES = {
    "level": None,
    "rising": Range(6, 10),  # from start to end
    "falling": Range(6, 10),
    "wavering": Range(1.5, 3),  # to either side
}
WAVER_HZ = Range(2.2, 3.6, log=True)
TREMOLO_HZ = {
    "plain": None,
    "pulsing": Range(2.0, 3.5, log=True),
    "fluttering": Range(6.5, 10.5, log=True),
    "buzzing": Range(24, 36, log=True),
}
TREMOLO_DEPTH = Range(0.75, 0.95)
NOISE_TILT = {  # amplitude falls as frequency to this power
    "white": Range(-0.08, 0.08),
    "pink": Range(0.42, 0.58),
    "brown": Range(0.92, 1.15),
    "crackle": Range(-0.08, 0.08),  # white, in clicks
}
CRACKLE_CLICKS_HZ = Range(18, 40, log=True)
CLICK_DECAY_S = 0.003
BEEP_COUNTS = {"one": 1, "two": 2, "three": 3, "four": 4, "five": 5}
BEEP_PERIOD_S = Range(0.22, 0.34, log=True)
BEEP_LENGTH_S = Range(0.08, 0.13)
BEEP_CLIP_S = 1.8  # room for five beeps at the slowest period
LABELS: dict[str, Mapping[str, Any]] = {
    "pitch": PITCH_HZ,
    "contour": CONTOUR_SEMITONES,
    "tremolo": TREMOLO_HZ,
    "noise": NOISE_TILT,
    "beeps": BEEP_COUNTS,
    "loudness": LOUDNESS_DBFS,
}
KINDS = {
    "tone": ("pitch", "contour", "tremolo", "loudness"),
    "noise": ("noise", "loudness"),
    "beeps": ("beeps", "pitch", "loudness"),
    "silence": (),
}
# Most clips are tones, which have most to tell; every ninth is silent.
ORDER = ("tone", "noise", "tone", "beeps", "tone", "noise", "tone", "beeps", "silence")

ROUGH_HZ = 20.0  # loudness that moves faster than this is heard as roughness, not as a swell

MAX_OVERTONES = 4
HIGHEST_HZ = 7_500
LOWEST_NOISE_HZ = 40
FADE_S = 0.01


def synthesize(recipe: TextureRecipe, *, work: Workspace, runtime: Runtime) -> dict[str, JSON]:
    """Make the corpus. Stage function; returns the facts of an AudioCorpus.

    Raises:
        BadInput: durations that cannot be met.
    """
    if not 0.5 <= recipe.min_duration_s <= recipe.max_duration_s or recipe.max_duration_s < BEEP_CLIP_S:
        raise BadInput(
            f"texture durations {recipe.min_duration_s} to {recipe.max_duration_s} s cannot be made; "
            f"give min_duration_s 0.5 or more, and max_duration_s {BEEP_CLIP_S} or more and no less than it."
        )
    plans = [plan for split in SPLITS for plan in plan_split(recipe, split, work.seed)]
    return write_corpus(
        plans,
        lambda plan: Clip(render(plan, work.seed), timeline=tuple(timeline(plan.parameters))),
        generator="texture",
        clips_per_shard=recipe.clips_per_shard,
        work=work,
    )


def plan_split(recipe: TextureRecipe, split: str, seed: int) -> list[ClipPlan]:
    """The clips of one split: kinds in a fixed rhythm, labels balanced within each kind."""
    seen = dict.fromkeys(KINDS, 0)
    plans = []
    for number, kind in zip(range(getattr(recipe.clips, split)), itertools.cycle(ORDER)):  # noqa: B905
        labels = {
            category: balanced(list(LABELS[category]), seen[kind], seed, f"{split}/{kind}/{category}")
            for category in KINDS[kind]
        }
        seen[kind] += 1
        key = f"texture-{split}-{number:05d}"
        rng = clip_rng(seed, key)
        shortest_s = max(recipe.min_duration_s, BEEP_CLIP_S if kind == "beeps" else 0)
        parameters: dict[str, Any] = {
            "kind": kind,
            "duration_s": round(rng.uniform(shortest_s, recipe.max_duration_s), 2),
        }
        if kind == "silence":
            parameters["room_dbfs"] = draw(rng, ROOM_NOISE_DBFS, split)
        else:
            parameters["level_dbfs"] = draw(rng, LOUDNESS_DBFS[labels["loudness"]], split)
            parameters["room_dbfs"] = round(rng.uniform(ROOM_NOISE_DBFS.low, ROOM_NOISE_DBFS.high), 1)
            parameters |= {"tone": _tone, "noise": _noise, "beeps": _beeps}[kind](rng, labels, split)
        plans.append(ClipPlan(key=key, split=split, labels=labels, parameters=parameters))
    return plans


def _tone(rng: np.random.Generator, labels: dict[str, str], split: str) -> dict[str, Any]:
    contour, tremolo = CONTOUR_SEMITONES[labels["contour"]], TREMOLO_HZ[labels["tremolo"]]
    return {
        "frequency_hz": draw(rng, PITCH_HZ[labels["pitch"]], split),
        "contour": labels["contour"],
        "contour_semitones": draw(rng, contour, split) if contour else 0.0,
        "waver_hz": draw(rng, WAVER_HZ, split),
        "tremolo_hz": draw(rng, tremolo, split) if tremolo else 0.0,
        "tremolo_depth": draw(rng, TREMOLO_DEPTH, split) if tremolo else 0.0,
        "overtones": _overtones(rng),
    }


def _noise(rng: np.random.Generator, labels: dict[str, str], split: str) -> dict[str, Any]:
    crackles = labels["noise"] == "crackle"
    return {
        "tilt": draw(rng, NOISE_TILT[labels["noise"]], split),
        "clicks_hz": draw(rng, CRACKLE_CLICKS_HZ, split) if crackles else 0.0,
    }


def _beeps(rng: np.random.Generator, labels: dict[str, str], split: str) -> dict[str, Any]:
    count = BEEP_COUNTS[labels["beeps"]]
    period_s, length_s = draw(rng, BEEP_PERIOD_S, split), draw(rng, BEEP_LENGTH_S, split)
    spare_s = BEEP_CLIP_S - (count - 1) * period_s - length_s
    return {
        "frequency_hz": draw(rng, PITCH_HZ[labels["pitch"]], split),
        "count": count,
        "period_s": period_s,
        "length_s": length_s,
        "start_s": round(rng.uniform(0.02, spare_s - 0.02), 4),
        "overtones": _overtones(rng),
    }


def _overtones(rng: np.random.Generator) -> list[float]:
    """Amplitudes of the overtones relative to the fundamental: timbre, which no label speaks of."""
    count = rng.integers(0, MAX_OVERTONES + 1)
    return [round(float(rng.uniform(0.05, 0.5)) / (n + 1), 4) for n in range(count)]


# --- what sounds when ----------------------------------------------------------------------------


def timeline(parameters: dict[str, Any]) -> list[Event]:
    """Where the pitch and the loudness of a tone move which way, and where each beep sounds."""
    if parameters["kind"] == "tone":
        return _motions(parameters) + _swells(parameters)
    if parameters["kind"] == "beeps":
        starts_s = [
            parameters["start_s"] + number * parameters["period_s"] for number in range(parameters["count"])
        ]
        return [
            Event("beep", "on", round(start_s, 4), round(start_s + parameters["length_s"], 4))
            for start_s in starts_s
        ]
    return []


def _motions(parameters: dict[str, Any]) -> list[Event]:
    duration_s = parameters["duration_s"]
    if parameters["contour"] != "wavering":
        value = {"level": "flat", "rising": "up", "falling": "down"}[parameters["contour"]]
        return [Event("motion", value, 0.0, duration_s)]
    # A sine rises for a quarter of its period, then falls and rises for half a period each.
    turns_s = np.arange(0.25, duration_s * parameters["waver_hz"], 0.5) / parameters["waver_hz"]
    borders_s = [0.0, *(round(float(turn_s), 4) for turn_s in turns_s), duration_s]
    return [
        Event("motion", value, start_s, end_s)
        for value, (start_s, end_s) in zip(itertools.cycle(("up", "down")), itertools.pairwise(borders_s))  # noqa: B905
    ]


def _swells(parameters: dict[str, Any]) -> list[Event]:
    duration_s, tremolo_hz = parameters["duration_s"], parameters["tremolo_hz"]
    if not tremolo_hz or tremolo_hz > ROUGH_HZ:
        return [Event("swell", "rough" if tremolo_hz else "steady", 0.0, duration_s)]
    # A cosine falls from its first half period on.
    turns_s = np.arange(0.5, duration_s * tremolo_hz, 0.5) / tremolo_hz
    borders_s = [0.0, *(round(float(turn_s), 4) for turn_s in turns_s), duration_s]
    return [
        Event("swell", value, start_s, end_s)
        for value, (start_s, end_s) in zip(itertools.cycle(("down", "up")), itertools.pairwise(borders_s))  # noqa: B905
    ]


# --- rendering -----------------------------------------------------------------------------------


def render(plan: ClipPlan, seed: int) -> np.ndarray:
    """Samples (N,) float32 of one planned clip."""
    p = plan.parameters
    rng = clip_rng(seed, f"{plan.key}/noise")
    time_s = np.arange(round(p["duration_s"] * SAMPLE_RATE_HZ)) / SAMPLE_RATE_HZ
    if p["kind"] == "silence":
        return with_room(np.zeros(len(time_s), np.float32), p["room_dbfs"], rng)
    if p["kind"] == "noise":
        samples = tilted_noise(rng, len(time_s), p["tilt"])
        if p["clicks_hz"]:
            samples = samples * click_envelope(rng, len(time_s), p["clicks_hz"])
    elif p["kind"] == "tone":
        frequency_hz = p["frequency_hz"] * np.exp2(contour_semitones(p, time_s) / 12)
        samples = harmonic_tone(frequency_hz, p["overtones"])
        if p["tremolo_hz"]:
            wave = np.cos((2 * math.pi * p["tremolo_hz"] * time_s).astype(np.float32))
            samples *= 1 - p["tremolo_depth"] * (0.5 - 0.5 * wave)
    else:
        tone = harmonic_tone(np.full_like(time_s, p["frequency_hz"]), p["overtones"])
        samples = tone * beep_envelope(p, time_s)
    edge_s = np.minimum(time_s, time_s[::-1])
    samples = at_level(samples * np.clip(edge_s / FADE_S, 0, 1), p["level_dbfs"])
    return with_room(samples, p["room_dbfs"], rng)


def contour_semitones(parameters: dict[str, Any], time_s: np.ndarray) -> np.ndarray:
    """Distance from the clip's central frequency at each time (N,), in semitones."""
    contour, span = parameters["contour"], parameters["contour_semitones"]
    if contour == "level":
        return np.zeros_like(time_s)
    if contour == "wavering":
        return span * np.sin(2 * math.pi * parameters["waver_hz"] * time_s)
    return (span if contour == "rising" else -span) * (time_s / time_s[-1] - 0.5)


def harmonic_tone(frequency_hz: np.ndarray, overtones: list[float]) -> np.ndarray:
    """A tone (N,) float32 whose fundamental follows `frequency_hz` (N,); no overtone is above 7.5 kHz."""
    cycles = np.cumsum(frequency_hz) / SAMPLE_RATE_HZ
    # Whole turns go before 24 bits have to hold the phase.
    phase = ((cycles - np.floor(cycles)) * (2 * math.pi)).astype(np.float32)
    highest_hz = frequency_hz.max()
    tone = np.sin(phase)
    for order, amplitude in enumerate(overtones, start=2):
        if order * highest_hz < HIGHEST_HZ:
            tone += np.float32(amplitude) * np.sin(np.float32(order) * phase)
    return tone


def tilted_noise(rng: np.random.Generator, num_samples: int, tilt: float) -> np.ndarray:
    """Gaussian noise (N,) whose amplitude falls as frequency ** tilt, with nothing below 40 Hz."""
    spectrum = np.fft.rfft(rng.standard_normal(num_samples))
    frequency_hz = np.fft.rfftfreq(num_samples, 1 / SAMPLE_RATE_HZ)
    lowest = int(np.searchsorted(frequency_hz, LOWEST_NOISE_HZ))
    spectrum[:lowest] = 0
    spectrum[lowest:] *= np.exp(-tilt * np.log(frequency_hz[lowest:]))
    return np.fft.irfft(spectrum, num_samples)


def click_envelope(rng: np.random.Generator, num_samples: int, clicks_hz: float) -> np.ndarray:
    """Short decaying clicks (N,) of uneven strength at random times, on average `clicks_hz` a second."""
    strikes = (rng.random(num_samples) < clicks_hz / SAMPLE_RATE_HZ) * rng.uniform(0.4, 1.0, num_samples)
    strikes[int(rng.integers(num_samples // 4))] = 1.0  # never none
    decay = np.exp(-np.arange(int(6 * CLICK_DECAY_S * SAMPLE_RATE_HZ)) / (CLICK_DECAY_S * SAMPLE_RATE_HZ))
    return np.convolve(strikes, decay)[:num_samples]


def beep_envelope(parameters: dict[str, Any], time_s: np.ndarray) -> np.ndarray:
    """1 inside a beep, 0 outside (N,), with 10 ms slopes."""
    envelope = np.zeros_like(time_s)
    for number in range(parameters["count"]):
        since_s = time_s - parameters["start_s"] - number * parameters["period_s"]
        edge_s = np.minimum(since_s, parameters["length_s"] - since_s)
        envelope += np.clip(edge_s / FADE_S, 0, 1)
    return envelope
