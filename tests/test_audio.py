"""Sound: equal to the reference where there is one, the same bytes every time, splits that stay apart."""

import io
import itertools
import json
import subprocess
import sys
import time
import wave
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import torch

from omni_model.artifacts import (
    Artifact,
    AudioCorpus,
    EncoderFiles,
    FeatureShards,
    content_digest,
    hash_payload,
)
from omni_model.audio import (
    corpora,
    encoder,
    espeak,
    features,
    label_ranges,
    sines,
    speech,
    texture,
    waveform,
)
from omni_model.audio.mel import log_mel
from omni_model.config import (
    BadInput,
    EncoderRecipe,
    FeatureRecipe,
    Runtime,
    SineRecipe,
    SpeechRecipe,
    SplitSizes,
    TextureRecipe,
)
from omni_model.storage import Workspace
from omni_model.telemetry import Metrics

SEED = 11
TINY_ENCODER = EncoderRecipe(width=32, num_layers=2, num_heads=2, max_audio_s=3)
TINY_TEXTURE = TextureRecipe(clips=SplitSizes(train=10, validation=4, test=4), clips_per_shard=7)
GRAMMAR = Path(texture.__file__).parents[1] / "text" / "grammar.json"


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def workspace(directory: Path, seed: int = SEED) -> Workspace:
    (directory / "out").mkdir(parents=True, exist_ok=True)
    (directory / "partial").mkdir(exist_ok=True)
    return Workspace(directory, seed, Metrics(directory / "metrics.jsonl"))


def make(
    kind: type[Artifact], stage: Callable[..., dict[str, Any]], directory: Path, *args: Any, seed: int = SEED
) -> Any:
    """Run a stage and hand back the handle that its caller would seal."""
    facts = stage(*args, work=workspace(directory, seed), runtime=Runtime())
    assert set(facts) == kind.fact_names()
    return kind("stage", "0" * 64, str(directory), content_digest(hash_payload(directory / "out")), **facts)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """One small corpus, encoder and feature set for every test that only reads."""
    root = tmp_path_factory.mktemp("audio")
    corpus = make(AudioCorpus, texture.synthesize, root / "texture", TINY_TEXTURE)
    ear = make(EncoderFiles, encoder.make_encoder, root / "encoder", TINY_ENCODER)
    frames = make(FeatureShards, features.extract, root / "features", FeatureRecipe(), corpus, ear)
    return {"root": root, "corpus": corpus, "encoder": ear, "features": frames}


def noise(duration_s: float, seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return (rng.standard_normal(round(duration_s * waveform.SAMPLE_RATE_HZ)) * 0.1).astype(np.float32)


# --- waveform ------------------------------------------------------------------------------------


@pytest.mark.parametrize("num_mel_bins", [80, 128])
@pytest.mark.parametrize("num_samples", [16_000, 16_161, 40_320, 47_999])
def test_log_mel_equals_transformers(num_mel_bins: int, num_samples: int) -> None:
    from transformers import WhisperFeatureExtractor

    samples = noise(num_samples / waveform.SAMPLE_RATE_HZ)
    reference = WhisperFeatureExtractor(feature_size=num_mel_bins)(
        samples, sampling_rate=16_000, padding="longest", truncation=False, return_tensors="pt"
    ).input_features[0]
    ours = log_mel(samples, num_mel_bins)
    assert ours.shape == (num_mel_bins, 2 * waveform.num_encoder_frames(num_samples))
    torch.testing.assert_close(ours, reference[:, : ours.shape[1]], atol=1e-6, rtol=0)


def test_16_bit_wav_survives_a_round_trip_exactly() -> None:
    pcm = np.random.default_rng(1).integers(-32_768, 32_768, 8_000).astype("<i2")
    samples = pcm.astype(np.float32) / waveform.PCM16_SCALE
    content = waveform.encode_wav(samples)
    assert content == waveform.encode_wav(samples)
    np.testing.assert_array_equal(waveform.to_pcm16(waveform.decode(content)), pcm)


def test_decode_mixes_channels_and_resamples() -> None:
    time_s = np.arange(44_100) / 44_100
    stereo = np.stack([0.4 * np.sin(2 * np.pi * 440 * time_s), np.zeros_like(time_s)], axis=1)
    buffer = io.BytesIO()
    soundfile.write(buffer, stereo, 44_100, format="FLAC")
    samples = waveform.decode(buffer.getvalue())
    expected = 0.2 * np.sin(2 * np.pi * 440 * np.arange(16_000) / 16_000)
    assert samples.dtype == np.float32
    np.testing.assert_allclose(samples[200:-200], expected[200:-200], atol=2e-3)


def wav_bytes(samples: np.ndarray, rate_hz: int = 16_000, subtype: str = "FLOAT") -> bytes:
    buffer = io.BytesIO()
    soundfile.write(buffer, samples, rate_hz, format="WAV", subtype=subtype)
    return buffer.getvalue()


def flac_cut_in_half() -> bytes:
    buffer = io.BytesIO()
    soundfile.write(buffer, noise(2), 16_000, format="FLAC")
    return buffer.getvalue()[: buffer.tell() // 2]


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"", "is empty"),
        (b"<html>not found</html>" * 9, "cannot be read as audio"),
        (flac_cut_in_half(), "cannot be read as audio|ends after"),
        (wav_bytes(np.array([0.1] * 8_000 + [np.nan] * 8_000)), "not finite"),
        (wav_bytes(noise(0.05)), "lasts 0.050 s"),
        (wav_bytes(np.zeros(16_000)), "is silent"),
        (wav_bytes(noise(1), rate_hz=4_000), "4000 Hz"),
        (wav_bytes(noise(3)), "lasts 3 s"),
    ],
)
def test_bad_audio_is_refused_in_one_sentence(content: bytes, says: str) -> None:
    with pytest.raises(BadInput, match=f"clip.wav .*({says})"):
        waveform.decode(content, "clip.wav", max_duration_s=2.5)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match=r"nowhere\.wav cannot be opened"):
        waveform.decode(tmp_path / "nowhere.wav")


def test_an_offset_goes_and_too_loud_floats_fit_again() -> None:
    samples = waveform.decode(wav_bytes(noise(1) * 30 + 0.5))
    assert np.abs(samples).max() <= 1
    assert abs(samples.mean()) < 0.02


# --- corpora -------------------------------------------------------------------------------------


def test_sines_have_the_committed_hashes(tmp_path: Path) -> None:
    corpus = make(AudioCorpus, sines.synthesize, tmp_path, SineRecipe())
    rows = corpora.read_clips(corpus)
    assert (corpus.num_clips, corpus.duration_s) == (5, 25.0)
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


def test_corpus_is_the_same_bytes_undisturbed_or_killed(
    tmp_path: Path, made: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    render, rendered = texture.render, []

    def dies_at_clip_10(plan: corpora.ClipPlan, seed: int) -> np.ndarray:
        rendered.append(plan.key)
        if len(rendered) == 10:
            raise KeyboardInterrupt
        return render(plan, seed)

    monkeypatch.setattr(texture, "render", dies_at_clip_10)
    with pytest.raises(KeyboardInterrupt):
        make(AudioCorpus, texture.synthesize, tmp_path, TINY_TEXTURE)
    assert sorted(path.name for path in (tmp_path / "partial").iterdir()) == [
        "clips-00000.tar",
        "clips-00001.tmp",
    ]
    rendered.extend(["from here on it lives"] * 10)
    corpus = make(AudioCorpus, texture.synthesize, tmp_path, TINY_TEXTURE)
    assert corpus.digest == made["corpus"].digest
    assert len(rendered) == 10 + 10 + (18 - 7)  # the finished shard of 7 was not made again


def test_corpus_payload_is_as_promised(made: dict[str, Any]) -> None:
    corpus = made["corpus"]
    rows = corpora.read_clips(corpus)
    assert [row["key"] for row in rows] == sorted(row["key"] for row in rows)
    assert Counter(row["split"] for row in rows) == {"train": 10, "validation": 4, "test": 4}
    stored = [item for path in corpora.shard_paths(corpus) for item in corpora.read_shard(path)]
    assert [metadata for _, _, metadata in stored] == rows
    for key, sound, metadata in stored:
        with wave.open(io.BytesIO(sound)) as file:
            assert file.getparams()[:3] == (1, 2, 16_000)
            assert file.getnframes() == round(metadata["duration_s"] * 16_000)
        assert key == metadata["key"]
    assert corpus.duration_s == pytest.approx(sum(row["duration_s"] for row in rows))


def test_a_longer_corpus_starts_with_the_same_clips() -> None:
    short = texture.plan_split(TINY_TEXTURE, "train", SEED)
    long = texture.plan_split(TextureRecipe(), "train", SEED)
    assert long[: len(short)] == short


def test_a_cut_off_shard_is_named(tmp_path: Path, made: dict[str, Any]) -> None:
    whole = corpora.shard_paths(made["corpus"])[0].read_bytes()
    path = tmp_path / "clips-00000.tar"
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(BadInput, match=r"clips-00000\.tar is damaged"):
        list(corpora.read_shard(path))


@pytest.mark.parametrize("key", ["a.b", "a/b", "", "a b"])
def test_keys_that_tars_would_mangle_are_refused(tmp_path: Path, key: str) -> None:
    plan = corpora.ClipPlan(key=key, split="train", labels={}, parameters={})
    with pytest.raises(BadInput, match="the clip key"):
        corpora.write_corpus(
            [plan],
            lambda _: corpora.Clip(noise(1)),
            generator="x",
            clips_per_shard=1,
            work=workspace(tmp_path),
        )


# --- labels and splits ---------------------------------------------------------------------------


def all_plans(module: Any, recipe: Any) -> dict[str, list[corpora.ClipPlan]]:
    return {split: module.plan_split(recipe, split, SEED) for split in corpora.SPLITS}


TEXTURE_RANGES: dict[str, Callable[[corpora.ClipPlan], label_ranges.Range | None]] = {
    "frequency_hz": lambda plan: texture.PITCH_HZ[plan.labels["pitch"]],
    "contour_semitones": lambda plan: texture.CONTOUR_SEMITONES[plan.labels["contour"]],
    "tremolo_hz": lambda plan: texture.TREMOLO_HZ[plan.labels["tremolo"]],
    "tilt": lambda plan: texture.NOISE_TILT[plan.labels["noise"]],
    "clicks_hz": lambda plan: texture.CRACKLE_CLICKS_HZ if plan.labels["noise"] == "crackle" else None,
    "period_s": lambda plan: texture.BEEP_PERIOD_S,
    "length_s": lambda plan: texture.BEEP_LENGTH_S,
    "level_dbfs": lambda plan: label_ranges.LOUDNESS_DBFS[plan.labels["loudness"]],
}
SPEECH_RANGES: dict[str, Callable[[corpora.ClipPlan], label_ranges.Range | None]] = {
    "rate_wpm": lambda plan: speech.PACE_WPM[plan.labels["pace"]],
    "pitch": lambda plan: speech.PITCH,
    "range": lambda plan: speech.INTONATION,
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
    assert len(seen) == len(ranges) * len(corpora.SPLITS)
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
    for one, other in itertools.combinations(corpora.SPLITS, 2):
        assert not speakers[one] & speakers[other]
        assert not phrases[one] & phrases[other]


@pytest.mark.parametrize(("module", "recipe"), [(texture, TextureRecipe()), (speech, SpeechRecipe())])
def test_labels_are_balanced_and_independent(module: Any, recipe: Any) -> None:
    plans = all_plans(module, recipe)["train"]
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


def count_bursts(samples: np.ndarray) -> int:
    power = np.convolve(samples.astype(np.float64) ** 2, np.ones(320) / 320, "same")
    loud = power > power.max() / 4
    return int(loud[0]) + int(np.sum(loud[1:] & ~loud[:-1]))


def test_a_texture_that_cannot_hold_five_beeps_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="texture durations"):
        texture.synthesize(TextureRecipe(max_duration_s=1.2), work=workspace(tmp_path), runtime=Runtime())


# --- speech --------------------------------------------------------------------------------------


def request(**changes: Any) -> corpora.ClipPlan:
    parameters = {
        "voice": "gmw/en-US",
        "variant": "m3",
        "rate_wpm": 160,
        "pitch": 50,
        "range": 50,
        "volume": 100,
    }
    return corpora.ClipPlan("clip", "train", {}, {**parameters, **changes}, transcript="seven blue cats")


def test_helper_needs_neither_torch_nor_numpy() -> None:
    code = "import sys, omni_model.audio.espeak; sys.exit(bool({'torch', 'numpy'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], cwd=Path(espeak.__file__).parents[2]).returncode == 0


def test_speech_is_the_same_in_another_process_at_another_time() -> None:
    pytest.importorskip("espeakng_loader")
    variants = ("whisper", "whisperf", "f3", "f5", "m3", "croak")
    with speech.Helper() as helper:
        first = {variant: helper.speak(request(variant=variant), SEED) for variant in variants}
    time.sleep(2.1)  # espeak-ng's own seed is the clock in seconds
    with speech.Helper() as helper:
        helper.speak(request(rate_wpm=200), SEED)
        second = {variant: helper.speak(request(variant=variant), SEED) for variant in reversed(variants)}
        other_noise = helper.speak(request(variant="whisper"), SEED + 1)
    for variant in variants:
        np.testing.assert_array_equal(first[variant], second[variant])
    assert not np.array_equal(first["whisper"], other_noise)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"variant": "zz"}, "no variant 'zz'"),
        ({"voice": "gmw/en-XX"}, "no voice 'gmw/en-XX'"),
        ({"variant": "../../lang/gmw/de"}, "no variant"),
        ({"rate_wpm": 4_000}, "rate_wpm of clip clip is 4000"),
    ],
)
def test_voices_that_espeak_would_silently_replace_are_refused(changes: dict[str, Any], says: str) -> None:
    pytest.importorskip("espeakng_loader")
    with speech.Helper() as helper:
        with pytest.raises(BadInput, match=says):
            helper.speak(request(**changes), SEED)
        assert len(helper.speak(request(), SEED)) > 8_000  # and it still speaks


def test_every_voice_of_the_table_exists() -> None:
    pytest.importorskip("espeakng_loader")
    _, data = espeak.load_library()
    assert {accent for accents in speech.ACCENTS.values() for accent in accents} <= espeak.voice_files(
        data / "lang"
    )
    variants = {name for splits in speech.VARIANTS.values() for names in splits.values() for name in names}
    assert variants <= espeak.voice_files(data / "voices" / "!v")


def test_the_missing_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "espeakng_loader", None)
    answers = io.BytesIO()
    espeak.serve(io.BytesIO(), answers)
    status, length = espeak.FRAME_HEADER.unpack(answers.getvalue()[: espeak.FRAME_HEADER.size])
    assert status == espeak.REFUSED
    assert 'pip install "nanochat-omni[espeak]"' in answers.getvalue()[-length:].decode()


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
    with pytest.raises(BadInput, match=r"speech\.max_duration_s"):
        make(
            AudioCorpus,
            speech.synthesize,
            tmp_path,
            SpeechRecipe(clips=SplitSizes(4, 4, 4), max_duration_s=0.3),
        )


# --- encoder -------------------------------------------------------------------------------------


def test_encoder_is_a_whisper_directory_with_the_same_bytes_every_time(
    tmp_path: Path, made: dict[str, Any]
) -> None:
    from transformers import WhisperFeatureExtractor, WhisperModel

    again = make(EncoderFiles, encoder.make_encoder, tmp_path / "same", TINY_ENCODER)
    other = make(EncoderFiles, encoder.make_encoder, tmp_path / "other", TINY_ENCODER, seed=SEED + 1)
    assert again.digest == made["encoder"].digest != other.digest
    assert WhisperModel.from_pretrained(again.out).config.max_source_positions == 150
    assert WhisperFeatureExtractor.from_pretrained(again.out).nb_max_frames == 300


def test_frames_equal_transformers_where_it_accepts_the_length(made: dict[str, Any]) -> None:
    from transformers import WhisperModel

    reference = WhisperModel.from_pretrained(made["encoder"].out).encoder.eval()
    ear = encoder.load_encoder(made["encoder"])
    spectrum = log_mel(noise(7.5), ear.num_mel_bins)
    frames = ear.encode(spectrum)
    assert frames.shape == (375, 32)
    assert not frames.requires_grad
    with torch.no_grad():
        for window in (0, 1):  # the last window is shorter, and transformers would refuse it
            expected = reference(spectrum[None, :, 300 * window : 300 * (window + 1)]).last_hidden_state[0]
            torch.testing.assert_close(
                frames[150 * window : 150 * (window + 1)], expected, atol=1e-5, rtol=1e-5
            )
    torch.testing.assert_close(frames[300:], ear.encode(spectrum[:, 600:]))


def test_layers_and_precisions(made: dict[str, Any]) -> None:
    spectrum = log_mel(noise(1), 80)
    last = encoder.load_encoder(made["encoder"]).encode(spectrum)
    first = encoder.load_encoder(made["encoder"], layer="1").encode(spectrum)
    coarse = encoder.load_encoder(made["encoder"], dtype="bfloat16").encode(spectrum)
    assert first.shape == last.shape
    assert not torch.allclose(first, last)
    assert torch.nn.functional.cosine_similarity(coarse, last).min() > 0.995
    with pytest.raises(BadInput, match=r"features\.layer '9'"):
        encoder.load_encoder(made["encoder"], layer="9")
    with pytest.raises(BadInput, match=r"features\.dtype 'float8'"):
        encoder.load_encoder(made["encoder"], dtype="float8")


def test_an_encoder_without_its_weights_is_refused(tmp_path: Path, made: dict[str, Any]) -> None:
    from safetensors.torch import load_file, save_file

    weights = load_file(made["encoder"].out / "model.safetensors")
    weights.pop("encoder.conv1.weight")
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    (tmp_path / "config.json").write_text((made["encoder"].out / "config.json").read_text())
    with pytest.raises(BadInput, match=r"lacks 1 weights .* encoder\.conv1\.weight"):
        encoder.load_whisper(tmp_path)
    with pytest.raises(BadInput, match="is not a Whisper model"):
        encoder.load_whisper(tmp_path / "nothing")


# --- features ------------------------------------------------------------------------------------


def test_features_are_the_encoders_frames(made: dict[str, Any]) -> None:
    reader = features.FeatureReader(made["features"])
    ear = encoder.load_encoder(made["encoder"])
    assert len(reader) == made["features"].num_clips == 18
    assert [clip["split"] for clip in reader.by_split("test")] == ["test"] * 4
    assert sum(clip["num_frames"] for clip in reader.clips) == made["features"].num_frames
    for path in corpora.shard_paths(made["corpus"]):
        for key, sound, _ in corpora.read_shard(path):
            samples = waveform.decode(sound)
            frames = reader.frames(key)
            assert frames.dtype == np.float32
            assert frames.shape == (waveform.num_encoder_frames(len(samples)), reader.width)
            np.testing.assert_array_equal(frames, features.encode_samples(samples, ear).astype(np.float32))


def test_features_are_the_same_bytes_undisturbed_or_killed(
    tmp_path: Path, made: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    encode, encoded = features.encode_samples, []

    def dies_at_clip_10(samples: np.ndarray, ear: encoder.FrozenEncoder) -> np.ndarray:
        encoded.append(len(samples))
        if len(encoded) == 10:
            raise KeyboardInterrupt
        return encode(samples, ear)

    monkeypatch.setattr(features, "encode_samples", dies_at_clip_10)
    arguments = (features.extract, tmp_path, FeatureRecipe(), made["corpus"], made["encoder"])
    with pytest.raises(KeyboardInterrupt):
        make(FeatureShards, *arguments)
    again = make(FeatureShards, *arguments)
    assert again.digest == made["features"].digest
    assert len(encoded) == 10 + (18 - 7)


def test_plain_webdataset_reads_them(made: dict[str, Any]) -> None:
    import webdataset

    reader = features.FeatureReader(made["features"])
    paths = sorted(str(path) for path in made["features"].out.glob("features-*.tar"))
    samples = list(webdataset.WebDataset(paths, shardshuffle=False).decode())
    assert [sample["__key__"] for sample in samples] == [clip["key"] for clip in reader.clips]
    for sample, clip in zip(samples, reader.clips, strict=True):
        assert sample["json"] == clip
        assert sample["feat.npy"].dtype == np.float16
        np.testing.assert_array_equal(sample["feat.npy"].astype(np.float32), reader.frames(clip["key"]))


def test_a_flipped_bit_is_found_and_named(tmp_path: Path, made: dict[str, Any]) -> None:
    copy = make(FeatureShards, features.extract, tmp_path, FeatureRecipe(), made["corpus"], made["encoder"])
    path = copy.out / "features-00001.tar"
    content = bytearray(path.read_bytes())
    content[3_000] ^= 1
    path.write_bytes(content)
    reader = features.FeatureReader(copy)
    reader.frames(reader.clips[0]["key"])  # the other shards are whole
    with pytest.raises(BadInput, match=r"features-00001\.tar is missing or damaged"):
        reader.frames(reader.clips[7]["key"])


def test_features_of_different_encoders_do_not_mix(tmp_path: Path, made: dict[str, Any]) -> None:
    stranger = make(EncoderFiles, encoder.make_encoder, tmp_path / "encoder", TINY_ENCODER, seed=SEED + 1)
    corpus = make(AudioCorpus, sines.synthesize, tmp_path / "sines", SineRecipe())
    others = make(FeatureShards, features.extract, tmp_path / "others", FeatureRecipe(), corpus, stranger)
    with pytest.raises(BadInput, match="features .*and .*others hold different features"):
        features.FeatureReader(made["features"], others)
    with pytest.raises(BadInput, match="keys must differ"):
        features.FeatureReader(made["features"], made["features"])
    same = make(FeatureShards, features.extract, tmp_path / "same", FeatureRecipe(), corpus, made["encoder"])
    assert len(features.FeatureReader(made["features"], same)) == 18 + 5
