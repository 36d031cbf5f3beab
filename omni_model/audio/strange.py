"""Sounds that the listener is not taught, made to find out whether it notices.

Each clip's provenance tells its `kind`; only what is to be understood has labels.

| kind | split | what |
|---|---|---|
| taught | train | phrases of the vocabulary, by voices that no other corpus has |
| nonsense | train | the same voices saying random syllables; random notes; random hisses |
| music, words, noise | test | tunes and chords; English words outside the vocabulary; engines, rain, crowds |
| foreign | test | what is taught, by another synthesizer: Klatt's voices, and tones of other waves |

From the train split is learned what "unlike" means; nothing in it is judged: the words that are judged are
real and never random, and music and noises are made by other functions. Its voices are new because an encoder
hears those that it learned from more clearly than any other, and new ones must not be strange for that alone.

The foreign voices are espeak-ng's second synthesizer (D. Klatt, Software for a cascade/parallel formant
synthesizer, JASA 67, 1980), which makes its sound in another way from the same phonemes. Of the voices of
training only `adam` is one of Klatt's, in a mode that is not used here.
"""

import dataclasses
import itertools
import math
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from omni_model.audio import speech, texture
from omni_model.audio.augmentation import CONDITIONS, record_clip
from omni_model.audio.clips import Clip, ClipPlan, clip_rng
from omni_model.audio.corpora import write_corpus
from omni_model.audio.label_ranges import LOUDNESS_DBFS, ROOM_NOISE_DBFS, at_level, with_room
from omni_model.audio.strange_sounds import HIGHEST_HZ, MUSIC, NOISES, NONSENSE, swell
from omni_model.audio.waveform import SAMPLE_RATE_HZ
from omni_model.config import JSON, Runtime, SpeechRecipe, SplitSizes, StrangeRecipe, TextureRecipe
from omni_model.storage import Workspace

STRANGE = ("music", "words", "noise")
TAUGHT, NONSENSE_KIND, FOREIGN = "taught", "nonsense", "foreign"
DURATION_S = (1.0, 2.8)

UNTAUGHT_WORDS = (
    *("anchor", "basement", "camera", "dentist", "elbow", "feather", "guitar", "honey", "igloo", "jungle"),
    *("kingdom", "lemon", "museum", "nurse", "ocean", "pepper", "quarter", "railway", "sandwich", "tunnel"),
    *("umbrella", "violin", "wagon", "yesterday", "zebra", "arm", "bread", "chair", "drum", "earth", "farm"),
    *("ghost", "hill", "inch", "jump", "knife", "leaf", "moon", "north", "owl", "page", "rope", "ship"),
    *("thumb", "uncle", "vase", "wolf", "yacht", "cheese", "brother", "swim", "plastic", "marble", "tower"),
)
BEGINNINGS = (
    *("b", "d", "f", "g", "h", "j", "k", "l", "m", "n", "p", "r", "s", "t", "v", "w", "y", "z", "ch", "sh"),
    *(
        "th",
        "br",
        "bl",
        "cr",
        "cl",
        "dr",
        "fl",
        "fr",
        "gr",
        "pl",
        "pr",
        "sl",
        "sp",
        "st",
        "sk",
        "tr",
        "tw",
        "",
    ),
)
MIDDLES = ("a", "e", "i", "o", "u", "ee", "oo", "ai", "ou", "ar", "er", "or", "igh", "ay", "oa")
# As words of the vocabulary have them, so that nonsense is not told by its length.
SYLLABLES = (0.72, 0.23, 0.05)
ENDINGS = ("", "", "n", "m", "l", "t", "d", "k", "p", "s", "sh", "ng", "nd", "st", "ft", "x")
# Voices of no other corpus. There are too few women's, whispers and croaks to spare any.
NEW_VOICES = {
    "man": (
        *(
            "Andy",
            "Denis",
            "Diogo",
            "Henrique",
            "Hugo",
            "Marco",
            "Mario",
            "Michael",
            "Mike",
            "Nguyen",
            "Storm",
        ),
        *("antonio", "boris", "grandpa", "gustave", "ian", "iven", "iven2", "john", "kaukovalta", "marcelo"),
        *("max", "miguel", "pedro", "quincy", "rob", "robert", "sandro", "travis", "zac"),
    ),
    "woman": ("linda", "shelby", *speech.VARIANTS["woman"]["train"]),
    "whisper": speech.VARIANTS["whisper"]["train"],
    "croak": speech.VARIANTS["croak"]["train"],
}
RECORDED = 4  # every fourth phrase of the train split is recorded badly
KLATT_VARIANTS = ("klatt", "klatt2", "klatt3", "klatt4")
KLATT_LABELS = ("number", "colour", "animal", "pace", "loudness")  # their voices are all a man's
WAVES = ("square", "triangle", "bell", "plucked")
CROWD = 7


def synthesize_strange(recipe: StrangeRecipe, *, work: Workspace, runtime: Runtime) -> dict[str, JSON]:
    """Stage: the corpus. Returns the facts of an AudioCorpus.

    Raises:
        BadInput: espeak-ng is not installed or lacks a voice.
    """
    plans = plan_strange(recipe, work.seed)
    with speech.Helper() as helper:

        def make(plan: ClipPlan) -> Clip:
            return render(plan, work.seed, helper)

        return write_corpus(
            plans, make, generator="strange", clips_per_shard=recipe.clips_per_shard, work=work
        )


def plan_strange(recipe: StrangeRecipe, seed: int) -> list[ClipPlan]:
    """Every clip, kinds and styles in turn."""
    styles = {"music": tuple(MUSIC), "noise": (*NOISES, "crowd"), "words": ("phrase",)}
    plans = [*_pairs(recipe.pairs, seed)]
    for number, style in zip(range(recipe.random_sounds), itertools.cycle(NONSENSE)):  # noqa: B905
        plans.append(_plan(f"strange-random-{number:05d}", "train", NONSENSE_KIND, style, number, seed))
    for kind in STRANGE:
        for number, style in zip(range(recipe.clips_per_kind), itertools.cycle(styles[kind])):  # noqa: B905
            plans.append(_plan(f"strange-{kind}-{number:05d}", "test", kind, style, number, seed))
    return [*plans, *_foreign_voices(recipe.foreign, seed), *_foreign_tones(recipe.foreign, seed)]


def _pairs(count: int, seed: int) -> Iterator[ClipPlan]:
    """Phrases in new voices, and for each as many random words said in the same way."""
    recipe = SpeechRecipe(clips=SplitSizes(count, 1, 1))
    for number, plan in enumerate(
        speech.plan_split(recipe, "train", seed + 1)
    ):  # not the phrases of training
        rng = clip_rng(seed, f"strange-pair-{number}")
        text, end = plan.transcript, plan.parameters["text"][-1]
        manner = {"variant": str(rng.choice(NEW_VOICES[plan.labels["voice"]])), "style": "phrase"}
        if number % RECORDED == 0:
            conditions = [name for name in CONDITIONS if name != "clean"]
            manner["recording"] = conditions[number // RECORDED % len(conditions)]
        for kind in (TAUGHT, NONSENSE_KIND):
            said = text if kind == TAUGHT else " ".join(_words(rng, kind, len(text.split())))
            parameters = plan.parameters | manner | {"kind": kind, "text": said + end}
            yield ClipPlan(f"strange-{kind}-{number:05d}", "train", {}, parameters, transcript=said)


def _plan(key: str, split: str, kind: str, style: str, number: int, seed: int) -> ClipPlan:
    rng = clip_rng(seed, key)
    levels = [*LOUDNESS_DBFS.values()][int(rng.integers(len(LOUDNESS_DBFS)))]
    parameters: dict[str, Any] = {
        "kind": kind,
        "style": style,
        "level_dbfs": round(rng.uniform(levels.low, levels.high), 2),
        "room_dbfs": round(rng.uniform(ROOM_NOISE_DBFS.low, ROOM_NOISE_DBFS.high), 1),
        "duration_s": round(rng.uniform(*DURATION_S), 2),
    }
    if style != "phrase":
        return ClipPlan(key, split, {}, parameters)
    text = " ".join(_words(rng, kind, number % 3 + 1))
    parameters |= _manner(rng, split, number) | {"text": f"{text}."}
    return ClipPlan(key, split, {}, parameters, transcript=text)


def _words(rng: np.random.Generator, kind: str, count: int) -> list[str]:
    if kind != NONSENSE_KIND:
        return [str(word) for word in rng.choice(UNTAUGHT_WORDS, count, replace=False)]
    taught = set(itertools.chain(*speech.WORDS.values()))
    words: list[str] = []
    while len(words) < count:
        syllables = int(rng.choice(len(SYLLABLES), p=SYLLABLES)) + 1
        word = "".join(str(rng.choice(part)) for _ in range(syllables) for part in (BEGINNINGS, MIDDLES))
        word += str(rng.choice(ENDINGS))
        if len(word) > 1 and word not in taught:
            words.append(word)
    return words


def _manner(rng: np.random.Generator, split: str, number: int) -> dict[str, Any]:
    """How it is said: the voices, paces and melodies of this split's speech."""
    voices = [*speech.VARIANTS.values()][number // 3 % len(speech.VARIANTS)][split]
    pace = [*speech.PACE_WPM.values()][int(rng.integers(len(speech.PACE_WPM)))]
    return {
        "voice": str(rng.choice(speech.ACCENTS[split])),
        "variant": str(rng.choice(voices)),
        "rate_wpm": int(rng.uniform(pace.low, pace.high)),
        "pitch": int(rng.uniform(speech.PITCH.low, speech.PITCH.high)),
        "range": int(rng.integers(0, 99)),
        "volume": speech.ESPEAK_VOLUME,
        "lead_s": round(rng.uniform(speech.SILENCE_S.low, speech.SILENCE_S.high), 3),
        "tail_s": round(rng.uniform(speech.SILENCE_S.low, speech.SILENCE_S.high), 3),
    }


def _foreign_voices(count: int, seed: int) -> Iterator[ClipPlan]:
    """The test split's phrases in the accents of training: the synthesizer is all that is new."""
    recipe = SpeechRecipe(clips=SplitSizes(1, 1, count))
    for number, plan in enumerate(speech.plan_split(recipe, "test", seed)):
        voice = speech.ACCENTS["train"][number % len(speech.ACCENTS["train"])]
        variant = KLATT_VARIANTS[number % len(KLATT_VARIANTS)]
        parameters = plan.parameters | {"voice": voice, "variant": variant, "text": f"{plan.transcript}."}
        yield dataclasses.replace(
            plan,
            key=f"strange-voices-{number:05d}",
            labels={name: value for name, value in plan.labels.items() if name in KLATT_LABELS},
            parameters={"kind": FOREIGN, "style": "klatt", **parameters},
            speaker=f"{voice.removeprefix('gmw/')}+{variant}",
        )


def _foreign_tones(count: int, seed: int) -> Iterator[ClipPlan]:
    """The test split's tones and beeps, as other instruments sound."""
    recipe = TextureRecipe(clips=SplitSizes(1, 1, 3 * count))
    plans = [p for p in texture.plan_split(recipe, "test", seed) if p.parameters["kind"] in ("tone", "beeps")]
    for number, plan in enumerate(plans[:count]):
        parameters = plan.parameters | {"kind": FOREIGN, "sounds": plan.parameters["kind"]}
        parameters["style"] = WAVES[number // 2 % len(WAVES)]
        yield dataclasses.replace(plan, key=f"strange-tones-{number:05d}", parameters=parameters)


# --- rendering -----------------------------------------------------------------------------------


def render(plan: ClipPlan, seed: int, helper: speech.Helper) -> Clip:
    """One planned clip."""
    p, rng = plan.parameters, clip_rng(seed, f"{plan.key}/sound")
    if p["style"] in ("phrase", "klatt"):
        spoken, _ = helper.speak(plan, seed)
        samples = speech.finish(spoken, plan, seed)
        if "recording" in p:
            colour = str(rng.choice([*texture.NOISE_TILT]))
            source = {**plan.plain(), "provenance": p}
            samples = record_clip(p["recording"], colour, samples, source, seed)[1].samples
        return Clip(samples, {"espeak_ng": helper.version})
    if p["style"] in WAVES:
        sound = _tone(p)
    elif p["style"] == "crowd":
        sound = _crowd(rng, plan, seed, helper)
    else:
        sound = (MUSIC | NOISES | NONSENSE)[p["style"]](rng, round(p["duration_s"] * SAMPLE_RATE_HZ))
    sound = sound * swell(len(sound), texture.FADE_S)
    return Clip(with_room(at_level(sound, p["level_dbfs"]), p["room_dbfs"], rng))


def _crowd(rng: np.random.Generator, plan: ClipPlan, seed: int, helper: speech.Helper) -> np.ndarray:
    """Several people speaking at once, about nothing that is in the vocabulary."""
    size = round(plan.parameters["duration_s"] * SAMPLE_RATE_HZ)
    sound = np.zeros(size)
    for number in range(CROWD):
        manner = _manner(rng, plan.split, int(rng.integers(6)))  # men and women
        text = " ".join(_words(rng, "words", 5))
        speaker = dataclasses.replace(
            plan, key=f"{plan.key}-{number}", parameters=plan.parameters | manner | {"text": text}
        )
        spoken, _ = helper.speak(speaker, seed)
        sound += np.roll(np.resize(spoken / spoken.std(), size), int(rng.integers(size)))
    return sound


def _tone(p: dict[str, Any]) -> np.ndarray:
    """What `texture.render` plays on its own harmonic tones, with another wave."""
    time_s = np.arange(round(p["duration_s"] * SAMPLE_RATE_HZ)) / SAMPLE_RATE_HZ
    envelope = np.ones_like(time_s)
    if p["sounds"] == "beeps":
        frequency_hz, envelope = np.full_like(time_s, p["frequency_hz"]), texture.beep_envelope(p, time_s)
    else:
        frequency_hz = p["frequency_hz"] * np.exp2(texture.contour_semitones(p, time_s) / 12)
        if p["tremolo_hz"]:
            wave = np.cos(2 * math.pi * p["tremolo_hz"] * time_s)
            envelope = envelope * (1 - p["tremolo_depth"] * (0.5 - 0.5 * wave))
    phase = 2 * math.pi * np.cumsum(frequency_hz) / SAMPLE_RATE_HZ
    orders = range(1, int(HIGHEST_HZ // frequency_hz.max()) + 1)
    if p["style"] == "bell":  # frequency modulation; J. Chowning, JAES 21, 1973
        return np.asarray(envelope * np.sin(phase + 0.8 * np.sin(2 * phase)))
    if p["style"] == "plucked":
        decays = (np.exp(-time_s * (0.4 + 0.8 * n)) for n in orders)
        strings = sum(decay * np.sin(n * phase) / n for n, decay in zip(orders, decays, strict=True))
        return np.asarray(envelope * strings)
    fall = 1 if p["style"] == "square" else 2
    odd: Sequence[int] = [n for n in orders if n % 2]
    return np.asarray(
        envelope * sum((-1) ** (n // 2 * (fall - 1)) * np.sin(n * phase) / n**fall for n in odd)
    )
