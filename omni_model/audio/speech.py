"""Short phrases ("seven purple tiger") spoken by espeak-ng in many voices, paces, melodies and loudnesses.

The words are labels, and so is the way they are said. Splits share no speaker (accent plus voice variant),
no three-word phrase, and no cell of pace, pitch, melody or loudness. espeak-ng has two whispers and one
croak: the second whisper is kept for validation and test, the croak is held out by accent.

A melody is told by how far the voice's pitch moves, or by a question mark, which makes it rise at the end.
It is a label only where it can be heard: a whisper and a croak have no pitch, one word or a hurried phrase is
too short, and the voices of `UNMELODIOUS` move theirs too little or too much whatever is asked of them. Of
the clips that carry it, two numbers from a pitch tracker (librosa.pyin) tell 152 of 176 apart (train 90 of
100, test 48 of 57). Spread is the distance of the 5th and 95th percentile: below 1.5 semitones it is
monotone; else asking where the end lies above the lowest point of the last quarter second by a semitone and
0.35 of the spread; else lively above 5 semitones. Single words gave 48 of 64, hurried phrases 29 of 44.

Speaking happens in the helper process of `espeak`; see there why.
"""

import itertools
import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
import soxr

from omni_model.audio import espeak
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
from omni_model.audio.waveform import PCM16_SCALE, SAMPLE_RATE_HZ
from omni_model.config import JSON, BadInput, Runtime, SpeechRecipe
from omni_model.storage import Workspace

WORDS = {
    "number": ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"),
    "colour": ("red", "green", "blue", "yellow", "black", "white", "orange", "purple"),
    "animal": ("cat", "dog", "horse", "cow", "bird", "fish", "sheep", "tiger"),
}
# Which categories a phrase names, in spoken order. Three-word phrases are half of all.
PHRASES = (
    ("number", "colour", "animal"),
    ("colour", "animal"),
    ("colour", "animal", "number"),
    ("number", "animal"),
    ("animal", "number", "colour"),
    ("number", "colour"),
    ("number",),
    ("colour",),
    ("animal",),
    ("animal", "colour", "number"),
    ("number", "colour", "animal"),
    ("colour", "number", "animal"),
)
# A three-word phrase belongs to the split that owns (number + colour + animal) mod 8.
PHRASE_RESIDUES = {"train": (0, 1, 3, 4, 6), "validation": (2,), "test": (5, 7)}

# espeak-ng takes whole numbers: the width of each range is a multiple of ten, so that cells end on them.
PACE_WPM = {
    "slow": Range(82, 102),
    "calm": Range(130, 150),
    "brisk": Range(190, 220),
    "hurried": Range(280, 320),
}
PITCH = Range(30, 70)  # espeak's own scale, 0..99, around each voice's natural pitch
INTONATION = {  # the same, for how far the pitch moves; 50 is the voice's own way
    "monotone": Range(0, 10),
    "natural": Range(20, 30),
    "lively": Range(89, 99),
    "asking": Range(50, 80),
}
UNLABELLED_INTONATION = Range(25, 85)
ESPEAK_VOLUME = 100  # full scale is never reached; loudness is set afterwards

ACCENTS = {
    "train": ("gmw/en-US", "gmw/en", "gmw/en-GB-x-rp", "gmw/en-029"),
    "validation": ("gmw/en-GB-x-gbclan",),  # not gbcwmd: its statements rise like questions
    "test": ("gmw/en-GB-scotland", "gmw/en-US-nyc"),
}
VARIANTS: dict[str, dict[str, tuple[str, ...]]] = {
    "man": {
        "train": ("m1", "m3", "m4", "m5", "m7", "Alex", "adam", "ed", "Lee", "michel", "paul", "Gene"),
        "validation": ("m2", "victor"),
        "test": ("m6", "norbert", "Jacky", "pablo"),
    },
    "woman": {
        "train": ("f1", "f2", "f4", "f5", "Alicia", "Annie", "belinda", "aunty"),
        "validation": ("Andrea", "grandma"),
        "test": ("f3", "steph", "anika"),
    },
    "whisper": {"train": ("whisper",), "validation": ("whisperf",), "test": ("whisperf",)},
    "croak": {"train": ("croak",), "validation": ("croak",), "test": ("croak",)},
}
# The pitch range in their voice files is below 4 or above 10 semitones.
UNMELODIOUS = ("Alex", "aunty", "belinda", "steph", "Annie", "grandma")
SILENCE_S = Range(0.03, 0.15)
DRIFT_SAMPLES = 640
AUDIBLE = 0.01  # of the peak: where a phrase is taken to begin
MANNERS = {"voice": tuple(VARIANTS), "pace": tuple(PACE_WPM), "loudness": tuple(LOUDNESS_DBFS)}
MELODIES = tuple(INTONATION)


def synthesize(recipe: SpeechRecipe, *, work: Workspace, runtime: Runtime) -> dict[str, JSON]:
    """Speak the corpus. Stage function; returns the facts of an AudioCorpus.

    Raises:
        BadInput: espeak-ng is not installed, lacks a voice, or a phrase outlasts `max_duration_s`.
    """
    plans = [plan for split in SPLITS for plan in plan_split(recipe, split, work.seed)]
    with Helper() as helper:

        def render(plan: ClipPlan) -> Clip:
            spoken, words = helper.speak(plan, work.seed)
            samples = finish(spoken, plan, work.seed)
            if len(samples) > recipe.max_duration_s * SAMPLE_RATE_HZ:
                raise BadInput(
                    f"clip {plan.key} ({plan.transcript!r}) lasts {len(samples) / SAMPLE_RATE_HZ:.2f} s; "
                    f"set speech.max_duration_s above that (now {recipe.max_duration_s})."
                )
            return Clip(samples, {"espeak_ng": helper.version}, timeline(words, plan.parameters["lead_s"]))

        return write_corpus(
            plans, render, generator="espeak-ng", clips_per_shard=recipe.clips_per_shard, work=work
        )


def plan_split(recipe: SpeechRecipe, split: str, seed: int) -> list[ClipPlan]:
    """The clips of one split; every label is balanced and independent of the others."""
    plans = []
    num_melodies = 0
    for number in range(getattr(recipe.clips, split)):
        key = f"speech-{split}-{number:05d}"
        rng = clip_rng(seed, key)
        phrase = PHRASES[number % len(PHRASES)]
        words = choose_words(phrase, number, split, seed)
        manner = {
            category: balanced(values, number, seed, f"{split}/{category}")
            for category, values in MANNERS.items()
        }
        accent, variant = _pick(rng, ACCENTS[split]), _pick(rng, VARIANTS[manner["voice"]][split])
        intonation = UNLABELLED_INTONATION
        melodious = manner["voice"] in ("man", "woman") and variant not in UNMELODIOUS
        if melodious and len(phrase) > 1 and manner["pace"] != "hurried":
            # Counted by themselves, so that melodies are balanced among the clips that have one.
            manner["melody"] = balanced(MELODIES, num_melodies, seed, f"{split}/melody")
            num_melodies += 1
            intonation = INTONATION[manner["melody"]]
        transcript = " ".join(words[category] for category in phrase)
        parameters = {
            "text": transcript + ("?" if manner.get("melody") == "asking" else "."),
            "voice": accent,
            "variant": variant,
            "rate_wpm": int(draw(rng, PACE_WPM[manner["pace"]], split)),
            "pitch": int(draw(rng, PITCH, split)),
            "range": int(draw(rng, intonation, split)),
            "volume": ESPEAK_VOLUME,
            "level_dbfs": draw(rng, LOUDNESS_DBFS[manner["loudness"]], split),
            "room_dbfs": round(rng.uniform(ROOM_NOISE_DBFS.low, ROOM_NOISE_DBFS.high), 1),
            "lead_s": round(rng.uniform(SILENCE_S.low, SILENCE_S.high), 3),
            "tail_s": round(rng.uniform(SILENCE_S.low, SILENCE_S.high), 3),
        }
        plans.append(
            ClipPlan(
                key=key,
                split=split,
                labels={**words, **manner},
                parameters=parameters,
                transcript=transcript,
                speaker=f"{accent.removeprefix('gmw/')}+{variant}",
            )
        )
    return plans


def choose_words(phrase: Sequence[str], number: int, split: str, seed: int) -> dict[str, str]:
    """category -> word for each category of the phrase; three words never make another split's phrase."""
    turn, slot = divmod(number, len(PHRASES))
    words = {
        category: balanced(WORDS[category], turn, seed, f"{split}/{slot}/{category}") for category in phrase
    }
    if len(words) == len(WORDS):
        residues = [str(residue) for residue in PHRASE_RESIDUES[split]]
        residue = int(balanced(residues, number, seed, f"{split}/residue"))
        others = WORDS["number"].index(words["number"]) + WORDS["colour"].index(words["colour"])
        words["animal"] = WORDS["animal"][(residue - others) % len(WORDS["animal"])]
    return words


def _pick(rng: np.random.Generator, options: Sequence[str]) -> str:
    return options[int(rng.integers(len(options)))]


def finish(spoken: np.ndarray, plan: ClipPlan, seed: int) -> np.ndarray:
    """Samples (N,) at 16 kHz as they are stored: at the planned loudness, with silence around and room noise.

    The level is set, never the peak: loudness is a label.
    """
    p = plan.parameters
    around = (round(p["lead_s"] * SAMPLE_RATE_HZ), round(p["tail_s"] * SAMPLE_RATE_HZ))
    samples = without_drift(np.pad(spoken, around))
    return with_room(at_level(samples, p["level_dbfs"]), p["room_dbfs"], clip_rng(seed, f"{plan.key}/room"))


def without_drift(samples: np.ndarray) -> np.ndarray:
    """Samples (N,) without what is slower than 20 Hz: a tenth of a whisper's power, which nobody hears."""
    slow = samples.astype(np.float64)
    for _ in range(2):  # two boxes make a triangle, whose side lobes are 26 dB down
        total = np.cumsum(np.pad(slow, DRIFT_SAMPLES // 2))
        slow = (total[DRIFT_SAMPLES:] - total[:-DRIFT_SAMPLES]) / DRIFT_SAMPLES
    return (samples - slow).astype(np.float32)


def word_events(
    words: Sequence[tuple[str, int]], end: int, pcm: np.ndarray, sample_rate_hz: int
) -> list[Event]:
    """When each word sounds; a word lasts until the next one begins.

    espeak-ng counts the closure before a first t or p, up to 80 ms of silence, as the word; nobody hears it.

    Args:
        words: each word and the sample at which it begins.
        end: the sample after the last word.
        pcm: the sound (N,).
    """
    audible = int(np.argmax(np.abs(pcm) > AUDIBLE * np.abs(pcm).max()))
    starts = [max(start, audible) for _, start in words]
    borders_s = [round(sample / sample_rate_hz, 4) for sample in (*starts, end)]
    return [
        Event("word", word, start_s, end_s)
        for (word, _), (start_s, end_s) in zip(words, itertools.pairwise(borders_s), strict=True)
    ]


def timeline(words: Sequence[Event], lead_s: float) -> tuple[Event, ...]:
    """The words as they lie in the finished clip, after `lead_s` of silence."""
    return tuple(
        Event(word.track, word.value, round(lead_s + word.start_s, 4), round(lead_s + word.end_s, 4))
        for word in words
    )


class Helper:
    """The speaking process, for as long as the `with` block lasts."""

    def __enter__(self) -> Self:
        # Started in the folder that holds the package, so that it is found installed or not.
        self._process = subprocess.Popen(
            [sys.executable, "-m", espeak.__name__],
            cwd=Path(espeak.__file__).parents[2],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )
        try:
            hello = json.loads(self._read(espeak.READY))
        except BaseException:
            self.close()
            raise
        self.sample_rate_hz: int = hello["sample_rate_hz"]
        self.version: str = hello["version"]
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """End the process; it leaves when its input closes."""
        assert self._process.stdin
        assert self._process.stdout
        self._process.stdin.close()
        self._process.stdout.close()
        self._process.wait()

    def speak(self, plan: ClipPlan, seed: int) -> tuple[np.ndarray, list[Event]]:
        """One planned clip as espeak-ng says it: samples (N,) float32 at 16 kHz, and its words in them.

        Raises:
            BadInput: espeak-ng has no such voice or variant, or a number is out of range.
        """
        fields = ("text", "voice", "variant", "rate_wpm", "pitch", "range", "volume")
        request: dict[str, Any] = {name: plan.parameters[name] for name in fields}
        request |= {"key": plan.key, "seed": seed}
        assert self._process.stdin
        self._process.stdin.write(json.dumps(request).encode() + b"\n")
        self._process.stdin.flush()
        said, _, content = self._read(espeak.SOUND).partition(b"\n")
        pcm = np.frombuffer(content, "<i2").astype(np.float32) / PCM16_SCALE
        events = word_events(**json.loads(said), pcm=pcm, sample_rate_hz=self.sample_rate_hz)
        return soxr.resample(pcm, self.sample_rate_hz, SAMPLE_RATE_HZ, quality="HQ"), events

    def _read(self, expected: int) -> bytes:
        assert self._process.stdout
        header = self._process.stdout.read(espeak.FRAME_HEADER.size)
        if len(header) < espeak.FRAME_HEADER.size:
            self._process.wait()
            raise BadInput(f"the espeak-ng helper ended with exit status {self._process.returncode}.")
        status, length = espeak.FRAME_HEADER.unpack(header)
        body = self._process.stdout.read(length)
        if status == espeak.REFUSED:
            raise BadInput(body.decode())
        if status != expected or len(body) < length:
            raise BadInput("the espeak-ng helper answered out of turn; run again.")
        return body
