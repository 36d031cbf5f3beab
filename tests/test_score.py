"""`omni score` on a small listener in a store of its own: answers, distances, folders, what is refused."""

import itertools
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import torch

import flows.cli  # noqa: F401  # every stage is declared
from flows import models
from omni_model.artifacts import (
    AdapterCheckpoint,
    Artifact,
    AudioCorpus,
    EncoderFiles,
    Familiarity,
    FeatureShards,
    GptCheckpoint,
    Manifest,
    TokenizerFiles,
    hash_payload,
    sha256_text,
)
from omni_model.audio.clips import Clip, ClipPlan, clip_rng
from omni_model.audio.corpora import write_corpus
from omni_model.audio.encoder import make_encoder
from omni_model.audio.features import extract
from omni_model.audio.reader import FeatureReader
from omni_model.config import (
    BadInput,
    EncoderRecipe,
    FamiliarityRecipe,
    FeatureRecipe,
    Runtime,
)
from omni_model.evaluation import score_files, score_in_words
from omni_model.evaluation.familiarity import learn_familiarity, read_familiarity
from omni_model.evaluation.labelled import questions_about
from omni_model.model.gpt import GPT, GPTConfig
from omni_model.model.lora import add_lora, save_adapter
from omni_model.model.projector import Projector
from omni_model.model.weights import save_gpt, save_projector
from omni_model.plain import to_plain
from omni_model.storage import Store, Workspace
from omni_model.telemetry import Metrics
from omni_model.text.questions import multiple_choice
from omni_model.training.teaching import belonging

ROOT = Path(__file__).resolve().parent.parent
RATE_HZ = 16_000
SHAPE = GPTConfig(
    sequence_len=64, vocab_size=257, n_layer=2, n_head=2, n_kv_head=2, n_embd=32, window_pattern="L"
)
QUESTION, OPTIONS = "Which colour is said?", ("red", "blue", "green", "white")
TAUGHT = [
    (split, "tone", "") for split, n in (("train", 40), ("validation", 30), ("test", 30)) for _ in range(n)
]
STRANGE = [
    *itertools.repeat(("train", "nonsense", "hisses"), 40),
    *itertools.repeat(("test", "noise", "surf"), 10),
    *itertools.repeat(("test", "foreign", "square"), 8),
]


def tone(rng: np.random.Generator, seconds: float = 0.5) -> np.ndarray:
    time_s = np.arange(round(seconds * RATE_HZ)) / RATE_HZ
    sound = 0.2 * np.sin(2 * np.pi * rng.uniform(150, 250) * time_s)
    return (sound + 1e-3 * rng.normal(size=len(sound))).astype(np.float32)


def hiss(rng: np.random.Generator, seconds: float = 0.5) -> np.ndarray:
    return (0.2 * rng.normal(size=round(seconds * RATE_HZ))).clip(-1, 1).astype(np.float32)


def seal(
    store: Path,
    kind: type[Artifact],
    stage: str,
    fill: Callable[[Workspace], dict[str, Any]],
    **components: Any,
) -> Any:
    """A finished artifact in a store, as a run leaves it."""
    key = sha256_text(f"{stage}{components}")
    directory = store / stage / key[:32]
    for part in ("out", "partial"):
        (directory / part).mkdir(parents=True)
    facts = fill(Workspace(directory, 3, Metrics(directory / "metrics.jsonl")))
    files, timings = hash_payload(directory / "out"), {"seconds": 1.0, "started_unix": 1.0}
    Manifest(stage, key, kind.__name__, components, files, facts, {}, timings, {}).write(directory)
    return kind.from_manifest(Manifest.read(directory), directory)


def corpus_of(name: str, kinds: list[tuple[str, str, str]]) -> Callable[[Workspace], dict[str, Any]]:
    plans = [
        ClipPlan(
            f"{name}-{n:03d}",
            split,
            {"pitch": ("deep", "low", "high")[n % 3]} if kind == "foreign" else {},
            {"kind": kind, "style": style},
        )
        for n, (split, kind, style) in enumerate(kinds)
    ]

    def render(plan: ClipPlan) -> Clip:
        make = tone if plan.parameters["kind"] in ("tone", "foreign") else hiss
        return Clip(make(clip_rng(1, plan.key)))

    return lambda work: write_corpus(plans, render, generator="test", clips_per_shard=200, work=work)


def write_gpt(work: Workspace) -> dict[str, Any]:
    gpt = GPT(SHAPE)
    shake = torch.Generator().manual_seed(1)
    with torch.no_grad():  # fresh weights end in zeros
        for parameter in gpt.parameters():
            parameter += 0.1 * torch.randn(parameter.shape, generator=shake)
    save_gpt(gpt, work.out)
    return {"num_parameters": 1, "steps": 1, "n_embd": 32, "vocab_size": 257}


def write_tokenizer(work: Workspace) -> dict[str, Any]:
    (work.out / "tokenizer.json").write_text('{"kind":"bytes"}')
    return {"vocab_size": 257}


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store with a listener and everything that it was made of."""
    torch.set_num_threads(1)
    root = tmp_path_factory.mktemp("score") / "store"
    shape = EncoderRecipe(width=16, num_layers=2, num_heads=2, max_audio_s=2)
    way = FeatureRecipe(layers=("1", "last"), dtype="float32")

    def encoder_files(work: Workspace) -> dict[str, Any]:
        return make_encoder(shape, work=work, runtime=Runtime())

    encoder = seal(root, EncoderFiles, "make_encoder", encoder_files)

    def heard(name: str, kinds: list[tuple[str, str, str]]) -> FeatureShards:
        corpus = seal(root, AudioCorpus, "synthesize_texture", corpus_of(name, kinds), name=name)

        def fill(work: Workspace) -> dict[str, Any]:
            return extract(way, corpus, encoder, work=work, runtime=Runtime(workers=1))

        inputs = {"corpus": corpus.digest, "encoder": encoder.digest}
        made = seal(root, FeatureShards, "extract_features", fill, inputs=inputs, recipe=to_plain(way))
        assert isinstance(made, FeatureShards)
        return made

    features, strange = heard("t", TAUGHT), heard("s", STRANGE)
    gpt = seal(root, GptCheckpoint, "learn_lessons", write_gpt)
    tokenizer = seal(root, TokenizerFiles, "train_tokenizer", write_tokenizer)

    def write_listener(work: Workspace) -> dict[str, Any]:
        save_projector(Projector(32, 32, stack=5, hidden=8, num_layers=2), work.out / "projector")
        save_adapter(add_lora(GPT(SHAPE), rank=2, alpha=4, seed=0), work.out / "adapter")
        belongs = belonging(gpt, FeatureReader(features))
        return {"num_parameters": 1, "steps": 1, "rank": 2, **belongs}

    own = {"gpt": gpt.digest, "tokenizer": tokenizer.digest, "features": features.digest}
    adapter = seal(root, AdapterCheckpoint, "finetune_lora", write_listener, inputs=own)

    def learn(work: Workspace) -> dict[str, Any]:
        recipe = FamiliarityRecipe(taught_clips=80, components=16, marked_share=0.05)
        inputs = (gpt, adapter, tokenizer, strange, features)
        return learn_familiarity(recipe, *inputs, work=work, runtime=Runtime())

    inputs = {"features 1": features.digest, "strange": strange.digest}
    seal(root, Familiarity, "learn_familiarity", learn, inputs=inputs)
    return root


@pytest.fixture(scope="module")
def parts(store: Path) -> score_files.Parts:
    directory = next((store / "finetune_lora").iterdir())
    return score_files.Parts(**vars(models.listener(None, str(directory))))


def write(path: Path, samples: np.ndarray) -> Path:
    soundfile.write(path, samples, RATE_HZ)
    return path


@pytest.fixture
def low(tmp_path: Path) -> Path:
    return write(tmp_path / "low tone.wav", tone(np.random.default_rng(5)))


@pytest.fixture
def noise(tmp_path: Path) -> Path:
    return write(tmp_path / "noise.flac", hiss(np.random.default_rng(6)))


def test_the_stage_measures_strange_and_foreign_sounds(parts: score_files.Parts) -> None:
    assert parts.familiarity
    told = read_familiarity(parts.familiarity.out)
    assert told["strange"]["noise"]["marked"] > 0.9
    assert told["in_range"]["marked"] < 0.25
    assert told["foreign"]["clips"] == 8
    assert told["foreign"]["categories"]["pitch"]["questions"] == 8
    assert told["foreign"]["median_distance"] < 1


def test_options_have_probabilities_and_what_was_taught_is_near(parts: score_files.Parts, low: Path) -> None:
    told = score_files.score(parts, low, QUESTION, OPTIONS)
    assert set(told) == {"file", "question", "answer", "probabilities", "distance", "sure", "why"}
    assert list(told["probabilities"]) == list(OPTIONS)
    assert sum(told["probabilities"].values()) == pytest.approx(1, abs=1e-3)
    assert told["answer"] == max(told["probabilities"], key=told["probabilities"].get)
    assert told["distance"] < 1
    assert told == score_files.score(parts, low, QUESTION, OPTIONS)
    # An untaught GPT has no opinion, and says so.
    assert told["sure"] is False
    assert told["why"] == "not sure: the answer is a coin toss"


def test_the_order_of_options_changes_no_probability(parts: score_files.Parts, low: Path) -> None:
    one = score_files.score(parts, low, QUESTION, OPTIONS)["probabilities"]
    other = score_files.score(parts, low, QUESTION, OPTIONS[2:] + OPTIONS[:2])["probabilities"]
    assert one == pytest.approx(other, abs=2e-4)


def test_a_strange_sound_is_not_sure(parts: score_files.Parts, noise: Path) -> None:
    told = score_files.score(parts, noise, "What do you hear?", ())
    assert told["probabilities"] == {}
    assert isinstance(told["answer"], str)
    assert told["distance"] > 1
    assert told["sure"] is False
    assert "unlike anything" in told["why"]
    words = score_in_words.in_words(told)
    assert f"{told['distance']:.2f}" in words
    assert told["why"] in words


def test_frames_are_those_of_training(parts: score_files.Parts, low: Path) -> None:
    from omni_model.audio.encoder import load_encoder
    from omni_model.audio.features import encode_samples
    from omni_model.audio.waveform import read_recording

    piece = score_files.Ear(parts).hear(low, 30.0)[0]
    encoder = load_encoder(parts.encoder, ("1", "last"), "concat", "float32")
    assert np.array_equal(piece.frames, encode_samples(read_recording(low).samples, encoder))


def test_a_long_recording_is_cut_and_says_how(parts: score_files.Parts, tmp_path: Path) -> None:
    rng = np.random.default_rng(7)
    path = write(tmp_path / "long.wav", np.concatenate([tone(rng, 40), hiss(rng, 30)]))
    told = score_files.score(parts, path, QUESTION, OPTIONS)
    assert "pieces of at most" in told["cut"]
    assert sum(piece["duration_s"] for piece in told["pieces"]) == pytest.approx(70, abs=0.01)
    assert told["distance"] == max(piece["distance"] for piece in told["pieces"])
    assert all(piece["duration_s"] <= 30 for piece in told["pieces"])


def test_a_folder_gives_a_row_a_file_and_a_sum(
    parts: score_files.Parts, low: Path, noise: Path, tmp_path: Path
) -> None:
    (tmp_path / "broken.wav").write_bytes(b"no sound at all" * 20)
    told = score_files.score(parts, tmp_path, QUESTION, OPTIONS)
    assert [Path(each["file"]).name for each in told["files"]] == ["low tone.wav", "noise.flac"]
    assert [Path(each["file"]).name for each in told["refused"]] == ["broken.wav"]
    assert told["summary"]["files"] == 2
    assert told["summary"]["too_far"] == 1
    words = score_in_words.in_words(told)
    assert words.splitlines()[-1].startswith("2 recordings, sure about 0: the median lies at")
    assert "broken.wav" in words
    assert json.dumps(told, allow_nan=False)


def test_a_folder_with_labels_is_asked_about_them(
    parts: score_files.Parts, low: Path, noise: Path, tmp_path: Path
) -> None:
    rows = [
        {"audio": low.name, "labels": {"pitch": "low", "contour": "level", "weather": "fine"}},
        {"audio": noise.name, "labels": {"noise": "white"}},
    ]
    (tmp_path / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    told = score_files.score(parts, tmp_path, None, ())
    assert {name: share["questions"] for name, share in told["categories"].items()} == {
        "pitch": 1,
        "contour": 1,
        "noise": 1,
    }
    for share in told["categories"].values():
        low_end, high_end = share["ci95"]
        assert 0 <= low_end <= share["accuracy"] <= high_end <= 1
    assert "noise: " in score_in_words.in_words(told)
    assert told == score_files.score(parts, tmp_path, None, ())


def test_questions_are_the_grammars() -> None:
    items = questions_about("a", {"pitch": "low", "colour": "red", "weather": "fine"})
    assert [item.category for item in items] == ["pitch", "colour"]
    assert all(item.key in ("low", "red") and len(set(item.options)) == 4 for item in items)
    assert multiple_choice(items[0].question, items[0].options)


# --- finding the listener ------------------------------------------------------------------------


def test_the_newest_listener_is_found_with_all_its_parts(
    store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OMNI_STORE", str(store))
    found = models.listener(None, None)
    assert found.features == FeatureRecipe(layers=("1", "last"), dtype="float32")
    assert found.familiarity
    assert found.encoder.stage == "make_encoder"
    assert found.gpt.digest == found.adapter.gpt_digest


def test_a_store_without_a_listener_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMNI_STORE", str(tmp_path / "empty"))
    with pytest.raises(BadInput, match="has learned to listen; omni run makes one"):
        models.listener(None, None)
    with pytest.raises(BadInput, match="is no run"):
        models.listener(str(tmp_path), None)
    with pytest.raises(BadInput, match="both name a listener"):
        models.listener(str(tmp_path), str(tmp_path))


def test_without_its_features_a_listener_is_refused(store: Path, tmp_path: Path) -> None:
    shutil.copytree(store / "finetune_lora", tmp_path / "finetune_lora")
    directory = next((tmp_path / "finetune_lora").iterdir())
    with pytest.raises(BadInput, match="was taught on are not in"):
        models.listener(None, str(directory))


def test_another_encoder_is_refused(parts: score_files.Parts, tmp_path: Path) -> None:
    def other(work: Workspace) -> dict[str, Any]:
        shape = EncoderRecipe(width=16, num_layers=2, num_heads=4, max_audio_s=2)
        return make_encoder(shape, work=work, runtime=Runtime())

    encoder = seal(tmp_path, EncoderFiles, "make_encoder", other)
    with pytest.raises(BadInput, match="was taught on other features"):
        score_files.Ear(score_files.Parts(**{**vars(parts), "encoder": encoder}))


def test_without_familiarity_nothing_tells_how_far(parts: score_files.Parts, low: Path) -> None:
    told = score_files.score(
        score_files.Parts(**{**vars(parts), "familiarity": None}), low, QUESTION, OPTIONS
    )
    assert told["distance"] is None
    assert "nothing tells how far" in score_in_words.in_words(told)


# --- the command ---------------------------------------------------------------------------------


def omni(store: Path, *words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "flows.cli", "score", *words],
        cwd=ROOT,
        env=os.environ | {"OMNI_STORE": str(store), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=120,
    )


def test_the_command_prints_json(store: Path, low: Path) -> None:
    done = omni(store, str(low), "--question", QUESTION, "--options", *OPTIONS, "--json")
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    assert told["file"] == str(low)
    assert set(told["probabilities"]) == set(OPTIONS)
    assert Store(store).manifests("finetune_lora")


@pytest.mark.parametrize(
    ("name", "words", "sentence"),
    [
        ("missing.wav", ["--question", "Who?"], "No such file"),
        ("text.wav", ["--question", "Who?"], "cannot be read as audio"),
        ("low tone.wav", [], "say with --question"),
        (
            "low tone.wav",
            ["--question", "Who?", "--options", "a", "b", "c"],
            "takes 4 different answers, not 3",
        ),
        (".", [], "say with --question"),
        ("empty", ["--question", "Who?"], "holds no audio files"),
        ("low tone.wav", ["--question", "why " * 2000], "the question is too long"),
    ],
)
def test_bad_input_is_one_sentence(
    name: str, words: list[str], sentence: str, parts: score_files.Parts, low: Path, tmp_path: Path
) -> None:
    (tmp_path / "text.wav").write_text("this is no sound at all" * 9)
    (tmp_path / "empty").mkdir()
    options = words[3:] if "--options" in words else []
    with pytest.raises(BadInput, match=sentence) as refused:
        score_files.score(parts, tmp_path / name, words[1] if words else None, options)
    assert "\n" not in str(refused.value)


def test_the_command_refuses_in_one_sentence(store: Path, tmp_path: Path) -> None:
    done = omni(store, str(tmp_path / "missing.wav"), "--question", "Who?")
    assert done.returncode == 2
    assert not done.stdout
    assert done.stderr.startswith("omni: ")
    assert done.stderr.count("\n") == 1
