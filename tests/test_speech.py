"""Sounds we make ourselves: timelines true to the sound, melodies told apart, the same bytes at any hour."""

import io
import itertools
import math
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from omni_model.artifacts import AudioCorpus
from omni_model.audio import corpora, espeak, label_ranges, speech, texture, waveform
from omni_model.audio.clips import SPLITS, ClipPlan
from omni_model.config import BadInput, SpeechRecipe, SplitSizes, TextureRecipe
from tests.small_sound import SEED, make

RATE_HZ = waveform.SAMPLE_RATE_HZ
VOICED, MIN_F0_HZ, MAX_F0_HZ = 0.7, 60, 400


@pytest.fixture(scope="module")
def helper() -> Iterator[speech.Helper]:
    pytest.importorskip("espeakng_loader")
    with speech.Helper() as started:
        yield started


def request(text: str = "seven blue cats.", **changes: Any) -> ClipPlan:
    parameters = {
        "text": text,
        "voice": "gmw/en-US",
        "variant": "m3",
        "rate_wpm": 160,
        "pitch": 50,
        "range": 50,
        "volume": 100,
    }
    return ClipPlan("clip", "train", {}, {**parameters, **changes}, transcript="seven blue cats")


# --- the speaking process --------------------------------------------------------------------------


def test_helper_needs_neither_torch_nor_numpy() -> None:
    code = "import sys, omni_model.audio.espeak; sys.exit(bool({'torch', 'numpy'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], cwd=Path(espeak.__file__).parents[2]).returncode == 0


def test_speech_is_the_same_in_another_process_at_another_time() -> None:
    pytest.importorskip("espeakng_loader")
    variants = ("whisper", "whisperf", "f3", "f5", "m3", "croak")
    with speech.Helper() as one:
        first = {variant: one.speak(request(variant=variant), SEED) for variant in variants}
    time.sleep(2.1)  # espeak-ng's own seed is the clock in seconds
    with speech.Helper() as other:
        other.speak(request(rate_wpm=200), SEED)
        second = {variant: other.speak(request(variant=variant), SEED) for variant in reversed(variants)}
        other_noise, _ = other.speak(request(variant="whisper"), SEED + 1)
    for variant in variants:
        np.testing.assert_array_equal(first[variant][0], second[variant][0])
        assert first[variant][1] == second[variant][1]
    assert not np.array_equal(first["whisper"][0], other_noise)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"variant": "zz"}, "no variant 'zz'"),
        ({"voice": "gmw/en-XX"}, "no voice 'gmw/en-XX'"),
        ({"variant": "../../lang/gmw/de"}, "no variant"),
        ({"rate_wpm": 4_000}, "rate_wpm of clip clip is 4000"),
        ({"range": 100}, "range of clip clip is 100"),
        ({"text": " "}, "clip clip has no text"),
        ({"text": "..."}, "could not speak clip clip"),
    ],
)
def test_what_espeak_would_silently_replace_is_refused(
    changes: dict[str, Any], says: str, helper: speech.Helper
) -> None:
    with pytest.raises(BadInput, match=says):
        helper.speak(request(**changes), SEED)
    assert len(helper.speak(request(), SEED)[0]) > 8_000  # and it still speaks


def test_the_voice_files_are_as_the_tables_say() -> None:
    pytest.importorskip("espeakng_loader")
    _, data = espeak.load_library()
    accents = {accent for accents in speech.ACCENTS.values() for accent in accents}
    assert accents <= espeak.voice_files(data / "lang")
    for voice, splits in speech.VARIANTS.items():
        for variant in itertools.chain(*splits.values()):
            lines = (data / "voices" / "!v" / variant).read_text(errors="replace").splitlines()
            given = [line.split()[1:3] for line in lines if line.split()[:1] == ["pitch"]]
            low, high = (float(value) for value in (given or [["82", "118"]])[0])
            melodious = 4 <= 12 * math.log2(high / low) <= 10
            if voice in ("man", "woman"):
                assert melodious == (variant not in speech.UNMELODIOUS), variant


def test_the_missing_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "espeakng_loader", None)
    answers = io.BytesIO()
    espeak.serve(io.BytesIO(), answers)
    status, length = espeak.FRAME_HEADER.unpack(answers.getvalue()[: espeak.FRAME_HEADER.size])
    assert status == espeak.REFUSED
    assert 'pip install "nanochat-omni[espeak]"' in answers.getvalue()[-length:].decode()


# --- when words are said ---------------------------------------------------------------------------


def sounding(samples: np.ndarray, below_peak_db: float) -> np.ndarray:
    """One bool per 5 ms: within so many dB of the loudest."""
    frames = np.pad(samples.astype(np.float64), (0, -len(samples) % 80)).reshape(-1, 80)
    power = np.square(frames).mean(axis=1)
    return power > power.max() * 10 ** (-below_peak_db / 10)


@pytest.mark.parametrize("variant", ["m3", "f1", "whisper"])
@pytest.mark.parametrize("rate_wpm", [110, 150])
def test_words_begin_where_sound_begins_after_a_pause(
    variant: str, rate_wpm: int, helper: speech.Helper
) -> None:
    samples, words = helper.speak(request("seven, six, nine.", variant=variant, rate_wpm=rate_wpm), SEED)
    assert [word.value for word in words] == ["seven", "six", "nine"]
    loud = np.flatnonzero(sounding(samples, 45))
    # The two commas are the two longest silences.
    pauses = sorted(np.argsort(np.diff(loud))[-2:])
    starts_s = [loud[0] / 200, *(loud[pause + 1] / 200 for pause in pauses)]
    np.testing.assert_allclose([word.start_s for word in words], starts_s, atol=0.02)
    assert words[-1].end_s == pytest.approx((loud[-1] + 1) / 200, abs=0.02)


def test_words_of_a_finished_clip_fill_what_sounds(tmp_path: Path) -> None:
    pytest.importorskip("espeakng_loader")
    recipe = SpeechRecipe(clips=SplitSizes(24, 4, 4), clips_per_shard=20)
    corpus = make(AudioCorpus, speech.synthesize, tmp_path, recipe)
    for path in corpora.shard_paths(corpus):
        for _, sound, metadata in corpora.read_shard(path):
            words = metadata["timeline"]
            assert [track for track, *_ in words] == ["word"] * len(words)
            assert " ".join(value for _, value, *_ in words) == metadata["transcript"]
            for before, after in itertools.pairwise(words):
                assert before[2] < before[3] == after[2] < after[3]
            assert words[-1][3] <= metadata["duration_s"]
            if metadata["labels"]["loudness"] in ("medium", "loud"):  # well above the room's noise
                loud = np.flatnonzero(sounding(waveform.decode(sound), 26)) / 200
                # An h at the start and a p at the end are faint; some voices trail an echo of 60 ms.
                assert -0.02 < loud[0] - words[0][2] < 0.1, metadata
                assert -0.1 < words[-1][3] - loud[-1] < 0.15, metadata


def test_no_voice_drifts(helper: speech.Helper) -> None:
    hum = 0.3 * np.sin(2 * np.pi * 80 * np.arange(16_000) / RATE_HZ)
    kept = speech.without_drift((hum + np.linspace(-0.2, 0.2, 16_000)).astype(np.float32))
    np.testing.assert_allclose(kept[1000:-1000], hum[1000:-1000], atol=0.02)
    for plan in speech.plan_split(SpeechRecipe(clips=SplitSizes(24, 4, 4)), "train", SEED):
        finished = speech.finish(helper.speak(plan, SEED)[0], plan, SEED)
        power = np.abs(np.fft.rfft(finished)) ** 2
        assert power[: round(10 * len(finished) / RATE_HZ)].sum() < 0.01 * power.sum(), plan


# --- melody ----------------------------------------------------------------------------------------


def fundamental_semitones(samples: np.ndarray) -> np.ndarray:
    """The pitch of each voiced 10 ms (M,), from the strongest peak of the autocorrelation."""
    shape = np.hanning(800)
    lags = np.arange(RATE_HZ // MAX_F0_HZ, RATE_HZ // MIN_F0_HZ)
    starts = np.arange(0, len(samples) - 800, 160)
    frames = samples[starts[:, None] + np.arange(800)] * shape
    power = np.square(frames).mean(axis=1)

    def autocorrelation(sounds: np.ndarray) -> np.ndarray:
        found = np.fft.irfft(np.abs(np.fft.rfft(sounds, 2048)) ** 2)
        return found[:, lags] / found[:, :1]

    # Of two peaks alike, the shorter lag is the pitch and the longer its octave below.
    frames = frames[power > power.max() / 100]
    likeness = autocorrelation(frames) / autocorrelation(shape[None]) * (1 - 0.15 * lags / lags[-1])
    voiced = likeness.max(axis=1) > VOICED
    return 12 * np.log2(RATE_HZ / lags[likeness.argmax(axis=1)][voiced])


def test_melodies_are_heard_in_the_pitch(helper: speech.Helper) -> None:
    plans = speech.plan_split(SpeechRecipe(clips=SplitSizes(240, 4, 4)), "train", SEED)
    told = [plan for plan in plans if "melody" in plan.labels and plan.labels["pace"] in ("calm", "slow")]
    right = Counter[bool]()
    for plan in told:
        pitch = fundamental_semitones(helper.speak(plan, SEED)[0])
        spread = np.ptp(np.percentile(pitch, [10, 90]))
        rise = np.median(pitch[-3:]) - pitch[-25:].min()
        moving = "asking" if rise > max(1, 0.35 * spread) else "lively" if spread > 4.5 else "natural"
        right[plan.labels["melody"] == ("monotone" if spread < 1.4 else moving)] += 1
    assert len(told) > 30
    assert right[True] > 0.9 * len(told)


def test_melody_is_told_only_where_it_can_be_heard() -> None:
    for split in SPLITS:
        plans = speech.plan_split(SpeechRecipe(), split, SEED)
        told = Counter(plan.labels["melody"] for plan in plans if "melody" in plan.labels)
        assert max(told.values()) - min(told.values()) <= 1
        assert set(told) == set(speech.MELODIES)
        for plan in plans:
            heard = plan.labels["voice"] in ("man", "woman") and " " in plan.transcript
            heard &= plan.labels["pace"] != "hurried"
            assert ("melody" in plan.labels) == (
                heard and plan.parameters["variant"] not in speech.UNMELODIOUS
            )
            assert plan.parameters["text"].endswith("?") == (plan.labels.get("melody") == "asking")
            if "melody" in plan.labels:
                cell = speech.INTONATION[plan.labels["melody"]].cell(plan.parameters["range"])
                assert cell in label_ranges.CELLS[split]


def test_manners_are_balanced_and_tell_nothing_of_each_other() -> None:
    plans = speech.plan_split(SpeechRecipe(), "train", SEED)
    manners = ("voice", "pace", "loudness", "melody")
    for one, other in itertools.combinations(manners, 2):
        pairs = [(plan.labels[one], plan.labels[other]) for plan in plans if {one, other} <= set(plan.labels)]
        counts = Counter(first for first, _ in pairs)
        limit = 2.0 if {one, other} == {"voice", "melody"} else 1.35  # fewer women than men are melodious
        assert max(counts.values()) <= limit * min(counts.values()), (one, other, counts)
        table = np.array(
            [
                [pairs.count((a, b)) for b in sorted({b for _, b in pairs})]
                for a in sorted({a for a, _ in pairs})
            ]
        )
        expected = table.sum(1, keepdims=True) * table.sum(0, keepdims=True) / table.sum()
        # Chi squared over its degrees of freedom is 1 where two labels are independent.
        freedom = (table.shape[0] - 1) * (table.shape[1] - 1)
        assert ((table - expected) ** 2 / expected).sum() / freedom < 3, (one, other, table)


# --- speech corpus ---------------------------------------------------------------------------------


def test_speech_corpus(tmp_path: Path) -> None:
    pytest.importorskip("espeakng_loader")
    recipe = SpeechRecipe(clips=SplitSizes(24, 12, 12), clips_per_shard=20)
    corpus = make(AudioCorpus, speech.synthesize, tmp_path / "one", recipe)
    again = make(AudioCorpus, speech.synthesize, tmp_path / "two", recipe)
    assert corpus.digest == again.digest
    levels: dict[str, list[float]] = {}
    for path in corpora.shard_paths(corpus):
        for _, sound, metadata in corpora.read_shard(path):
            samples = waveform.decode(sound)
            assert metadata["duration_s"] <= recipe.max_duration_s
            assert {*metadata["transcript"].split()} <= {*metadata["labels"].values()}
            assert np.mean(np.abs(samples) > 0.99) < 1e-3
            levels.setdefault(metadata["labels"]["loudness"], []).append(np.sqrt(np.mean(samples**2)))
    assert max(levels["faint"]) < min(levels["medium"])
    assert max(levels["soft"]) < min(levels["loud"])


def test_a_phrase_that_outlasts_the_recipe_is_refused(tmp_path: Path) -> None:
    pytest.importorskip("espeakng_loader")
    recipe = SpeechRecipe(clips=SplitSizes(4, 4, 4), max_duration_s=0.3)
    with pytest.raises(BadInput, match=r"speech\.max_duration_s"):
        make(AudioCorpus, speech.synthesize, tmp_path, recipe)


# --- tones and beeps -------------------------------------------------------------------------------


def loud_plans(kind: str, count: int) -> list[ClipPlan]:
    """Plans well above the room's noise, steady in loudness, and without overtones."""
    plans = texture.plan_split(TextureRecipe(clips=SplitSizes(400, 4, 4)), "train", SEED)
    steady = {"overtones": [], "level_dbfs": -20.0, "tremolo_hz": 0.0}
    chosen = [plan for plan in plans if plan.parameters["kind"] == kind]
    return [replace(plan, parameters={**plan.parameters, **steady}) for plan in chosen[:count]]


def test_beeps_sound_when_the_timeline_says() -> None:
    for plan in loud_plans("beeps", 40):
        samples = np.abs(texture.render(plan, SEED))
        peaks = np.array(
            [samples[i : i + 80].max() for i in range(0, len(samples) - 80, 8)]
        )  # 5 ms, each 0.5 ms
        on = np.concatenate([[False], peaks > 0.15 * peaks.max(), [False]])
        edges = np.flatnonzero(on[1:] != on[:-1]).reshape(-1, 2)
        heard_s = edges * 8 / RATE_HZ + [80 / RATE_HZ, 0]
        told = [(event.start_s, event.end_s) for event in texture.timeline(plan.parameters)]
        np.testing.assert_allclose(heard_s, told, atol=0.005)
        assert {event.track for event in texture.timeline(plan.parameters)} == {"beep"}


def test_tones_swell_as_the_timeline_says() -> None:
    plans = texture.plan_split(TextureRecipe(clips=SplitSizes(120, 1, 1)), "train", SEED)
    checked = 0
    for plan in (plan for plan in plans if plan.parameters["kind"] == "tone"):
        p = plan.parameters
        swells = [event for event in texture.timeline(p) if event.track == "swell"]
        assert (swells[0].start_s, swells[-1].end_s) == (0, p["duration_s"])
        if plan.labels["tremolo"] in ("plain", "buzzing"):
            steady = "steady" if plan.labels["tremolo"] == "plain" else "rough"
            assert [event.value for event in swells] == [steady]
            continue
        samples = texture.render(plan, SEED).astype(np.float64)
        power = np.convolve(samples**2, np.ones(320) / 320, mode="same")  # over 20 ms
        turns = [(event.value, round(event.end_s * RATE_HZ)) for event in swells[1:-2]]
        low = [power[place] for value, place in turns if value == "down"]
        high = [power[place] for value, place in turns if value == "up"]
        if low and high:
            assert max(low) < 0.5 * min(high), p
            checked += 1
    assert checked > 10


def test_tones_have_their_pitch_and_move_as_the_timeline_says() -> None:
    moves = Counter[str]()
    for plan in loud_plans("tone", 60):
        p = plan.parameters
        spectrum = np.fft.fft(texture.render(plan, SEED).astype(np.float64))
        spectrum[len(spectrum) // 2 :] = 0
        phase = np.unwrap(np.angle(np.fft.ifft(spectrum)))

        def pitch_at(time_s: float, phase: np.ndarray = phase) -> float:
            """Semitones over 1 Hz, from the phase of the analytic signal over 20 ms."""
            middle = min(max(round(time_s * RATE_HZ), 640), len(phase) - 641)
            turns = (phase[middle + 160] - phase[middle - 160]) / (2 * math.pi)
            return 12 * math.log2(turns * RATE_HZ / 320)

        events = texture.timeline(p)
        assert {event.track for event in events} == {"motion", "swell"}
        events = [event for event in events if event.track == "motion"]
        assert events[0].start_s == 0
        assert events[-1].end_s == p["duration_s"]
        assert all(one.end_s == other.start_s for one, other in itertools.pairwise(events))
        if p["contour"] in ("rising", "falling", "level"):
            middle = pitch_at(p["duration_s"] / 2)
            assert middle == pytest.approx(12 * math.log2(p["frequency_hz"]), abs=0.1), plan
            span = pitch_at(p["duration_s"] - 0.05) - pitch_at(0.05)
            share = 1 - 0.1 / p["duration_s"]
            sign = {"rising": 1, "falling": -1, "level": 0}[p["contour"]]
            assert span == pytest.approx(sign * p["contour_semitones"] * share, abs=0.3), plan
        for event in events:
            length_s = event.end_s - event.start_s
            if length_s > 0.1:
                change = pitch_at(event.end_s - length_s / 4) - pitch_at(event.start_s + length_s / 4)
                heard = "flat" if abs(change) < 0.3 else "up" if change > 0 else "down"
                assert heard == event.value, (plan, event)
                moves[event.value] += 1
    assert min(moves[value] for value in ("up", "down", "flat")) >= 10


def test_every_clip_lasts_as_long_as_planned() -> None:
    for plan in texture.plan_split(TextureRecipe(clips=SplitSizes(40, 4, 4)), "train", SEED):
        assert len(texture.render(plan, SEED)) == round(plan.parameters["duration_s"] * RATE_HZ)
