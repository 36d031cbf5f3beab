"""Corpora: the same bytes every time, what was left out is counted, splits that stay apart, true labels."""

import io
import itertools
import json
import wave
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from omni_model.artifacts import AudioCorpus
from omni_model.audio import clips, corpora, label_ranges, sines, speech, texture
from omni_model.config import BadInput, Runtime, SineRecipe, SpeechRecipe, SplitSizes, TextureRecipe
from omni_model.storage import Workspace
from tests.small_sound import COMPONENTS, SEED, TINY_TEXTURE, make, noise, noise_corpus, workspace

GRAMMAR = Path(texture.__file__).parents[1] / "text" / "grammar.json"


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> AudioCorpus:
    made = make(AudioCorpus, texture.synthesize, tmp_path_factory.mktemp("texture"), TINY_TEXTURE)
    assert isinstance(made, AudioCorpus)
    return made


# --- the payload ---------------------------------------------------------------------------------


def test_payload_is_as_promised(corpus: AudioCorpus) -> None:
    rows = corpora.read_clips(corpus)
    assert [row["key"] for row in rows] == sorted(row["key"] for row in rows)
    assert Counter(row["split"] for row in rows) == {"train": 10, "validation": 4, "test": 4}
    stored = [item for path in corpora.shard_paths(corpus) for item in corpora.read_shard(path)]
    assert sorted((metadata for _, _, metadata in stored), key=lambda row: str(row["key"])) == rows
    for key, sound, metadata in stored:
        with wave.open(io.BytesIO(sound)) as file:
            assert file.getparams()[:3] == (1, 2, 16_000)
            assert file.getnframes() == round(metadata["duration_s"] * 16_000)
        assert key == metadata["key"]
    assert corpus.duration_s == pytest.approx(sum(row["duration_s"] for row in rows))
    index = corpora.read_index(corpus)
    assert [shard["num_clips"] for shard in index["shards"]] == [7, 3, 4, 4]
    assert [shard["name"] for shard in index["shards"][:2]] == [f"clips-train-0000{n}.tar" for n in (0, 1)]
    assert (index["dropped"], index["changed"], corpus.num_dropped) == ({}, {}, 0)


def test_the_same_bytes_undisturbed_or_killed(
    tmp_path: Path, corpus: AudioCorpus, monkeypatch: pytest.MonkeyPatch
) -> None:
    render, rendered = texture.render, []

    def dies_at_clip_10(plan: clips.ClipPlan, seed: int) -> np.ndarray:
        rendered.append(plan.key)
        if len(rendered) == 10:
            raise KeyboardInterrupt
        return render(plan, seed)

    monkeypatch.setattr(texture, "render", dies_at_clip_10)
    with pytest.raises(KeyboardInterrupt):
        make(AudioCorpus, texture.synthesize, tmp_path, TINY_TEXTURE)
    assert not list((tmp_path / "out").iterdir())
    rendered.extend(["from here on it lives"] * 10)
    again = make(AudioCorpus, texture.synthesize, tmp_path, TINY_TEXTURE)
    assert again.digest == corpus.digest
    assert len(rendered) == 10 + 10 + (18 - 7)  # the finished shard of 7 was not made again


def test_earlier_corpora_lend_the_shards_that_stay(tmp_path: Path) -> None:
    made: list[str] = []

    def stage(count: int) -> Callable[..., dict[str, Any]]:
        def run(*, work: Workspace, runtime: Runtime) -> dict[str, Any]:
            plans = [clips.ClipPlan(f"c-{number}", "train", {}, {}) for number in range(count)]

            def render(plan: clips.ClipPlan) -> clips.Clip:
                made.append(plan.key)
                return clips.Clip(noise(0.2, int(plan.key[2:])))

            return corpora.write_corpus(plans, render, generator="x", clips_per_shard=2, work=work)

        return run

    alone = make(AudioCorpus, stage(7), tmp_path / "alone")
    few = make(AudioCorpus, stage(5), tmp_path / "store" / "few", components=COMPONENTS)
    made.clear()
    many = make(AudioCorpus, stage(7), tmp_path / "store" / "many", components=COMPONENTS)
    assert many.digest == alone.digest
    assert made == ["c-4", "c-5", "c-6"]
    lent = few.out / "clips-train-00001.tar"
    lent.write_bytes(lent.read_bytes()[:-1] + b"x")
    (tmp_path / "store" / "many" / "manifest.json").unlink()
    made.clear()
    again = make(AudioCorpus, stage(7), tmp_path / "store" / "again", components=COMPONENTS)
    assert again.digest == alone.digest
    assert made == ["c-2", "c-3", "c-4", "c-5", "c-6"]  # what is damaged is not lent


def test_what_is_left_out_or_changed_is_counted_by_reason(tmp_path: Path) -> None:
    def recordings() -> Iterator[tuple[clips.ClipPlan, clips.Clip] | clips.Dropped]:
        yield clips.ClipPlan("a", "train", {}, {}), clips.Clip(noise(1), changes=("resampled", "mixed down"))
        yield clips.Dropped("b.wav", "silent")
        yield clips.ClipPlan("c", "test", {}, {}), clips.Clip(noise(1), changes=("resampled",))
        yield clips.Dropped("d.wav", "unreadable")
        yield clips.Dropped("e.wav", "silent")

    def stage(*, work: Workspace, runtime: Runtime) -> dict[str, Any]:
        plan = clips.ShardPlan("mine-0", "digest", recordings)
        return corpora.write_shards([plan], generator="x", work=work)

    made = make(AudioCorpus, stage, tmp_path)
    index = corpora.read_index(made)
    assert (made.num_clips, made.num_dropped) == (2, 3)
    assert index["dropped"] == {"silent": 2, "unreadable": 1}
    assert index["changed"] == {"resampled": 2, "mixed down": 1}
    assert index["dropped_names"] == [["b.wav", "silent"], ["d.wav", "unreadable"], ["e.wav", "silent"]]
    assert corpora.read_clips(made)[0]["changes"] == ["resampled", "mixed down"]


def test_a_cut_off_shard_is_named(tmp_path: Path, corpus: AudioCorpus) -> None:
    whole = corpora.shard_paths(corpus)[0].read_bytes()
    path = tmp_path / "clips-train-00000.tar"
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(BadInput, match=r"clips-train-00000\.tar is damaged"):
        list(corpora.read_shard(path))


def write(plans: list[clips.ClipPlan], directory: Path) -> None:
    corpora.write_corpus(
        plans,
        lambda _: clips.Clip(noise(0.2)),
        generator="x",
        clips_per_shard=1,
        work=workspace(directory),
    )


@pytest.mark.parametrize("key", ["a.b", "a/b", "", "a b"])
def test_keys_that_tars_would_mangle_are_refused(tmp_path: Path, key: str) -> None:
    with pytest.raises(BadInput, match="the clip key"):
        write([clips.ClipPlan(key, "train", {}, {})], tmp_path)


def test_keys_twice_unknown_splits_and_nothing_at_all_are_refused(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="the clip key a is used twice"):
        write([clips.ClipPlan("a", split, {}, {}) for split in ("train", "test")], tmp_path / "twice")
    with pytest.raises(BadInput, match="the split 'dev' of clip a is none of train, validation, test"):
        write([clips.ClipPlan("a", "dev", {}, {})], tmp_path / "split")
    with pytest.raises(BadInput, match="no clips"):
        write([], tmp_path / "none")


def test_more_clips_of_one_split_leave_the_others_as_they_are(tmp_path: Path) -> None:
    few, many = (
        {shard["name"]: shard["sha256"] for shard in corpora.read_index(corpus)["shards"]}
        for corpus in (noise_corpus(tmp_path / "few", 7), noise_corpus(tmp_path / "many", 8))
    )
    assert few.keys() == many.keys()
    assert [name for name in few if few[name] != many[name]] == ["clips-train-00002.tar"]


# --- sines ---------------------------------------------------------------------------------------


def test_sines_have_the_committed_hashes(tmp_path: Path) -> None:
    made = make(AudioCorpus, sines.synthesize, tmp_path, SineRecipe())
    rows = corpora.read_clips(made)
    assert (made.num_clips, made.duration_s) == (5, 25.0)
    assert all(row["transcript"].endswith(f"{row['provenance']['frequency_hz']} hertz") for row in rows)


def test_no_sine_sample_lies_near_a_rounding_border() -> None:
    for clip in json.loads(sines.MANIFEST.read_text())["clips"]:
        phase = np.arange(16_000) * clip["frequency_hz"] % 16_000
        exact = sines.AMPLITUDE * np.sin(2 * np.pi * phase / 16_000)
        assert np.abs(np.abs(exact - np.floor(exact)) - 0.5).min() > 1e-6


def test_another_arithmetic_is_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sines, "AMPLITUDE", 12_002)
    with pytest.raises(BadInput, match=r"sine-0110hz differs from sine_clips\.json"):
        make(AudioCorpus, sines.synthesize, tmp_path, SineRecipe())


# --- labels and splits ---------------------------------------------------------------------------


def all_plans(module: Any, recipe: Any) -> dict[str, list[clips.ClipPlan]]:
    return {split: module.plan_split(recipe, split, SEED) for split in clips.SPLITS}


TEXTURE_RANGES: dict[str, Callable[[clips.ClipPlan], label_ranges.Range | None]] = {
    "frequency_hz": lambda plan: texture.PITCH_HZ[plan.labels["pitch"]],
    "contour_semitones": lambda plan: texture.CONTOUR_SEMITONES[plan.labels["contour"]],
    "tremolo_hz": lambda plan: texture.TREMOLO_HZ[plan.labels["tremolo"]],
    "tilt": lambda plan: texture.NOISE_TILT[plan.labels["noise"]],
    "clicks_hz": lambda plan: texture.CRACKLE_CLICKS_HZ if plan.labels["noise"] == "crackle" else None,
    "period_s": lambda plan: texture.BEEP_PERIOD_S,
    "length_s": lambda plan: texture.BEEP_LENGTH_S,
    "level_dbfs": lambda plan: label_ranges.LOUDNESS_DBFS[plan.labels["loudness"]],
}
SPEECH_RANGES: dict[str, Callable[[clips.ClipPlan], label_ranges.Range | None]] = {
    "rate_wpm": lambda plan: speech.PACE_WPM[plan.labels["pace"]],
    "pitch": lambda plan: speech.PITCH,
    "range": lambda plan: (
        speech.INTONATION[plan.labels["melody"]] if "melody" in plan.labels else speech.UNLABELLED_INTONATION
    ),
    "level_dbfs": lambda plan: label_ranges.LOUDNESS_DBFS[plan.labels["loudness"]],
}


@pytest.mark.parametrize(
    ("module", "recipe", "ranges"),
    [(texture, TextureRecipe(), TEXTURE_RANGES), (speech, SpeechRecipe(), SPEECH_RANGES)],
)
def test_splits_share_no_cell_of_any_parameter(module: Any, recipe: Any, ranges: dict[str, Any]) -> None:
    seen: Counter[tuple[str, str]] = Counter()
    for split, plans in all_plans(module, recipe).items():
        for plan in plans:
            for name in ranges.keys() & plan.parameters.keys():
                values = ranges[name](plan)
                if values is not None:
                    assert values.cell(plan.parameters[name]) in label_ranges.CELLS[split], (plan, name)
                    seen[split, name] += 1
    assert len(seen) == len(ranges) * len(clips.SPLITS)
    for one, other in itertools.combinations(label_ranges.CELLS.values(), 2):
        assert not set(one) & set(other)


def test_splits_share_no_speaker_and_no_three_word_phrase() -> None:
    plans = all_plans(speech, SpeechRecipe())
    speakers = {split: {plan.speaker for plan in plans[split]} for split in plans}
    phrases = {
        split: {
            frozenset(plan.transcript.split()) for plan in plans[split] if plan.transcript.count(" ") == 2
        }
        for split in plans
    }
    for one, other in itertools.combinations(clips.SPLITS, 2):
        assert not speakers[one] & speakers[other]
        assert not phrases[one] & phrases[other]


def test_a_longer_corpus_starts_with_the_same_clips() -> None:
    short = texture.plan_split(TINY_TEXTURE, "train", SEED)
    assert texture.plan_split(TextureRecipe(), "train", SEED)[: len(short)] == short


def test_texture_labels_are_balanced_and_independent() -> None:
    plans = all_plans(texture, TextureRecipe())["train"]
    for category in sorted({category for plan in plans for category in plan.labels}):
        counts = Counter(plan.labels[category] for plan in plans if category in plan.labels)
        assert max(counts.values()) <= 1.35 * min(counts.values()), (category, counts)
    groups = {tuple(sorted(plan.labels)) for plan in plans if len(plan.labels) > 1}
    for group in groups:
        rows = [plan.labels for plan in plans if tuple(sorted(plan.labels)) == group]
        for one, other in itertools.combinations(group, 2):
            assert association(rows, one, other) < 0.1, (group, one, other)


def association(rows: list[dict[str, str]], one: str, other: str) -> float:
    """Cramer's V squared without its bias (Bergsma 2013): 0 where two labels say nothing about each other."""
    pairs = Counter((row[one], row[other]) for row in rows)
    firsts, seconds = Counter(row[one] for row in rows), Counter(row[other] for row in rows)
    expected = {(a, b): firsts[a] * seconds[b] / len(rows) for a in firsts for b in seconds}
    phi2 = sum((pairs[cell] - value) ** 2 / value for cell, value in expected.items()) / len(rows)
    freedom = (len(firsts) - 1) * (len(seconds) - 1)
    return max(0.0, phi2 - freedom / (len(rows) - 1)) / (min(len(firsts), len(seconds)) - 1)


def test_labels_are_the_grammars() -> None:
    categories = json.loads(GRAMMAR.read_text())["categories"]
    for category, values in (*texture.LABELS.items(), *speech.WORDS.items(), *speech.MANNERS.items()):
        assert list(values) == categories[category]["options"], category


# --- what is heard is what the label says ----------------------------------------------------------


def test_texture_sounds_like_its_labels() -> None:
    for plan in texture.plan_split(TextureRecipe(clips=SplitSizes(40, 4, 4)), "train", SEED):
        samples = texture.render(plan, SEED)
        p = plan.parameters
        clipped = np.mean(np.abs(samples) > 0.99)
        assert clipped < 1e-3, plan
        if p["kind"] == "beeps":
            assert count_bursts(samples) == texture.BEEP_COUNTS[plan.labels["beeps"]], plan
        if p["kind"] == "tone" and plan.labels["contour"] == "level":
            spectrum = np.abs(np.fft.rfft(samples))
            assert spectrum.argmax() / p["duration_s"] == pytest.approx(p["frequency_hz"], rel=0.02)
        if p["kind"] == "tone" and plan.labels["tremolo"] == "plain":
            level_dbfs = 10 * np.log10(np.mean(samples.astype(np.float64) ** 2))
            assert level_dbfs == pytest.approx(p["level_dbfs"], abs=0.5)


def test_silence_is_a_rooms_noise_and_nothing_else() -> None:
    plans = {
        s: texture.plan_split(TextureRecipe(clips=SplitSizes(36, 36, 36)), s, SEED) for s in clips.SPLITS
    }
    for split, planned in plans.items():
        silent = [plan for plan in planned if plan.parameters["kind"] == "silence"]
        assert len(silent) == 4
        for plan in silent:
            room_dbfs = plan.parameters["room_dbfs"]
            assert (plan.labels, texture.timeline(plan.parameters), plan.transcript) == ({}, [], "")
            assert label_ranges.ROOM_NOISE_DBFS.cell(room_dbfs) in label_ranges.CELLS[split]
            samples = texture.render(plan, SEED)
            assert len(samples) == round(plan.parameters["duration_s"] * 16_000)
            assert 10 * np.log10(np.mean(samples.astype(np.float64) ** 2)) == pytest.approx(
                room_dbfs, abs=0.2
            )


def count_bursts(samples: np.ndarray) -> int:
    power = np.convolve(samples.astype(np.float64) ** 2, np.ones(320) / 320, "same")
    loud = power > power.max() / 4
    return int(loud[0]) + int(np.sum(loud[1:] & ~loud[:-1]))


def test_a_texture_that_cannot_hold_five_beeps_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="texture durations"):
        texture.synthesize(TextureRecipe(max_duration_s=1.2), work=workspace(tmp_path), runtime=Runtime())
