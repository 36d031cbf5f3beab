"""The encoder that learns to hear: right targets, frames as the frozen encoder gives them, the same bytes."""

import hashlib
import itertools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from omni_model.artifacts import AudioCorpus, EncoderFiles, content_digest, hash_payload
from omni_model.audio import texture
from omni_model.audio.clips import Clip, ClipPlan, Event
from omni_model.audio.corpora import write_corpus
from omni_model.audio.encoder import load_encoder, new_whisper
from omni_model.audio.mel import log_mel
from omni_model.audio.pitch import LOWEST_PITCH_HZ, PITCHES_PER_OCTAVE, voice_pitch
from omni_model.audio.probe import fit_probe, probe_accuracies, ridge
from omni_model.config import BadInput, EncoderRecipe, MicroEncoderRecipe, Runtime, SplitSizes, TextureRecipe
from omni_model.storage import Workspace
from omni_model.telemetry import Metrics
from omni_model.training.hearing import NUM_LEVELS, UNKNOWN, HeardClip, Lesson, Vocabulary, hear, levels
from omni_model.training.pretrain_encoder import bent, encode, look_around, pretrain_encoder

SEED = 5
SHAPE = EncoderRecipe(width=32, num_layers=2, num_heads=2, max_audio_s=3)
QUICK = MicroEncoderRecipe(shape=SHAPE, steps=12, rows_per_step=8, warmup_steps=2)


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def workspace(directory: Path, metrics: Metrics | None = None) -> Workspace:
    for name in ("out", "partial"):
        (directory / name).mkdir(parents=True, exist_ok=True)
    return Workspace(directory, SEED, metrics or Metrics(directory / "metrics.jsonl"))


def sealed(directory: Path, facts: dict[str, Any]) -> AudioCorpus:
    return AudioCorpus(
        "stage", "0" * 64, str(directory), content_digest(hash_payload(directory / "out")), **facts
    )


def textures(directory: Path, test: int = 4) -> AudioCorpus:
    recipe = TextureRecipe(clips=SplitSizes(train=24, validation=12, test=test), clips_per_shard=20)
    return sealed(directory, texture.synthesize(recipe, work=workspace(directory), runtime=Runtime()))


def spoken(directory: Path, timeline: bool = True, duration_s: float = 0.8) -> AudioCorpus:
    """Clips of one of two "words": a low and a high hum, in the second half of the clip."""
    hums_hz = {"low": 200, "high": 900}
    plans = [
        ClipPlan(f"hum-{split}-{number}", split, {"word": word}, {"hz": hums_hz[word]})
        for split, count in (("train", 12), ("validation", 6), ("test", 2))
        for number, word in zip(range(count), itertools.cycle(hums_hz))  # noqa: B905
    ]

    def render(plan: ClipPlan) -> Clip:
        rng = np.random.default_rng(int(plan.key.split("-")[-1]))
        time_s = np.arange(int(duration_s * 16_000)) / 16_000
        hum = 0.1 * np.sin(2 * np.pi * plan.parameters["hz"] * time_s) * (time_s > duration_s / 2)
        samples = (hum + 1e-3 * rng.standard_normal(len(time_s))).astype(np.float32)
        events = (Event("word", plan.labels["word"], duration_s / 2, duration_s),) if timeline else ()
        return Clip(samples, timeline=events)

    work = workspace(directory)
    return sealed(directory, write_corpus(plans, render, generator="hum", clips_per_shard=9, work=work))


@pytest.fixture(scope="module")
def corpora(tmp_path_factory: pytest.TempPathFactory) -> tuple[AudioCorpus, AudioCorpus]:
    directory = tmp_path_factory.mktemp("corpora")
    return textures(directory / "texture"), spoken(directory / "speech")


def payload(directory: Path) -> dict[str, str]:
    out = directory / "out"
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(out.iterdir())}


# --- targets -------------------------------------------------------------------------------------


def clip_of(timeline: list[Any], num_frames: int, **more: Any) -> HeardClip:
    metadata = {"key": "k", "split": "train", "labels": {"pitch": "low"}, "timeline": timeline}
    return HeardClip(torch.zeros(80, 2 * num_frames, dtype=torch.float16), metadata, **more)


def test_targets_follow_the_timeline() -> None:
    said = clip_of([["word", "red", 0.02, 0.06], ["word", "cat", 0.06, 0.1]], 6)
    beeping = clip_of([["beep", "on", 0.0, 0.02], ["beep", "on", 0.06, 0.08]], 5)
    words = Vocabulary.of([said.metadata, beeping.metadata])
    assert words.labels == {"pitch": ("low",)}
    assert words.tracks == {"beep": ("", "on"), "word": ("", "cat", "red")}
    assert words.counts == {"beep": 2}  # words differ: they are told apart, not counted
    assert words.lasting == ("word",)
    unheard, lengths = [UNKNOWN] * 6, [UNKNOWN, 0, 0, 0, 0, UNKNOWN]
    assert targets(said, words) == [unheard, [0, 2, 2, 1, 1, 0], unheard, unheard, lengths]
    unknown = [UNKNOWN] * 5
    assert targets(beeping, words) == [[1, 0, 0, 1, 0], unknown, [1, 1, 1, 2, 2], unknown, unknown]
    assert said.label_targets(words) == [0]


def targets(clip: HeardClip, words: Vocabulary) -> list[list[int]]:
    """Of every question but the level."""
    rows = clip.frame_targets(words).tolist()
    level = -1 - len(words.lasting)
    return rows[:level] + rows[level + 1 :]


def test_how_long_an_event_lasts_is_asked_in_half_octaves() -> None:
    slow = clip_of([["word", "red", 0.0, 0.3], ["word", "cat", 0.3, 0.38]], 20)
    words = Vocabulary.of([slow.metadata])
    assert slow.frame_targets(words)[-1].tolist() == [5] * 15 + [2] * 4 + [UNKNOWN]  # 2 log2(.3 / .04) = 5.8


def test_a_frame_is_asked_how_loud_it_is() -> None:
    noise = np.random.default_rng(0).standard_normal(16_000).astype(np.float32)
    steps = [np.median(levels(log_mel(gain * noise, 80))) for gain in (0.001, 0.01, 0.1)]
    assert np.diff(steps).tolist() == [5, 5]  # 20 dB each, in steps of 4
    assert levels(log_mel(noise, 80)).max() <= NUM_LEVELS - 1


def test_a_later_window_keeps_its_place_and_loses_the_labels_of_the_clip() -> None:
    events = [["beep", "on", 0.02, 0.04], ["beep", "on", 0.06, 0.08]]
    window = clip_of(events, 2, start_s=0.04, whole=False)
    words = Vocabulary.of([window.metadata])
    assert window.frame_targets(words)[:2].tolist() == [[0, 1], [1, 2]]
    assert window.label_targets(words) == [UNKNOWN]


@pytest.mark.parametrize("pitch_hz", [70, 100, 150, 220, 300, 390])
def test_pitch_of_a_voice_is_measured_and_silence_and_noise_have_none(pitch_hz: int) -> None:
    time_s = np.arange(16_000) / 16_000
    buzz = sum(np.sin(2 * np.pi * pitch_hz * order * time_s) / order for order in range(1, 9))
    noise = np.random.default_rng(0).standard_normal(16_000)
    sound = np.concatenate([0.1 * buzz, np.zeros(8_000), 0.1 * noise]).astype(np.float32)
    found = voice_pitch(sound)
    assert found.shape == (125,)
    steps = 1 + int(PITCHES_PER_OCTAVE * np.log2(pitch_hz / LOWEST_PITCH_HZ))
    assert (found[1:49] == steps).all()
    assert (found[51:74] == 0).all()
    assert (found[76:] == 0).mean() > 0.9


def test_long_clips_are_heard_in_windows(tmp_path: Path) -> None:
    corpus = spoken(tmp_path, duration_s=2.5)
    windows = hear([corpus], ("validation",), 80, 1)
    first = windows[:3]
    assert [clip.num_frames for clip in first] == [50, 50, 25]
    assert [clip.start_s for clip in first] == [0, 1, 2]
    assert len({clip.metadata["key"] for clip in first}) == 1
    assert {clip.metadata["split"] for clip in windows} == {"validation"}
    words = Vocabulary.of([clip.metadata for clip in windows])
    assert [clip.frame_targets(words)[0].astype(bool).mean().round(2) for clip in first] == [0, 0.76, 1]


# --- encoding ------------------------------------------------------------------------------------


def test_a_batch_gives_each_clip_the_frames_it_has_alone_and_frozen(
    tmp_path: Path, corpora: tuple[AudioCorpus, AudioCorpus]
) -> None:
    facts = pretrain_encoder(QUICK, *corpora, work=workspace(tmp_path), runtime=Runtime())
    frozen = load_encoder(EncoderFiles("stage", "0" * 64, str(tmp_path), "0", **facts))
    from transformers import WhisperModel

    loader: Any = WhisperModel
    model = loader.from_pretrained(tmp_path / "out", local_files_only=True).eval()
    rng = np.random.default_rng(0)
    sounds = [rng.standard_normal(count).astype(np.float32) * 0.1 for count in (6_400, 16_000, 9_600)]
    heard = [
        HeardClip(log_mel(samples, 80), {"key": str(i), "split": "train", "labels": {}})
        for i, samples in enumerate(sounds)
    ]
    lesson = Lesson.of(heard, Vocabulary({}, {}, {}))
    with torch.no_grad():
        together = encode(model.encoder, lesson.mel, lesson.lengths)
    for frames, clip, samples in zip(together, heard, sounds, strict=True):
        expected = torch.as_tensor(frozen.encode(samples))
        assert expected.shape == (clip.num_frames, SHAPE.width)
        torch.testing.assert_close(frames[: clip.num_frames], expected, atol=2e-5, rtol=0)


def test_heads_begin_by_looking_at_set_distances() -> None:
    encoder = new_whisper(EncoderRecipe(width=128, num_layers=3, num_heads=4, max_audio_s=3), SEED).encoder
    look_around(encoder)
    for depth, layer in enumerate(encoder.layers):
        with torch.no_grad():
            states = layer.self_attn_layer_norm(encoder.embed_positions.weight)
            shape = (-1, 4, 32)
            queries = layer.self_attn.q_proj(states).view(shape) * layer.self_attn.scaling
            weights = torch.einsum("qhd,khd->hqk", queries, layer.self_attn.k_proj(states).view(shape))
        attended = weights.softmax(-1)[:, 75].argmax(-1) - 75
        wanted = torch.tensor([-1, 1, -3, 3]) * 2**depth
        assert (attended - wanted).abs().max() <= 1, (depth, attended)


def test_bending_moves_what_sounds_along_the_frequency_axis() -> None:
    mel = torch.zeros(2, 80, 4)
    mel[:, 40] = 1.0
    bent_mel = bent(mel, torch.tensor([1.0, 0.8]))
    assert bent_mel[0].argmax(dim=0).tolist() == [40] * 4
    assert bent_mel[1].argmax(dim=0).tolist() == [50] * 4
    torch.testing.assert_close(bent_mel[0], mel[0])


# --- the stage -----------------------------------------------------------------------------------


def test_the_stage_tells_what_a_probe_hears_before_and_after(
    tmp_path: Path, corpora: tuple[AudioCorpus, AudioCorpus]
) -> None:
    work = workspace(tmp_path)
    facts = pretrain_encoder(QUICK, *corpora, work=work, runtime=Runtime())
    assert set(facts) == EncoderFiles.fact_names()
    figures = work.metrics.summaries
    categories = {"word", "loudness", "pitch", "contour", "tremolo"}
    for when in ("before", "after"):
        assert {f"probe_{when}_{category}" for category in categories} <= set(figures)
        assert 0 <= float(figures[f"probe_{when}"]) <= 1
    assert float(figures["parameters"]) == sum(
        p.numel() for p in new_whisper(SHAPE, SEED).encoder.parameters()
    )


def test_it_learns_what_frames_hold(tmp_path: Path, corpora: tuple[AudioCorpus, AudioCorpus]) -> None:
    _, speech = corpora
    longer = MicroEncoderRecipe(
        shape=SHAPE, steps=60, rows_per_step=8, matrix_lr=0.03, lr=0.01, warmup_steps=2
    )
    pretrain_encoder(longer, speech, speech_twin(tmp_path), work=workspace(tmp_path / "e"), runtime=Runtime())
    curve = json.loads((tmp_path / "e" / "out" / "curve.json").read_text())
    assert curve[0]["loss"] > 1.0 > 0.5 > curve[-1]["loss"]


def speech_twin(directory: Path) -> AudioCorpus:
    """The same sounds without timelines: labels alone must be enough to take part."""
    return spoken(directory / "twin", timeline=False)


def test_equal_bytes_after_a_kill_and_whatever_the_test_split_holds(
    tmp_path: Path, corpora: tuple[AudioCorpus, AudioCorpus]
) -> None:
    sounds, speech = corpora

    class Killed(Exception):
        pass

    class Killing(Metrics):
        def log(self, step: int, total: int, **values: float) -> None:
            if step > QUICK.steps // 2:
                raise Killed

    often = Runtime(checkpoint_every_s=1e-9)
    undisturbed, killed = tmp_path / "undisturbed", tmp_path / "killed"
    pretrain_encoder(QUICK, sounds, speech, work=workspace(undisturbed), runtime=Runtime())
    stopped = workspace(killed, Killing(tmp_path / "killing.jsonl"))
    with pytest.raises(Killed):
        pretrain_encoder(QUICK, sounds, speech, work=stopped, runtime=often)
    assert any((killed / "partial").iterdir())
    assert not any((killed / "out").iterdir())
    pretrain_encoder(QUICK, sounds, speech, work=workspace(killed), runtime=often)
    assert payload(killed) == payload(undisturbed)

    other = tmp_path / "other"
    more_tests = textures(tmp_path / "more", test=9)
    assert more_tests.digest != sounds.digest
    pretrain_encoder(QUICK, more_tests, speech, work=workspace(other), runtime=Runtime())
    assert payload(other) == payload(undisturbed)


def test_impossible_shapes_are_refused(tmp_path: Path, corpora: tuple[AudioCorpus, AudioCorpus]) -> None:
    recipe = MicroEncoderRecipe(shape=EncoderRecipe(width=30, num_layers=1, num_heads=4, max_audio_s=3))
    with pytest.raises(BadInput, match="width 30 is no multiple of its 4 heads"):
        pretrain_encoder(recipe, *corpora, work=workspace(tmp_path), runtime=Runtime())
    assert not any((tmp_path / "out").iterdir())


# --- probes --------------------------------------------------------------------------------------


def labelled(count: int, split: str) -> list[dict[str, Any]]:
    return [
        {"key": f"{split}{i}", "split": split, "labels": {"seen": "abcd"[i % 4], "unseen": "abcd"[i % 4]}}
        for i in range(count)
    ]


def test_a_probe_finds_what_is_there_and_nothing_else() -> None:
    rng = np.random.default_rng(0)
    clips = labelled(200, "train") + labelled(80, "validation")
    signal = {value: rng.standard_normal(30) for value in "abcd"}
    there = {c["key"]: signal[c["labels"]["seen"]] + 0.5 * rng.standard_normal(30) for c in clips}
    assert probe_accuracies(clips, there)["seen"] > 0.97
    noise = {clip["key"]: rng.standard_normal(30) for clip in clips}
    assert 0.1 < probe_accuracies(clips, noise)["unseen"] < 0.45


def test_a_category_of_one_split_is_not_probed() -> None:
    clips = labelled(12, "train") + labelled(8, "validation")
    for clip in clips[12:]:
        del clip["labels"]["unseen"]
    vectors = {clip["key"]: np.arange(3.0) for clip in clips}
    assert set(probe_accuracies(clips, vectors)) == {"seen"}


def test_strength_is_the_one_that_does_best_on_other_clips() -> None:
    rng = np.random.default_rng(1)
    truth = rng.integers(2, size=30)
    inputs = rng.standard_normal((30, 60))
    inputs[:, 0] += 3 * truth
    others_truth = rng.integers(2, size=400)
    others = rng.standard_normal((400, 60))
    others[:, 0] += 3 * others_truth
    chosen = fit_probe(inputs, truth, 2, (others, others_truth))
    by_guess = fit_probe(inputs, truth, 2, (np.empty((0, 60)), np.empty(0)))

    def accuracy(probe: Any) -> float:
        return float((probe.scores(others).argmax(axis=1) == others_truth).mean())

    assert accuracy(chosen) >= accuracy(by_guess) > 0.6


def test_ridge_solves_the_normal_equations() -> None:
    rng = np.random.default_rng(2)
    inputs = rng.standard_normal((40, 7))
    inputs -= inputs.mean(axis=0)
    targets = rng.standard_normal((40, 3))
    (found,) = ridge(inputs, targets, [0.5])
    slopes = np.linalg.solve(inputs.T @ inputs + 0.5 * np.eye(7), inputs.T @ (targets - targets.mean(axis=0)))
    np.testing.assert_allclose(found[:-1], slopes, atol=1e-10)
    np.testing.assert_allclose(found[-1], targets.mean(axis=0), atol=1e-10)
