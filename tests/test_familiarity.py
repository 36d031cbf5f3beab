"""What was not taught is told apart: planted strangers, strange sounds, the same bytes twice, bad input."""

import dataclasses
import itertools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from omni_model.artifacts import AudioCorpus, Familiarity, FeatureShards
from omni_model.audio import features, speech, strange, strange_sounds
from omni_model.audio.clips import Clip, ClipPlan, clip_rng
from omni_model.audio.corpora import read_shard, shard_paths, write_corpus
from omni_model.audio.reader import FeatureReader
from omni_model.config import BadInput, FamiliarityRecipe, Runtime, StrangeRecipe
from omni_model.evaluation import familiarity, familiarity_known
from omni_model.evaluation.familiarity_known import VOTES, Known, pool
from omni_model.storage import Workspace
from tests.small_sound import CheapEncoder, make

RECIPE = FamiliarityRecipe(taught_clips=80, components=24, marked_share=0.05)
RATE_HZ = 16_000


# --- planted strangers ---------------------------------------------------------------------------


def clip_of(centre: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Frames (T, 6) that wander about a centre."""
    return centre + rng.normal(0, 0.3, (int(rng.integers(30, 60)), len(centre)))


@pytest.fixture(scope="module")
def known() -> Known:
    """Taught: three places. Nonsense: two others."""
    rng = np.random.default_rng(0)
    centres = [np.eye(6)[place] * 3 for place in range(5)]
    clips = [(clip_of(centres[n % 5], rng), (0, 0, 1, 2, 3)[n % 5]) for n in range(300)]
    fitted = familiarity_known.fit(
        np.stack([pool(frames) for frames, _ in clips]), [v for _, v in clips], 16, 1
    )
    return dataclasses.replace(fitted, limits=(0.6, 0.6))


def test_planted_strangers_are_marked_and_the_taught_are_not(known: Known) -> None:
    rng = np.random.default_rng(1)
    taught = known.judge([clip_of(np.eye(6)[n % 3] * 3, rng) for n in range(60)])
    assert np.mean([each.is_taught for each in taught]) > 0.95
    assert all(each.why == "" for each in taught if each.is_taught)
    for place, words in ((3, "words"), (4, "unlike anything")):
        marked = known.judge([clip_of(np.eye(6)[place] * 3, rng) for _ in range(30)])
        assert np.mean([not each.is_taught for each in marked]) > 0.95
        assert all(words in each.why for each in marked if not each.is_taught)


def test_what_is_near_to_nothing_is_marked_too(known: Known) -> None:
    rng = np.random.default_rng(2)
    far = known.judge([clip_of(np.full(6, 40.0), rng), clip_of(np.full(6, -40.0), rng)])
    assert not any(each.is_taught for each in far)
    assert [each.distance for each in far] == pytest.approx([2.5, 2.5], abs=0.01)  # (1 - 0) / (1 - 0.6)


def test_distance_is_in_units_of_its_limit(known: Known) -> None:
    votes = np.array([[0.5, 0.1, 0.2, 0.2], [1.0, 0.0, 0.0, 0.0], [0.0, 0.8, 0.1, 0.1], [1.2, 0.1, 0.0, 0.0]])
    assert known.distances(votes) == pytest.approx([1.0, 0.0, 0.5, 0.0])
    own = dataclasses.replace(known, limits=(0.2, 0.6))  # the first, second and fourth are words
    assert own.distances(votes) == pytest.approx([0.5, 0.0, 0.5, 0.0])


def test_frames_of_another_width_are_refused(known: Known) -> None:
    with pytest.raises(BadInput, match="must be 6 wide"):
        known.judge([np.zeros((20, 7))])


@pytest.mark.parametrize("num_frames", [1, 2, 50])
def test_pooling_takes_clips_of_any_length(num_frames: int) -> None:
    frames = np.random.default_rng(0).normal(size=(num_frames, 3)).astype(np.float16)
    pooled = pool(frames)
    assert pooled.shape == (21,)
    assert np.isfinite(pooled).all()
    assert pooled[:3] == pytest.approx(frames.astype(np.float64).mean(axis=0))


def test_components_are_the_principal_ones() -> None:
    rng = np.random.default_rng(3)
    points = rng.normal(size=(200, 40)) * np.linspace(4, 0.1, 40)
    points -= points.mean(axis=0)
    variances, directions = familiarity_known._components(points, 5, seed=1)
    values, vectors = np.linalg.eigh(points.T @ points / len(points))
    assert variances == pytest.approx(values[::-1][:5], rel=0.01)
    assert np.abs(np.diag(directions.T @ vectors[:, ::-1][:, :5])) == pytest.approx(np.ones(5), abs=0.02)


# --- the stage's parts on small corpora ----------------------------------------------------------


def tone(rng: np.random.Generator, low_hz: float, high_hz: float) -> np.ndarray:
    time_s = np.arange(round(rng.uniform(0.4, 0.7) * RATE_HZ)) / RATE_HZ
    return (0.2 * np.sin(2 * np.pi * rng.uniform(low_hz, high_hz) * time_s)).astype(np.float32)


def corpus(directory: Path, name: str, plans: list[tuple[str, str, str]]) -> AudioCorpus:
    """Clips of (split, kind, style): the taught are low tones, all others noise."""
    made = [
        ClipPlan(f"{name}-{n:03d}", split, {}, {"kind": kind, "style": style}, "red" if n % 2 else "")
        for n, (split, kind, style) in enumerate(plans)
    ]

    def render(plan: ClipPlan) -> Clip:
        rng, kind = clip_rng(1, plan.key), plan.parameters["kind"]
        if kind in ("tone", "taught"):
            return Clip(tone(rng, 100, 200))
        return Clip((0.2 * rng.normal(size=9000)).clip(-1, 1).astype(np.float32))

    def stage(*, work: Workspace, runtime: Runtime) -> dict[str, Any]:
        return write_corpus(made, render, generator="test", clips_per_shard=100, work=work)

    found = make(AudioCorpus, stage, directory)
    assert isinstance(found, AudioCorpus)
    return found


Extract = Callable[[str, list[tuple[str, str, str]]], FeatureShards]


@pytest.fixture
def extract(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Extract:
    encoder = CheapEncoder(16)
    monkeypatch.setattr(features, "load_encoder", lambda *_: encoder)

    def heard(name: str, plans: list[tuple[str, str, str]]) -> FeatureShards:
        made = corpus(tmp_path / f"corpus-{name}", name, plans)
        return encoder.extract(made, tmp_path / f"features-{name}")

    return heard


TAUGHT = [
    *itertools.repeat(("train", "tone", ""), 60),
    *itertools.repeat(("validation", "tone", ""), 40),
    *itertools.repeat(("test", "tone", ""), 40),
]
STRANGE = [
    *itertools.repeat(("train", "taught", "phrase"), 20),
    *itertools.repeat(("train", "nonsense", "hisses"), 60),
    *itertools.repeat(("test", "noise", "surf"), 20),
    *itertools.repeat(("test", "music", "waltz"), 20),
]


def test_noise_is_told_from_the_tones_that_were_taught(extract: Extract, tmp_path: Path) -> None:
    reader, others = FeatureReader(extract("t", TAUGHT)), FeatureReader(extract("s", STRANGE))
    learned = familiarity.learn(RECIPE, reader, others, seed=5)
    told = familiarity.measure_familiarity(learned, reader, others)
    assert told["calibrated_on"]["marked"] == pytest.approx(0.05, abs=0.03)
    assert told["in_range"]["marked"] <= 0.2
    assert told["in_range"]["clips"] == told["in_range"]["parts"]["words"]["clips"] * 2 == 40
    for kind, style in (("noise", "surf"), ("music", "waltz")):
        assert told["strange"][kind]["marked"] > 0.9
        assert told["strange"][kind]["styles"][style]["clips"] == 20
        low, high = told["strange"][kind]["ci95"]
        assert low <= told["strange"][kind]["marked"] <= high
        assert told["strange"][kind]["median_distance"] > 1
    assert json.dumps(told, allow_nan=False)


def test_the_same_bytes_twice_and_the_same_after_reading(extract: Extract, tmp_path: Path) -> None:
    reader, others = FeatureReader(extract("t", TAUGHT)), FeatureReader(extract("s", STRANGE))
    found = []
    for name in ("one", "two"):
        (tmp_path / name / "out").mkdir(parents=True)
        learned = familiarity.learn(RECIPE, reader, others, seed=5)
        familiarity_known.write_known(learned, tmp_path / name / "out")
        found.append((tmp_path / name / "out" / familiarity_known.MODEL).read_bytes())
    assert found[0] == found[1]
    again = familiarity_known.load_known(Familiarity("f", "0" * 64, str(tmp_path / "one"), "d", 0.5, 0.5))
    frames = [reader.frames(clip["key"]) for clip in reader.by_split("test")]
    assert again.judge(frames) == learned.judge(frames)
    assert again.policy == reader.policy


def test_nothing_to_learn_from_is_refused(extract: Extract) -> None:
    reader = FeatureReader(extract("t", TAUGHT))
    with pytest.raises(BadInput, match="no nonsense clips"):
        familiarity.learn(RECIPE, reader, FeatureReader(extract("n", TAUGHT[:4])), seed=5)
    with pytest.raises(BadInput, match="validation split"):
        familiarity.learn(
            RECIPE, FeatureReader(extract("v", TAUGHT[:4])), FeatureReader(extract("s", STRANGE)), seed=5
        )


def test_a_damaged_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    artifact = Familiarity("f", "0" * 64, str(tmp_path), "d", 0.5, 0.5)
    for content in (None, b"nothing of the kind"):
        if content:
            (tmp_path / "out" / familiarity_known.MODEL).write_bytes(content)
        with pytest.raises(BadInput, match="missing or damaged"):
            familiarity_known.load_known(artifact)


def test_votes_are_for_what_a_clip_is() -> None:
    def vote(kind: str, transcript: str) -> str:
        return VOTES[familiarity.vote_of({"provenance": {"kind": kind}, "transcript": transcript})]

    assert vote("nonsense", "brool") == "unknown words"
    assert vote("nonsense", "") == "unknown sounds"
    assert vote("taught", "red cat") == "taught words"
    assert vote("tone", "") == "taught sounds"


# --- strange sounds ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "sound"), (strange_sounds.MUSIC | strange_sounds.NOISES | strange_sounds.NONSENSE).items()
)
def test_every_sound_sounds_and_is_its_own(name: str, sound: strange_sounds.Sound) -> None:
    made = [sound(np.random.default_rng(seed), 17_001) for seed in (1, 2, 1)]
    for samples in made:
        assert samples.shape == (17_001,)
        assert np.isfinite(samples).all()
        assert samples.std() > 0
    assert np.array_equal(made[0], made[2])
    assert not np.array_equal(made[0], made[1])


def test_what_is_judged_is_not_learned_from() -> None:
    recipe = StrangeRecipe(pairs=60, random_sounds=6, clips_per_kind=24, foreign=8)
    plans = strange.plan_strange(recipe, 3)
    assert len({plan.key for plan in plans}) == len(plans)
    learned = [plan for plan in plans if plan.split == "train"]
    judged = [plan for plan in plans if plan.split == "test"]
    assert {plan.parameters["kind"] for plan in learned} == {"taught", "nonsense"}
    assert {plan.parameters["kind"] for plan in judged} == {*strange.STRANGE, strange.FOREIGN}
    said = {word for plan in learned for word in plan.transcript.split()}
    vocabulary = set(itertools.chain(*speech.WORDS.values()))
    unknown = {w for plan in judged if plan.parameters["kind"] == "words" for w in plan.transcript.split()}
    assert not unknown & said
    assert not unknown & vocabulary
    nonsense = {w for p in learned if p.parameters["kind"] == "nonsense" for w in p.transcript.split()}
    assert not nonsense & vocabulary
    styles = {plan.parameters["style"] for plan in learned if plan.parameters["style"] != "phrase"}
    assert not styles & {plan.parameters["style"] for plan in judged}
    assert all(not plan.labels for plan in plans if plan.parameters["kind"] != strange.FOREIGN)


def test_new_voices_are_new() -> None:
    """To every voice of the corpora, and to the foreign synthesizer."""
    everybody = {variant for own in speech.VARIANTS.values() for part in own.values() for variant in part}
    assert not everybody & set(strange.NEW_VOICES["man"])
    held_out = {v for own in speech.VARIANTS.values() for part in ("validation", "test") for v in own[part]}
    women = set(strange.NEW_VOICES["woman"])
    assert not women & held_out
    assert not (everybody | women) & set(strange.KLATT_VARIANTS)


def test_foreign_clips_are_what_is_taught_in_another_way() -> None:
    plans = strange.plan_strange(StrangeRecipe(pairs=1, random_sounds=1, clips_per_kind=1, foreign=24), 3)
    foreign = [plan for plan in plans if plan.parameters["kind"] == strange.FOREIGN]
    voices = [plan for plan in foreign if plan.transcript]
    assert len(voices) == 24
    assert len(foreign) == 48
    for plan in voices:
        words = [plan.labels[name] for name in ("number", "colour", "animal") if name in plan.labels]
        assert sorted(words) == sorted(plan.transcript.split())
        assert "voice" not in plan.labels
    tones = [plan for plan in foreign if not plan.transcript]
    assert {name for plan in tones for name in plan.labels} >= {"pitch", "contour", "beeps"}
    assert {plan.parameters["style"] for plan in tones} == set(strange.WAVES)


def test_the_corpus_of_strange_sounds(tmp_path: Path) -> None:
    pytest.importorskip("espeakng_loader")
    recipe = StrangeRecipe(pairs=8, random_sounds=2, clips_per_kind=10, foreign=8)
    made = [make(AudioCorpus, strange.synthesize_strange, tmp_path / name, recipe) for name in ("a", "b")]
    assert made[0].digest == made[1].digest
    assert made[0].num_clips == 2 * 8 + 2 + 3 * 10 + 2 * 8
    for path in shard_paths(made[0]):
        for _, _, about in read_shard(path):
            assert about["provenance"]["kind"] in (*strange.STRANGE, "taught", "nonsense", "foreign")
            assert not about.get("timeline")
