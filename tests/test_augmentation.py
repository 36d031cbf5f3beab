"""Recording conditions: measured in the sound, dealt fairly, and with labels that are still true."""

import json
import math
import time
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from omni_model.artifacts import AudioCorpus
from omni_model.audio import augmentation, corpora, texture
from omni_model.audio.clips import SPLITS, Clip, ClipPlan, Event, clip_rng
from omni_model.audio.label_ranges import CELLS, LOUDNESS_DBFS, Range, level_dbfs
from omni_model.audio.waveform import SAMPLE_RATE_HZ
from omni_model.config import AugmentRecipe, BadInput, Runtime, SplitSizes, TextureRecipe
from omni_model.storage import Workspace
from tests.small_sound import SEED, make

RECIPE = AugmentRecipe()
SOURCE = TextureRecipe(clips=SplitSizes(train=160, validation=40, test=40), clips_per_shard=40)


def augment(directory: Path, corpus: AudioCorpus, recipe: AugmentRecipe = RECIPE, seed: int = SEED) -> Any:
    return make(AudioCorpus, augmentation.augment, directory, recipe, corpus, seed=seed)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> dict[str, AudioCorpus]:
    root = tmp_path_factory.mktemp("augmentation")
    source = make(AudioCorpus, texture.synthesize, root / "source", SOURCE)
    return {"source": source, "augmented": augment(root / "augmented", source)}


def clips(corpus: AudioCorpus) -> dict[str, tuple[np.ndarray, dict[str, Any]]]:
    return {
        key: (augmentation.read_pcm(content), metadata)
        for path in corpora.shard_paths(corpus)
        for key, content, metadata in corpora.read_shard(path)
    }


def condition_of(metadata: Mapping[str, Any]) -> str:
    return str(metadata["provenance"]["augmentation"]["name"])


def tone(frequency_hz: float, duration_s: float = 1.5, amplitude: float = 0.1) -> np.ndarray:
    time_s = np.arange(round(duration_s * SAMPLE_RATE_HZ)) / SAMPLE_RATE_HZ
    return (amplitude * np.sin(2 * np.pi * frequency_hz * time_s)).astype(np.float32)


def white(duration_s: float = 2.0) -> np.ndarray:
    rng = np.random.default_rng(3)
    return (0.1 * rng.standard_normal(round(duration_s * SAMPLE_RATE_HZ))).astype(np.float32)


def run(
    condition: str, samples: np.ndarray, split: str = "train", colour: str = "white", number: int = 0
) -> Any:
    rng = clip_rng(SEED, f"{condition}/{number}")
    return augmentation.CONDITIONS[condition](samples, rng, split, colour)


def power(samples: np.ndarray) -> float:
    return float(np.mean(np.square(samples, dtype=np.float64)))


# --- what each condition does, measured ----------------------------------------------------------


@pytest.mark.parametrize("colour", list(texture.NOISE_TILT))
def test_noise_lies_under_the_sound_by_what_is_stated(colour: str) -> None:
    for number in range(5):
        sound = tone(440)
        done = run("noisy", sound, colour=colour, number=number)
        noise = done.samples - sound
        assert 10 * math.log10(power(sound) / power(noise)) == pytest.approx(
            done.parameters["snr_db"], abs=0.2
        )
        assert done.noise == colour
        if colour != "crackle":
            spectrum = np.abs(np.fft.rfft(noise, 16_384)) ** 2
            hz = np.fft.rfftfreq(16_384, 1 / SAMPLE_RATE_HZ)
            low, high = (spectrum[(hz > f / 1.4) & (hz < f * 1.4)].mean() for f in (200, 3200))
            tilt = math.log2(low / high) / 2 / math.log2(16)
            assert tilt == pytest.approx(done.parameters["tilt"], abs=0.12)


def test_a_room_rings_for_as_long_as_is_stated() -> None:
    for number in range(8):
        click = np.zeros(8_000, np.float32)
        click[0] = 0.5
        done = run("echoing", click, number=number)
        energy = np.square(done.samples, dtype=np.float64)
        direct, room = energy[0], energy[1:].sum()
        assert 10 * math.log10(direct / room) == pytest.approx(done.parameters["direct_db"], abs=0.3)
        # Schroeder's backward integral of the room's part falls by 60 dB in RT60; read from -5 to -25 dB.
        decay_db = 10 * np.log10(np.cumsum(energy[:0:-1])[::-1][:-400] / room)
        begin, end = (int(np.argmax(decay_db < level)) for level in (-5, -25))
        rt60_s = 3 * (end - begin) / SAMPLE_RATE_HZ
        assert rt60_s == pytest.approx(done.parameters["rt60_s"], rel=0.12)
        grown_s = (len(done.samples) - len(click)) / SAMPLE_RATE_HZ
        assert grown_s == pytest.approx(done.parameters["rt60_s"] * 2 / 3, abs=0.001)


def test_a_telephone_passes_its_band_alone() -> None:
    sound = white()
    for number in range(5):
        done = run("telephone", sound, number=number)
        spectrum = np.abs(np.fft.rfft(done.samples.astype(np.float64))) ** 2
        before = np.abs(np.fft.rfft(sound.astype(np.float64))) ** 2
        hz = np.fft.rfftfreq(len(sound), 1 / SAMPLE_RATE_HZ)
        low, high = done.parameters["low_hz"], done.parameters["high_hz"]
        inside = (hz > low * 1.02) & (hz < high * 0.98)
        assert spectrum[inside].sum() / before[inside].sum() == pytest.approx(1, abs=0.02)
        assert spectrum[(hz < low * 0.88) | (hz > high * 1.12)].sum() < 0.003 * spectrum.sum()


def test_mu_law_is_g711s_curve_at_8_bits() -> None:
    values = np.linspace(-1, 1, 20_001)
    packed = augmentation.mu_law(values)
    assert len(np.unique(packed)) == 255
    assert packed.max() == pytest.approx(1)
    np.testing.assert_allclose(packed, values, atol=0.025)
    soft = np.abs(values) < 0.01
    np.testing.assert_allclose(packed[soft], values[soft], atol=3e-4)  # fine steps where sound is soft


def test_a_telephone_loses_what_it_cannot_carry() -> None:
    hum = run("telephone", tone(110))
    assert hum.failed
    assert hum.samples is not None
    assert run("telephone", tone(1_000)).lost == ()
    rising = np.sin(2 * np.pi * np.cumsum(np.linspace(2_600, 4_800, 24_000)) / SAMPLE_RATE_HZ)
    assert {"pitch", "contour", "motion"} <= set(run("telephone", rising.astype(np.float32)).lost)


def test_distortion_cuts_off_at_the_stated_gain() -> None:
    sound = white()
    done = run("distorted", sound)
    peak, limit = np.abs(sound).max(), np.abs(done.samples).max()
    assert 20 * math.log10(peak / limit) == pytest.approx(done.parameters["gain_db"], abs=0.01)
    inside = np.abs(sound) < limit
    np.testing.assert_array_equal(done.samples[inside], sound[inside])


def test_conditions_are_the_grammars() -> None:
    grammar = json.loads((Path(augmentation.__file__).parents[1] / "text" / "grammar.json").read_text())
    options = tuple(grammar["categories"]["recording"]["options"])
    assert tuple(augmentation.CONDITIONS) == options == RECIPE.conditions


# --- the corpus ------------------------------------------------------------------------------------


def test_clean_clips_are_the_same_bytes_and_all_keep_their_key(made: dict[str, AudioCorpus]) -> None:
    before, after = clips(made["source"]), clips(made["augmented"])
    assert list(before) == list(after)
    for key, (samples, metadata) in after.items():
        if condition_of(metadata) == "clean":
            np.testing.assert_array_equal(samples, before[key][0])
        else:
            assert not np.array_equal(samples[: len(before[key][0])], before[key][0])


def test_conditions_are_dealt_in_equal_shares_whatever_the_labels(made: dict[str, AudioCorpus]) -> None:
    rows = [metadata for _, metadata in clips(made["augmented"]).values()]
    dealt = {
        row["key"]: row["provenance"]["augmentation"].get("instead_of", condition_of(row)) for row in rows
    }
    for split in SPLITS:
        counts = Counter(dealt[row["key"]] for row in rows if row["split"] == split)
        assert counts == dict.fromkeys(RECIPE.conditions, sum(counts.values()) / len(RECIPE.conditions))
    colours = Counter(
        row["provenance"]["augmentation"]["noise"] for row in rows if condition_of(row) == "noisy"
    )
    assert max(colours.values()) <= 1.35 * min(colours.values())
    source = {metadata["key"]: metadata["labels"] for _, metadata in clips(made["source"]).values()}
    for category in ("loudness", "pitch", "noise"):
        pairs = [(source[key][category], name) for key, name in dealt.items() if category in source[key]]
        assert association(pairs) < 0.15, category


def association(pairs: list[tuple[str, str]]) -> float:
    """Cramer's V of two labels, squared and without its bias (Bergsma 2013)."""
    firsts, seconds = (sorted(set(values)) for values in zip(*pairs, strict=True))
    table = np.zeros((len(firsts), len(seconds)))
    for first, second in pairs:
        table[firsts.index(first), seconds.index(second)] += 1
    expected = table.sum(1, keepdims=True) * table.sum(0, keepdims=True) / table.sum()
    phi2 = float(((table - expected) ** 2 / expected).sum() / table.sum())
    freedom = (len(firsts) - 1) * (len(seconds) - 1)
    return max(0.0, phi2 - freedom / (len(pairs) - 1)) / (min(len(firsts), len(seconds)) - 1)


RANGES: dict[str, Range] = {
    "snr_db": augmentation.SNR_DB,
    "rt60_s": augmentation.RT60_S,
    "direct_db": augmentation.DIRECT_DB,
    "low_hz": augmentation.BAND_LOW_HZ,
    "high_hz": augmentation.BAND_HIGH_HZ,
    "gain_db": augmentation.CLIP_GAIN_DB,
    "clicks_hz": texture.CRACKLE_CLICKS_HZ,
}


def test_splits_share_no_cell_of_any_parameter(made: dict[str, AudioCorpus]) -> None:
    seen: set[tuple[str, str]] = set()
    for _, metadata in clips(made["augmented"]).values():
        told = metadata["provenance"]["augmentation"]
        ranges = {**RANGES, "tilt": texture.NOISE_TILT.get(told.get("noise", ""), Range(0, 1))}
        for name in ranges.keys() & told.keys():
            assert ranges[name].cell(told[name]) in CELLS[metadata["split"]], told
            seen.add((metadata["split"], name))
        assert told["seed"] == SEED
    assert {("train", name) for name in RANGES} <= seen
    assert {("test", "snr_db"), ("validation", "rt60_s")} <= seen


def test_labels_are_what_can_still_be_heard(made: dict[str, AudioCorpus]) -> None:
    source = clips(made["source"])
    met: Counter[str] = Counter()
    for key, (samples, metadata) in clips(made["augmented"]).items():
        before, after, name = source[key][1]["labels"], metadata["labels"], condition_of(metadata)
        met[name] += 1
        noise_alone = "noise" in before
        assert after.get("recording") == (None if noise_alone and name in ("noisy", "distorted") else name)
        if name == "noisy" and not noise_alone:
            assert after["noise"] == metadata["provenance"]["augmentation"]["noise"]
        if name == "noisy" and noise_alone:
            assert "noise" not in after
        if name == "distorted":
            assert "tremolo" not in after
        if name == "echoing" and before.get("noise") == "crackle":
            assert "noise" not in after
        if name in ("clean", "echoing") and "pitch" in before:
            assert {k: after[k] for k in before} == before
        if name in ("clean", "noisy", "echoing", "distorted"):
            told = source[key][1].get("timeline", [])
            heard = [event for event in told if name != "distorted" or event[0] != "swell"]
            assert metadata.get("timeline", []) == heard
        for category in after.keys() - {"recording", "noise"}:
            assert after[category] == before[category]
        if "loudness" in after:
            level, values = level_dbfs(samples, 15), LOUDNESS_DBFS[after["loudness"]]
            as_before = abs(level - level_dbfs(source[key][0], 15)) <= 1
            assert as_before or values.low - 1 <= level <= values.high + 1, metadata
    assert min(met.values()) >= 40


def test_a_clip_that_cannot_stay_as_loud_is_measured_anew() -> None:
    # Full-scale bursts in silence: with noise under them the level holds, but with flat tops it cannot.
    rng = np.random.default_rng(0)
    before = np.zeros(16_000, np.float32)
    before[::400] = 0.999
    metadata: dict[str, Any] = {
        "key": "clip-1",
        "split": "train",
        "transcript": "",
        "speaker": "",
        "licence": "x",
        "labels": {"loudness": "loud"},
        "provenance": {},
    }
    finished = (before * 0.3 + 0.001 * rng.standard_normal(16_000)).astype(np.float32)
    done = augmentation.Recorded(finished)
    labels = augmentation.heard_labels(metadata["labels"], "echoing", done, finished, before)
    level = level_dbfs(finished, 15)
    told = [name for name, values in LOUDNESS_DBFS.items() if values.low - 1 <= level <= values.high + 1]
    assert labels == {**({"loudness": told[0]} if told else {}), "recording": "echoing"}
    assert told != ["loud"]


def test_words_keep_their_times_and_recordings_their_names(tmp_path: Path) -> None:
    """A corpus of recordings, as an import makes it: no labels, a transcript, a licence, changes."""

    def clip(plan: ClipPlan) -> Clip:
        return Clip(tone(300, 2.0), timeline=(Event("word", "HELLO", 0.1, 0.5),), changes=("resampled",))

    plans = [
        ClipPlan(f"r-{n}", "train", {}, {"file": f"{n}.flac"}, "HELLO", "84", "CC BY 4.0") for n in range(10)
    ]

    def recordings(*, work: Workspace, runtime: Runtime) -> dict[str, Any]:
        return corpora.write_corpus(plans, clip, generator="librispeech", clips_per_shard=5, work=work)

    source = make(AudioCorpus, recordings, tmp_path / "source")
    rows = corpora.read_clips(augment(tmp_path / "augmented", source))
    for row, plan in zip(rows, plans, strict=True):
        assert (row["transcript"], row["speaker"], row["licence"]) == ("HELLO", "84", "CC BY 4.0")
        assert row["provenance"]["generator"] == "librispeech"
        assert row["provenance"]["file"] == plan.parameters["file"]
        assert row["timeline"] == [["word", "HELLO", 0.1, 0.5]]
        assert row["changes"] == ["resampled"]
        assert row["labels"]["recording"] == condition_of(row)
        assert (row["duration_s"] > 2) == (condition_of(row) == "echoing")
    assert Counter(map(condition_of, rows)) == dict.fromkeys(RECIPE.conditions, 2)


# --- the stage -------------------------------------------------------------------------------------


def test_the_same_bytes_undisturbed_or_killed(
    tmp_path: Path, made: dict[str, AudioCorpus], monkeypatch: pytest.MonkeyPatch
) -> None:
    record, recorded = augmentation.record_clip, []

    def dies_at_clip_100(*arguments: Any) -> Any:
        recorded.append(arguments)
        if len(recorded) == 100:
            raise KeyboardInterrupt
        return record(*arguments)

    monkeypatch.setattr(augmentation, "record_clip", dies_at_clip_100)
    with pytest.raises(KeyboardInterrupt):
        augment(tmp_path, made["source"])
    again = augment(tmp_path, made["source"])
    assert again.digest == made["augmented"].digest
    assert len(recorded) == 100 + 240 - 80  # two finished shards of 40 were not made again


def test_a_changed_shard_changes_no_other(tmp_path: Path, made: dict[str, AudioCorpus]) -> None:
    longer = TextureRecipe(clips=SplitSizes(train=170, validation=40, test=40), clips_per_shard=40)
    grown = augment(tmp_path / "grown", make(AudioCorpus, texture.synthesize, tmp_path / "source", longer))
    old, new = (
        {shard["name"]: shard["sha256"] for shard in corpora.read_index(corpus)["shards"]}
        for corpus in (made["augmented"], grown)
    )
    assert {name: new[name] for name in old} == old
    assert len(new) == len(old) + 1


def test_another_seed_deals_anew(tmp_path: Path, made: dict[str, AudioCorpus]) -> None:
    rows = [
        [condition_of(row) for row in corpora.read_clips(corpus)]
        for corpus in (made["augmented"], augment(tmp_path, made["source"], seed=SEED + 1))
    ]
    assert np.mean([one == other for one, other in zip(*rows, strict=True)]) < 0.4


@pytest.mark.parametrize("conditions", [("clean", "underwater"), ("noisy", "noisy"), ()])
def test_conditions_that_make_no_sense_are_refused(
    conditions: tuple[str, ...], tmp_path: Path, made: dict[str, AudioCorpus]
) -> None:
    with pytest.raises(BadInput, match=r"AugmentRecipe\.conditions"):
        augment(tmp_path, made["source"], AugmentRecipe(conditions))
    assert list((tmp_path / "out").iterdir()) == []


def test_a_clip_of_two_seconds_takes_a_few_milliseconds(made: dict[str, AudioCorpus]) -> None:
    sound = tone(440, 2.0)
    for condition in RECIPE.conditions:
        taken = []
        for number in range(7):
            begin = time.process_time()
            run(condition, sound, number=number)
            taken.append(time.process_time() - begin)
        assert min(taken) < 0.015, condition  # 1 to 3 ms on an idle core
