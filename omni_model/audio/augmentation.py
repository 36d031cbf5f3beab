"""The same clips as other microphones, rooms and lines would give them.

Clips of a corpus are put under one *recording condition* each: as it is (clean), over noise, in a room that
echoes, through a telephone, or distorted by too much gain. The conditions are dealt in equal shares whatever
the labels say. A recipe may leave some clips alone; they say nothing of their recording. What a condition
does in numbers is drawn from cells of the clip's split (see `label_ranges`), so a test clip's noise, room or
gain is never one from training.

The finished clip is as loud as it was, and its labels are told anew: `recording` names the condition, noise
that was added is named, and a label goes where its sound can no longer be heard (`heard_labels` says which).
Keys stay the same, so an augmented corpus takes the place of its source.

Axes: N samples, M frames of 20 ms.
"""

import dataclasses
import io
import math
import wave
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from omni_model.artifacts import AudioCorpus, canonical_json, sha256_text
from omni_model.audio.clips import Clip, ClipPlan, Event, ShardPlan, clip_rng
from omni_model.audio.corpora import read_index, read_shard, write_shards
from omni_model.audio.label_ranges import (
    FULL_SCALE,
    ROOM_NOISE_DBFS,
    Range,
    at_level,
    balanced,
    draw,
    frame_powers,
    level_dbfs,
    loudness_of,
    with_room,
)
from omni_model.audio.texture import CRACKLE_CLICKS_HZ, NOISE_TILT, click_envelope, tilted_noise
from omni_model.audio.waveform import PCM16_SCALE, SAMPLE_RATE_HZ
from omni_model.config import JSON, AugmentRecipe, BadInput, Runtime
from omni_model.plain import to_plain
from omni_model.storage import Workspace

# What counts as sounding when levels are compared: louder than the pauses of a faint clip, which hiss.
WITHIN_DB = 15
SNR_DB = Range(4, 14)
RT60_S = Range(0.35, 0.9, log=True)  # how long a room takes to fall by 60 dB
DIRECT_DB = Range(-3, 3)  # the direct sound's energy over the room's
PREDELAY_S = (0.004, 0.015)
TAIL_DB = 40  # how far the room has faded when the clip ends
BAND_LOW_HZ = Range(260, 340)
BAND_HIGH_HZ = Range(3200, 3600)
BAND_EDGE = 0.1  # share of a cut-off frequency over which the band fades
MU = 255  # of the mu-law that a telephone line packs 8-bit samples by (ITU-T G.711)
CLIP_GAIN_DB = Range(12, 20)  # how far the peak would lie above what the line lets through

# Below these shares of its power a frame, or the whole clip, is lost on a telephone.
CARRIED_FRAME, CARRIED_CLIP = 0.1, 0.01
SWINGS = ("tremolo", "swell")  # of loudness: a label and a timeline track
SHAPE = ("pitch", "contour", "beeps", "motion", "beep", *SWINGS)  # labels and timeline tracks of a tone


@dataclass(frozen=True)
class Recorded:
    """A clip under its condition, before it is brought to its level.

    Attributes:
        samples: (N,) float32; the very array that came in where nothing was done to it.
        parameters: what was done, in plain JSON.
        noise: the label of the noise that was added.
        lost: labels and timeline tracks of the source that can no longer be heard.
        failed: why the condition could not be, so that the clip stays clean.
    """

    samples: np.ndarray
    parameters: dict[str, Any] = field(default_factory=dict)
    noise: str = ""
    lost: tuple[str, ...] = ()
    failed: str = ""


def augment(
    recipe: AugmentRecipe, corpus: AudioCorpus, *, work: Workspace, runtime: Runtime
) -> dict[str, JSON]:
    """Put each clip of a corpus under one condition. Stage function; returns the facts of an AudioCorpus.

    Raises:
        BadInput: an unknown or repeated condition, or a damaged corpus.
    """
    unknown = [name for name in recipe.conditions if name not in CONDITIONS]
    if unknown or not recipe.conditions or len(set(recipe.conditions)) < len(recipe.conditions):
        raise BadInput(
            f"AugmentRecipe.conditions is {', '.join(recipe.conditions) or 'empty'}; "
            f"name any of {', '.join(CONDITIONS)}, each once."
        )
    if recipe.share > 1:
        raise BadInput(f"AugmentRecipe.share is {recipe.share}; it is a part of the clips, 1 at most.")
    shards = []
    for record in read_index(corpus)["shards"]:
        deal = {"source": record["sha256"], "recipe": to_plain(recipe), "seed": work.seed}
        shards.append(
            ShardPlan(
                record["name"].removeprefix("clips-").removesuffix(".tar"),
                sha256_text(canonical_json(deal)),
                _recording(corpus.out / record["name"], recipe, work.seed),
            )
        )
    return write_shards(shards, generator="augmentation", work=work, expected=corpus.num_clips)


def _recording(path: Path, recipe: AugmentRecipe, seed: int) -> Callable[[], Iterator[tuple[ClipPlan, Clip]]]:
    """What makes the clips of one shard. Conditions are dealt within it, so that it depends on no other."""

    def make() -> Iterator[tuple[ClipPlan, Clip]]:
        first_key, conditions = "", recipe.conditions
        dealt: Counter[str] = Counter()
        for key, content, metadata in read_shard(path):
            first_key, split = first_key or key, metadata["split"]
            samples = read_pcm(content)
            if clip_rng(seed, f"{key}/chosen").random() >= recipe.share:
                yield unchanged(samples, metadata)
                continue
            name, number = f"{first_key}/{split}", dealt[split]
            condition = balanced(conditions, number, seed, f"{name}/recording")
            colour = balanced(list(NOISE_TILT), number // len(conditions), seed, f"{name}/noise")
            yield record_clip(condition, colour, samples, metadata, seed)
            dealt[split] += 1

    return make


def unchanged(samples: np.ndarray, metadata: Mapping[str, Any]) -> tuple[ClipPlan, Clip]:
    """A clip as it was, samples (N,) and all that is known of it."""
    plan = ClipPlan(
        key=metadata["key"],
        split=metadata["split"],
        labels=dict(metadata["labels"]),
        parameters=dict(metadata["provenance"]),
        transcript=metadata["transcript"],
        speaker=metadata["speaker"],
        licence=metadata["licence"],
        exchanges=tuple((question, answer) for question, answer in metadata.get("exchanges", ())),
    )
    events = tuple(Event(*row) for row in metadata.get("timeline", ()))
    return plan, Clip(samples, timeline=events, changes=tuple(metadata.get("changes", ())))


def read_pcm(content: bytes) -> np.ndarray:
    """Samples (N,) float32 of a corpus's WAV, exactly as they were written."""
    with wave.open(io.BytesIO(content)) as file:
        pcm = np.frombuffer(file.readframes(file.getnframes()), "<i2")
    return pcm.astype(np.float32) / PCM16_SCALE


def record_clip(
    condition: str, colour: str, samples: np.ndarray, metadata: Mapping[str, Any], seed: int
) -> tuple[ClipPlan, Clip]:
    """One clip under a condition, as loud as it was, with the labels and timeline that are still true.

    Args:
        colour: of the noise, if the condition is noisy.
        samples: (N,) float32 at 16 kHz.
        metadata: the source clip's, as a corpus holds it.
    """
    rng = clip_rng(seed, f"{metadata['key']}/recording")
    done = CONDITIONS[condition](samples, rng, metadata["split"], colour)
    finished = samples if done.samples is samples else _finished(done.samples, samples, rng)
    name = "clean" if done.failed else condition
    augmentation = {"name": name, **done.parameters, "seed": seed}
    plan, clip = unchanged(finished, metadata)
    told = dataclasses.replace(
        plan,
        labels=heard_labels(metadata["labels"], name, done, finished, samples),
        parameters={**plan.parameters, "augmentation": augmentation},
    )
    changes = (*clip.changes, *([done.failed] if done.failed else []))
    timeline = tuple(event for event in clip.timeline if event.track not in done.lost)
    return told, dataclasses.replace(clip, timeline=timeline, changes=changes)


def _finished(recorded: np.ndarray, source: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """The recording at its source's level, below full scale, with a microphone's own noise."""
    level = level_dbfs(source, WITHIN_DB)
    samples = at_level(recorded, level, WITHIN_DB)
    if (peak := float(np.abs(samples).max())) > FULL_SCALE:
        samples = samples * np.float32(FULL_SCALE / peak)
    # Softly enough not to be heard in a clip that is softer than any label.
    room_dbfs = min(rng.uniform(ROOM_NOISE_DBFS.low, ROOM_NOISE_DBFS.high), level - 20)
    return with_room(samples, room_dbfs, rng)


def heard_labels(
    source: Mapping[str, str], condition: str, done: Recorded, finished: np.ndarray, before: np.ndarray
) -> dict[str, str]:
    """category -> value of what can be heard in the finished clip (N,), which was `before` (N',).

    A noise under another noise is not told any more. Where noise is all there is, more noise and distortion
    change nothing that a listener could name, so such a clip says nothing of its recording. An echo fills the
    pauses between the clicks of a crackle. The loudness is as before, unless peaks at full scale forbade it;
    then it is measured, and not told between two labels.
    """
    gone = set(done.lost)
    if "noise" in source:
        gone |= {"noisy": {"noise", "recording"}, "distorted": {"recording"}}.get(condition, set())
    if condition == "echoing" and source.get("noise") == "crackle":
        gone.add("noise")
    labels = {**({"noise": done.noise} if done.noise else {}), **source, "recording": condition}
    level = level_dbfs(finished, WITHIN_DB)
    if "loudness" in source and abs(level - level_dbfs(before, WITHIN_DB)) > 1:
        told = loudness_of(level)
        labels["loudness"] = told or ""
        gone |= set() if told else {"loudness"}
    return {name: value for name, value in labels.items() if name not in gone}


# --- conditions ----------------------------------------------------------------------------------


def clean(samples: np.ndarray, rng: np.random.Generator, split: str, colour: str) -> Recorded:
    """The clip as it is."""
    return Recorded(samples)


def noisy(samples: np.ndarray, rng: np.random.Generator, split: str, colour: str) -> Recorded:
    """White, pink, brown or crackling noise under what sounds, at a signal-to-noise ratio in dB."""
    parameters: dict[str, Any] = {
        "noise": colour,
        "snr_db": draw(rng, SNR_DB, split),
        "tilt": draw(rng, NOISE_TILT[colour], split),
    }
    size = _quick_length(len(samples))
    noise = tilted_noise(rng, size, parameters["tilt"])
    if colour == "crackle":
        parameters["clicks_hz"] = draw(rng, CRACKLE_CLICKS_HZ, split)
        noise = noise * click_envelope(rng, size, parameters["clicks_hz"])
    noise = noise[: len(samples)].astype(np.float32)
    wanted = 10 ** ((level_dbfs(samples, WITHIN_DB) - parameters["snr_db"]) / 20)
    noise *= np.float32(wanted / math.sqrt(np.mean(np.square(noise))))
    return Recorded(samples + noise, parameters, noise=colour)


def echoing(samples: np.ndarray, rng: np.random.Generator, split: str, colour: str) -> Recorded:
    """The sound and its echo in a room; the clip grows by what rings on after it."""
    parameters = {"rt60_s": draw(rng, RT60_S, split), "direct_db": draw(rng, DIRECT_DB, split)}
    response = room_response(rng, **parameters)
    size = len(samples) + round(parameters["rt60_s"] * TAIL_DB / 60 * SAMPLE_RATE_HZ)
    num_fft = _quick_length(size + len(response))
    spectrum = np.fft.rfft(samples, num_fft) * np.fft.rfft(response, num_fft)
    heard = np.fft.irfft(spectrum, num_fft)[:size]
    fade = round(0.02 * SAMPLE_RATE_HZ)
    heard[-fade:] *= np.linspace(1, 0, fade)
    return Recorded(heard.astype(np.float32), parameters)


def room_response(rng: np.random.Generator, rt60_s: float, direct_db: float) -> np.ndarray:
    """What a room makes of one sample of sound (M,): itself, then noise that falls by 60 dB in `rt60_s`.

    A statistical room after Moorer, "About this reverberation business" (1979).
    """
    num_samples = round(rt60_s * SAMPLE_RATE_HZ)
    time_s = np.arange(num_samples) / SAMPLE_RATE_HZ
    response = rng.standard_normal(num_samples) * np.exp(-3 * math.log(10) / rt60_s * time_s)
    response[: round(rng.uniform(*PREDELAY_S) * SAMPLE_RATE_HZ)] = 0
    response *= 10 ** (-direct_db / 20) / math.sqrt(np.sum(np.square(response)))
    response[0] = 1
    return response


def telephone(samples: np.ndarray, rng: np.random.Generator, split: str, colour: str) -> Recorded:
    """A band of 300 to 3,400 Hz or so, sampled at 8 kHz and packed into 8 bits by mu-law (ITU-T G.711).

    Shape is lost where the line does not carry it all the way: a hum, or a whistle that leaves the band.
    """
    parameters = {"low_hz": draw(rng, BAND_LOW_HZ, split), "high_hz": draw(rng, BAND_HIGH_HZ, split)}
    num_fft = 2 * _quick_length(-(-len(samples) // 2))
    spectrum = np.fft.rfft(samples, num_fft)
    frequency_hz = np.fft.rfftfreq(num_fft, 1 / SAMPLE_RATE_HZ)
    spectrum *= np.clip((frequency_hz / parameters["low_hz"] - 1) / BAND_EDGE + 1, 0, 1)
    spectrum *= np.clip((1 - frequency_hz / parameters["high_hz"]) / BAND_EDGE + 1, 0, 1)
    # The band ends below 4 kHz, so half the spectrum is the sound at half the rate.
    half = np.fft.irfft(spectrum[: num_fft // 4 + 1], num_fft // 2) / 2
    half = mu_law(half)
    back = np.zeros_like(spectrum)
    back[: num_fft // 4] = 2 * np.fft.rfft(half)[:-1]
    line = np.fft.irfft(back, num_fft)[: len(samples)].astype(np.float32)
    before, after = frame_powers(samples), frame_powers(line)
    if after.sum() < CARRIED_CLIP * before.sum():
        return Recorded(samples, {"instead_of": "telephone"}, failed="no telephone would carry it")
    sounding = before > before.max() * 1e-2
    carried = np.quantile(after[sounding] / before[sounding], 0.1)
    lost = SHAPE if carried < CARRIED_FRAME else ()
    return Recorded(line, parameters, lost=lost)


def mu_law(samples: np.ndarray) -> np.ndarray:
    """Samples (N,) after 8-bit mu-law packing and unpacking, with full scale at their peak."""
    peak = float(np.abs(samples).max()) or 1.0
    packed = np.sign(samples) * np.log1p(MU * np.abs(samples) / peak) / math.log1p(MU)
    packed = np.rint(packed * 127) / 127
    return np.sign(packed) * np.expm1(np.abs(packed) * math.log1p(MU)) / MU * peak


def distorted(samples: np.ndarray, rng: np.random.Generator, split: str, colour: str) -> Recorded:
    """Too much gain: whatever goes beyond a limit is cut off flat, and a tremolo's swings are evened out."""
    parameters = {"gain_db": draw(rng, CLIP_GAIN_DB, split)}
    limit = float(np.abs(samples).max()) * 10 ** (-parameters["gain_db"] / 20)
    return Recorded(np.clip(samples, -limit, limit), parameters, lost=SWINGS)


CONDITIONS: dict[str, Callable[[np.ndarray, np.random.Generator, str, str], Recorded]] = {
    "clean": clean,
    "noisy": noisy,
    "echoing": echoing,
    "telephone": telephone,
    "distorted": distorted,
}


def _quick_length(size: int) -> int:
    """A length at least `size` that a Fourier transform takes quickly."""
    return -(-size // 1024) * 1024
