"""The frozen ear: equal to transformers at every length, alone or in a batch, or refused."""

import json
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.nn import functional as F

from omni_model.artifacts import EncoderFiles
from omni_model.audio import encoder, whisper
from omni_model.audio.encoder import Encoder, load_encoder, make_encoder
from omni_model.audio.mel import log_mel, mel_filters
from omni_model.audio.waveform import SAMPLE_RATE_HZ, num_encoder_frames
from omni_model.config import BadInput, EncoderRecipe
from tests.small_sound import SEED, make, noise

WHISPER = EncoderRecipe(width=64, num_layers=3, num_heads=4, max_audio_s=3)
WINDOW_FRAMES = 150
LAYER_CHOICES = [
    (("last",), "concat"),
    (("1",), "concat"),
    (("2", "last"), "concat"),
    (("1", "last"), "mean"),
]
TOLERANCE = {"atol": 2e-5, "rtol": 1e-5}


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def whisper_files(tmp_path_factory: pytest.TempPathFactory) -> EncoderFiles:
    """A random Whisper whose weights are large enough that its layers are far from linear."""
    files: EncoderFiles = make(EncoderFiles, make_encoder, tmp_path_factory.mktemp("whisper"), WHISPER)
    path = files.out / "model.safetensors"
    weights = load_file(path)
    grown = {
        name: tensor * 2.7 if tensor.dim() > 1 and "embed_positions" not in name else tensor + 0.1
        for name, tensor in weights.items()
    }
    save_file(grown, path, metadata={"format": "pt"})
    return files


@pytest.fixture(scope="module")
def w2v_bert_files(tmp_path_factory: pytest.TempPathFactory) -> EncoderFiles:
    """A random w2v-BERT with windows of three seconds."""
    from transformers import Wav2Vec2BertConfig, Wav2Vec2BertModel

    directory = tmp_path_factory.mktemp("w2v-bert")
    torch.manual_seed(SEED)
    shape = Wav2Vec2BertConfig(
        hidden_size=64, num_hidden_layers=2, num_attention_heads=2, intermediate_size=128
    )
    Wav2Vec2BertModel(shape).save_pretrained(directory / "out")
    facts = {"weights": "random", "width": 64, "num_layers": 2, "frame_rate_hz": 50, "max_audio_s": 3.0}
    return EncoderFiles("s", "0" * 64, str(directory), "0" * 64, family="w2v-bert", **facts)


@pytest.fixture(scope="module")
def both(whisper_files: EncoderFiles, w2v_bert_files: EncoderFiles) -> dict[str, EncoderFiles]:
    return {"whisper": whisper_files, "w2v-bert": w2v_bert_files}


def expected(states: Sequence[torch.Tensor], layers: tuple[str, ...], mix: str) -> torch.Tensor:
    """What the features should be of transformers' hidden states (T, E)."""
    chosen = [
        states[-1] if layer == "last" else F.layer_norm(states[int(layer)], states[0].shape[-1:])
        for layer in layers
    ]
    return torch.cat(chosen, -1) if mix == "concat" else torch.stack(chosen).mean(0)


@torch.no_grad()
def whisper_truth(files: EncoderFiles, mel_MF: torch.Tensor) -> list[torch.Tensor]:
    """All hidden states by transformers' own forward, its window shrunk to this very length."""
    from transformers import WhisperModel

    model = WhisperModel.from_pretrained(files.out).encoder.eval()
    num_frames = mel_MF.shape[1] // 2
    model.config.max_source_positions = model.max_source_positions = num_frames
    model.embed_positions = torch.nn.Embedding.from_pretrained(model.embed_positions.weight[:num_frames])
    return [state[0] for state in model(mel_MF[None], output_hidden_states=True).hidden_states]


# --- the spectrogram -----------------------------------------------------------------------------


@pytest.mark.parametrize("num_mel_bins", [80, 128])
@pytest.mark.parametrize("num_samples", [1_600, 16_000, 16_161, 40_320, 47_999])
def test_log_mel_equals_transformers(num_mel_bins: int, num_samples: int) -> None:
    from transformers import WhisperFeatureExtractor

    samples = noise(num_samples / SAMPLE_RATE_HZ) * np.linspace(0, 1, num_samples, dtype=np.float32) ** 8
    reference = WhisperFeatureExtractor(feature_size=num_mel_bins)(
        samples, sampling_rate=16_000, padding="longest", truncation=False, return_tensors="pt"
    ).input_features[0]
    ours = log_mel(samples, num_mel_bins)
    assert ours.shape == (num_mel_bins, 2 * num_encoder_frames(num_samples))
    torch.testing.assert_close(ours, reference[:, : ours.shape[1]], atol=1e-6, rtol=0)


def test_filters_are_made_once_and_equal_transformers() -> None:
    from transformers import WhisperFeatureExtractor

    assert mel_filters(80) is mel_filters(80)
    reference = torch.from_numpy(WhisperFeatureExtractor().mel_filters).float()
    torch.testing.assert_close(mel_filters(80).T, reference, atol=1e-8, rtol=0)


# --- Whisper -------------------------------------------------------------------------------------


def test_a_random_encoder_is_a_whisper_directory_with_the_same_bytes_every_time(tmp_path: Path) -> None:
    from transformers import WhisperFeatureExtractor, WhisperModel

    one, same = (make(EncoderFiles, make_encoder, tmp_path / name, WHISPER) for name in ("one", "same"))
    other = make(EncoderFiles, make_encoder, tmp_path / "other", WHISPER, seed=SEED + 1)
    assert one.digest == same.digest != other.digest
    assert one.family == "whisper"
    assert WhisperModel.from_pretrained(one.out).config.max_source_positions == WINDOW_FRAMES
    assert WhisperFeatureExtractor.from_pretrained(one.out).nb_max_frames == 2 * WINDOW_FRAMES


@pytest.mark.parametrize(("layers", "mix"), LAYER_CHOICES)
def test_a_clip_that_fills_the_window_equals_transformers(
    whisper_files: EncoderFiles, layers: tuple[str, ...], mix: str
) -> None:
    from transformers import WhisperFeatureExtractor, WhisperModel

    samples = noise(3)
    ear = load_encoder(whisper_files, layers, mix)
    assert (ear.num_layers, ear.width) == ((2, 128) if len(layers) == 2 and mix == "concat" else (1, 64))
    model = WhisperModel.from_pretrained(whisper_files.out).eval()
    features = WhisperFeatureExtractor.from_pretrained(whisper_files.out)(
        samples, sampling_rate=16_000, return_tensors="pt"
    )
    with torch.no_grad():
        states = model.encoder(features.input_features, output_hidden_states=True).hidden_states
    frames = ear.encode(samples)
    assert frames.dtype == np.float32
    assert frames.shape == (WINDOW_FRAMES, ear.width)
    truth = expected([state[0] for state in states], layers, mix)
    torch.testing.assert_close(torch.from_numpy(frames), truth, **TOLERANCE)


@pytest.mark.parametrize("num_samples", [1_600, 1_601, 8_159, 8_160, 16_161, 47_999, 48_000])
def test_any_length_is_read_at_its_own_length(whisper_files: EncoderFiles, num_samples: int) -> None:
    samples = noise(num_samples / SAMPLE_RATE_HZ)
    frames = load_encoder(whisper_files).encode(samples)
    assert len(frames) == num_samples // 160 // 2
    truth = whisper_truth(whisper_files, log_mel(samples, 80))[-1]
    torch.testing.assert_close(torch.from_numpy(frames), truth, **TOLERANCE)


@pytest.mark.parametrize("last_frames", [1, 76])
def test_longer_audio_goes_through_windows(whisper_files: EncoderFiles, last_frames: int) -> None:
    num_samples = (2 * WINDOW_FRAMES + last_frames) * 320 + 100
    samples = noise(num_samples / SAMPLE_RATE_HZ)
    ear = load_encoder(whisper_files, ("1", "last"))
    frames = torch.from_numpy(ear.encode(samples))
    assert frames.shape == (2 * WINDOW_FRAMES + last_frames, 128)
    mel = log_mel(samples, 80)
    for number in range(3):
        window = mel[:, 2 * WINDOW_FRAMES * number : 2 * WINDOW_FRAMES * (number + 1)]
        truth = expected(whisper_truth(whisper_files, window), ("1", "last"), "concat")
        found = frames[WINDOW_FRAMES * number : WINDOW_FRAMES * (number + 1)]
        torch.testing.assert_close(found, truth, **TOLERANCE)


def test_padding_a_clip_would_change_what_is_heard(whisper_files: EncoderFiles) -> None:
    """Why true length matters: the same second, alone and in front of silence."""
    samples = noise(1)
    ear = load_encoder(whisper_files)
    alone, padded = ear.encode(samples), ear.encode(np.pad(samples, (0, 32_000)))[:50]
    assert cosine(alone, padded).min() < 0.99


def cosine(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    return (a * b).sum(1) / np.linalg.norm(a, axis=1) / np.linalg.norm(b, axis=1)


# Without oneDNN's layers both runs are the plain one, and this shows nothing.
@pytest.mark.parametrize(("dtype", "least"), [("float32", 0.999999), ("bfloat16", 0.9998)])
def test_packed_products_and_precisions_say_the_same(
    whisper_files: EncoderFiles, monkeypatch: pytest.MonkeyPatch, dtype: str, least: float
) -> None:
    samples = noise(2)
    reference = load_encoder(whisper_files).encode(samples)
    packed = load_encoder(whisper_files, dtype=dtype).encode(samples)
    monkeypatch.setattr(whisper, "_can_pack", lambda dtype: False)
    plain = load_encoder(whisper_files, dtype=dtype).encode(samples)
    assert plain.dtype == packed.dtype == np.float32
    assert cosine(plain, reference).min() > least
    assert cosine(packed, reference).min() > least
    if dtype == "bfloat16":
        assert np.abs(plain - reference).max() > 1e-3  # it is another precision


# --- w2v-BERT ------------------------------------------------------------------------------------


@pytest.mark.parametrize(("layers", "mix"), [(("last",), "concat"), (("1", "last"), "concat")])
@pytest.mark.parametrize("num_samples", [1_600, 16_161, 16_321, 47_999])
def test_w2v_bert_equals_transformers(
    w2v_bert_files: EncoderFiles, layers: tuple[str, ...], mix: str, num_samples: int
) -> None:
    from transformers import SeamlessM4TFeatureExtractor, Wav2Vec2BertModel

    samples = noise(num_samples / SAMPLE_RATE_HZ)
    model = Wav2Vec2BertModel.from_pretrained(w2v_bert_files.out).eval()
    read = SeamlessM4TFeatureExtractor()(samples, sampling_rate=16_000, return_tensors="pt")
    with torch.no_grad():
        states = model(**read, output_hidden_states=True).hidden_states
    frames = load_encoder(w2v_bert_files, layers, mix).encode(samples)
    num_frames = (1 + (num_samples - 400) // 160) // 2
    assert len(frames) == num_frames == int(read["attention_mask"].sum())
    truth = expected([state[0, :num_frames] for state in states], layers, mix)
    torch.testing.assert_close(torch.from_numpy(frames), truth, **TOLERANCE)


def test_w2v_bert_reads_long_audio_in_windows_and_bfloat16(w2v_bert_files: EncoderFiles) -> None:
    samples = noise(7.5)
    frames = load_encoder(w2v_bert_files).encode(samples)
    assert frames.shape == ((1 + (120_000 - 400) // 160) // 2, 64)
    whole = load_encoder(replace(w2v_bert_files, max_audio_s=30.0)).encode(samples)
    assert whole.shape == frames.shape
    assert np.abs(whole - frames).max() > 1e-3
    coarse = load_encoder(w2v_bert_files, dtype="bfloat16").encode(samples)
    assert cosine(coarse, frames).min() > 0.999


def test_a_w2v_bert_with_an_adapter_is_refused(tmp_path: Path, w2v_bert_files: EncoderFiles) -> None:
    from transformers import Wav2Vec2BertConfig, Wav2Vec2BertModel

    shape = Wav2Vec2BertConfig.from_pretrained(w2v_bert_files.out)
    shape.add_adapter = True
    Wav2Vec2BertModel(shape).save_pretrained(tmp_path / "out")
    with pytest.raises(BadInput, match="with an adapter"):
        load_encoder(replace(w2v_bert_files, uri=str(tmp_path)))


# --- batches -------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["whisper", "w2v-bert"])
@pytest.mark.parametrize("batch_frames", [200, 100_000])
def test_a_batch_equals_each_clip_alone(
    both: dict[str, EncoderFiles], family: str, batch_frames: int
) -> None:
    """In any order, last frames and windows of long clips included."""
    ear = load_encoder(both[family], ("1", "last"))
    batched = Encoder(ear._backbone, ("1", "last"), batch_frames=batch_frames)
    clips = [noise(duration_s, seed) for seed, duration_s in enumerate([0.1, 1.231, 7.02, 0.5, 3, 2.99, 0.5])]
    alone = [ear.encode(samples) for samples in clips]
    for order in (range(len(clips)), np.random.default_rng(SEED).permutation(len(clips))):
        for place, frames in zip(order, batched.encode_batch([clips[i] for i in order]), strict=True):
            np.testing.assert_allclose(frames, alone[place], atol=1e-5)
    for frames, single in zip(ear.encode_batch(clips), alone, strict=True):
        np.testing.assert_array_equal(frames, single)  # a CPU takes them one by one


def test_batches_keep_to_their_budget(whisper_files: EncoderFiles) -> None:
    ear = Encoder(load_encoder(whisper_files)._backbone, batch_frames=100)
    lengths = [10, 50, 33, 120, 33, 33, 49]
    buckets = ear._buckets(lengths)
    assert sorted(place for bucket in buckets for place in bucket) == list(range(len(lengths)))
    for bucket in buckets:
        assert len(bucket) == 1 or max(lengths[place] for place in bucket) * len(bucket) <= 100
    assert len(buckets) == 4


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA card")
@pytest.mark.parametrize("family", ["whisper", "w2v-bert"])
@pytest.mark.parametrize(("dtype", "least"), [("float32", 0.9999), ("bfloat16", 0.995)])
def test_a_card_hears_the_same(both: dict[str, EncoderFiles], family: str, dtype: str, least: float) -> None:
    clips = [noise(duration_s, seed) for seed, duration_s in enumerate([0.1, 1.231, 7.02, 0.5])]
    reference = load_encoder(both[family], ("1", "last"))
    on_card = load_encoder(both[family], ("1", "last"), dtype=dtype, device="cuda")
    for samples, frames in zip(clips, on_card.encode_batch(clips), strict=True):
        assert frames.dtype == np.float32
        assert cosine(frames, reference.encode(samples)).min() > least


# --- refusals ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({"layers": ("9",)}, r"features\.layers 9: choose from 1, 2, last"),
        ({"layers": ("last", "3")}, r"features\.layers last, 3: choose from 1, 2, last"),
        ({"layers": ("0",)}, r"features\.layers 0"),
        ({"layers": ()}, r"features\.layers is empty"),
        ({"mix": "sum"}, r"features\.mix 'sum' is not known; choose from concat, mean"),
        ({"dtype": "auto"}, r"features\.dtype 'auto' is not known; choose from float32, bfloat16"),
    ],
)
def test_unknown_choices_are_refused(
    whisper_files: EncoderFiles, arguments: dict[str, Any], says: str
) -> None:
    with pytest.raises(BadInput, match=says):
        load_encoder(whisper_files, **arguments)


@pytest.mark.parametrize("samples", [noise(0.05), np.zeros(16_000, np.float32), np.full(16_000, np.nan)])
@pytest.mark.parametrize("family", ["whisper", "w2v-bert"])
def test_sound_that_cannot_be_heard_is_refused(
    both: dict[str, EncoderFiles], family: str, samples: np.ndarray
) -> None:
    with pytest.raises(BadInput, match=r"at least 0\.1 s|is silent|not finite"):
        load_encoder(both[family]).encode(samples)


def without_config(out: Path) -> None:
    (out / "config.json").unlink()


def with_another_config(out: Path) -> None:
    (out / "config.json").write_text("[1, 2]")


def of_another_family(out: Path) -> None:
    config = json.loads((out / "config.json").read_text())
    (out / "config.json").write_text(json.dumps({**config, "model_type": "bert"}))


def without_weights(out: Path) -> None:
    (out / "model.safetensors").unlink()


def cut_off(out: Path) -> None:
    content = (out / "model.safetensors").read_bytes()
    (out / "model.safetensors").write_bytes(content[: len(content) // 2])


def of_another_width(out: Path) -> None:
    config = json.loads((out / "config.json").read_text())
    name = "encoder_ffn_dim" if "encoder_ffn_dim" in config else "intermediate_size"
    (out / "config.json").write_text(json.dumps({**config, name: 96}))


def lacking_a_matrix(out: Path) -> None:
    weights = load_file(out / "model.safetensors")
    weights.pop(next(name for name in sorted(weights) if name.startswith("encoder.layers.1")))
    save_file(weights, out / "model.safetensors", metadata={"format": "pt"})


def sharded_without_a_part(out: Path) -> None:
    weights = load_file(out / "model.safetensors")
    (out / "model.safetensors").unlink()
    names = sorted(weights)
    half = set(names[: len(names) // 2])
    save_file({name: weights[name] for name in half}, out / "model-1.safetensors", metadata={"format": "pt"})
    index = {name: f"model-{1 if name in half else 2}.safetensors" for name in names}
    (out / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))


def with_a_broken_index(out: Path) -> None:
    (out / "model.safetensors").unlink()
    (out / "model.safetensors.index.json").write_text("{")


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (without_config, r"is not a model directory: it has no config\.json"),
        (with_another_config, r"config\.json is not the description of a model"),
        (of_another_family, "holds a model of the family 'bert', not"),
        (without_weights, r"model\.safetensors is missing"),
        (cut_off, r"model\.safetensors is damaged or cut off"),
        (of_another_width, "cannot be loaded as a"),
        (lacking_a_matrix, r"lacks 1 weights of the encoder, such as encoder\.layers\.1"),
        (sharded_without_a_part, r"model-2\.safetensors is missing"),
        (with_a_broken_index, r"index\.json cannot be read"),
    ],
)
@pytest.mark.parametrize("family", ["whisper", "w2v-bert"])
def test_what_is_no_whole_model_is_refused(
    tmp_path: Path, both: dict[str, EncoderFiles], family: str, damage: Any, says: str
) -> None:
    shutil.copytree(both[family].out, tmp_path / "out")
    damage(tmp_path / "out")
    with pytest.raises(BadInput, match=says) as refusal:
        load_encoder(replace(both[family], uri=str(tmp_path)))
    assert "\n" not in str(refusal.value)


def test_a_sharded_model_is_read(tmp_path: Path, whisper_files: EncoderFiles) -> None:
    shutil.copytree(whisper_files.out, tmp_path / "out")
    sharded_without_a_part(tmp_path / "out")
    weights, half = (
        load_file(whisper_files.out / "model.safetensors"),
        load_file(tmp_path / "out/model-1.safetensors"),
    )
    rest = {name: tensor for name, tensor in weights.items() if name not in half}
    save_file(rest, tmp_path / "out/model-2.safetensors", metadata={"format": "pt"})
    samples = noise(1)
    frames = load_encoder(replace(whisper_files, uri=str(tmp_path))).encode(samples)
    np.testing.assert_array_equal(frames, load_encoder(whisper_files).encode(samples))


def test_families_are_not_taken_for_each_other(both: dict[str, EncoderFiles]) -> None:
    with pytest.raises(BadInput, match="holds a model of the family 'whisper', not 'wav2vec2-bert'"):
        load_encoder(replace(both["whisper"], family="w2v-bert"))
    with pytest.raises(BadInput, match="unknown family 'hubert'"):
        load_encoder(replace(both["whisper"], family="hubert"))


def test_a_load_says_nothing_of_its_own(
    whisper_files: EncoderFiles, capfd: pytest.CaptureFixture[str]
) -> None:
    encoder.load_encoder(whisper_files)
    assert capfd.readouterr() == ("", "")
