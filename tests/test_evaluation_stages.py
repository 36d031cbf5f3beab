"""The stages of evaluation on small real artifacts: same bytes twice, and a page that stands alone."""

import base64
import dataclasses
import json
import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from omni_model.artifacts import (
    AdapterCheckpoint,
    Artifact,
    AudioCorpus,
    Benchmark,
    Checkpoint,
    EmbeddingMap,
    EncoderFiles,
    FeatureShards,
    GptCheckpoint,
    ProjectorCheckpoint,
    Report,
    Scores,
    TokenizerFiles,
    content_digest,
    hash_payload,
)
from omni_model.audio.clips import Clip, ClipPlan, clip_rng
from omni_model.audio.corpora import write_corpus
from omni_model.audio.encoder import make_encoder
from omni_model.audio.features import extract
from omni_model.audio.reader import FeatureReader
from omni_model.config import (
    BadInput,
    BenchmarkRecipe,
    EmbeddingMapRecipe,
    EncoderRecipe,
    EvaluationRecipe,
    FeatureRecipe,
    ReportRecipe,
    Runtime,
)
from omni_model.evaluation import embedding_map, page, report, scoring
from omni_model.evaluation.answering import Asked, Listener
from omni_model.evaluation.benchmark import GROUPS, build_benchmark, read_items
from omni_model.model.gpt import GPT, GPTConfig
from omni_model.model.lora import add_lora, save_adapter
from omni_model.model.projector import Projector
from omni_model.model.weights import load_listener, save_gpt, save_projector
from omni_model.storage import Workspace
from omni_model.telemetry import Metrics
from omni_model.text.conversation import render
from omni_model.text.questions import grammar
from omni_model.text.tokenizer import load_tokenizer

SPOKEN = ("number", "colour", "animal", "voice", "pace", "loudness")
SOUNDED = ("pitch", "contour", "tremolo", "beeps", "noise", "loudness")

SEED = 7
SHAPE = GPTConfig(
    sequence_len=128, vocab_size=257, n_layer=2, n_head=2, n_kv_head=2, n_embd=32, window_pattern="L"
)


def run(
    directory: Path, stage: Callable[..., dict[str, Any]], kind: type[Artifact], recipe: Any, *inputs: Any
) -> Any:
    """Run a stage in `directory` and return the handle on what it made."""
    (directory / "out").mkdir(parents=True)
    (directory / "partial").mkdir()
    work = Workspace(directory, SEED, Metrics(directory / "metrics.jsonl"))
    return handle(directory, kind, **stage(recipe, *inputs, work=work, runtime=Runtime()))


def handle(directory: Path, kind: type[Artifact], **facts: Any) -> Any:
    return kind(
        directory.name, "0" * 64, str(directory), content_digest(hash_payload(directory / "out")), **facts
    )


def make_corpus(categories: tuple[str, ...], name: str, directory: Path) -> AudioCorpus:
    """72 clips of 0.3 s, a third of them for the test split, each label of a category about equally often."""
    known = grammar().categories
    plans = []
    for number in range(72):
        split = ("train", "validation", "test")[number % 3]
        labels = {c: known[c].options[(number // 3) % len(known[c].options)] for c in categories}
        said = f"{labels['number']} {labels['colour']} {labels['animal']}" if "number" in labels else ""
        plans.append(ClipPlan(f"{name}-{number:03d}", split, labels, {}, said))

    def render(plan: ClipPlan) -> Clip:
        return Clip((0.1 * clip_rng(1, plan.key).normal(size=4800)).clip(-1, 1).astype(np.float32))

    def stage(recipe: None, *, work: Workspace, runtime: Runtime) -> dict[str, Any]:
        return write_corpus(plans, render, generator="test", clips_per_shard=50, work=work)

    return run(directory, stage, AudioCorpus, None)


@dataclass(frozen=True)
class World:
    """Every input of the stages of this room."""

    sounds: AudioCorpus
    speech: AudioCorpus
    sound_features: FeatureShards
    speech_features: FeatureShards
    tokenizer: TokenizerFiles
    gpt: GptCheckpoint
    projector: ProjectorCheckpoint
    adapter: AdapterCheckpoint
    benchmark: Benchmark

    @property
    def heard(self) -> tuple[Any, ...]:
        return self.gpt, self.adapter, self.tokenizer, self.sound_features, self.speech_features


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    torch.set_num_threads(1)
    root = tmp_path_factory.mktemp("evaluation")
    sounds, speech = (
        make_corpus(SOUNDED, "sound", root / "sounds"),
        make_corpus(SPOKEN, "word", root / "speech"),
    )
    encoder = run(
        root / "encoder",
        make_encoder,
        EncoderFiles,
        EncoderRecipe(width=16, num_layers=1, num_heads=2, max_audio_s=1),
    )
    features = [
        run(root / f"features-{c.stage}", extract, FeatureShards, FeatureRecipe(), c, encoder)
        for c in (sounds, speech)
    ]
    (root / "tokenizer" / "out").mkdir(parents=True)
    (root / "tokenizer" / "out" / "tokenizer.json").write_text('{"kind":"bytes"}')
    gpt, projector = GPT(SHAPE), Projector(input_width=16, width=32, stack=5, hidden=8)
    shake = torch.Generator().manual_seed(1)
    with torch.no_grad():  # fresh weights end in zeros, and a model that ignores its input proves nothing
        for parameter in gpt.parameters():
            parameter += 0.1 * torch.randn(parameter.shape, generator=shake)
    curve_text = json.dumps([{"step": 1, "loss": 5.0}, {"step": 9, "loss": 1.5}])
    for place in ("gpt", "projector", "adapter"):
        (root / place / "out").mkdir(parents=True)
        (root / place / "out" / "curve.json").write_text(curve_text)
    save_gpt(gpt, root / "gpt" / "out")
    save_projector(projector, root / "projector" / "out")
    save_projector(projector, root / "adapter" / "out" / "projector")
    save_adapter(add_lora(gpt, rank=2, alpha=4, seed=0), root / "adapter" / "out" / "adapter")
    trained = {"num_parameters": 1000, "steps": 9}
    benchmark = run(
        root / "benchmark",
        build_benchmark,
        Benchmark,
        BenchmarkRecipe(words=12, voice=8, scene=24),
        sounds,
        speech,
    )
    return World(
        sounds,
        speech,
        *features,
        handle(root / "tokenizer", TokenizerFiles, vocab_size=257),
        handle(root / "gpt", GptCheckpoint, **trained, n_embd=32, vocab_size=257),
        handle(root / "projector", ProjectorCheckpoint, **trained, input_width=16, n_embd=32),
        handle(root / "adapter", AdapterCheckpoint, **trained, input_width=16, n_embd=32, rank=2),
        benchmark,
    )


@pytest.fixture(scope="module")
def listener(world: World) -> Listener:
    features = FeatureReader(world.sound_features, world.speech_features)
    return Listener(load_listener(world.gpt, world.adapter), load_tokenizer(world.tokenizer.out), features)


@pytest.fixture(scope="module")
def scores(world: World, tmp_path_factory: pytest.TempPathFactory) -> Scores:
    root = tmp_path_factory.mktemp("scores")
    return run(root / "scores", scoring.score_benchmark, Scores, QUICK, world.benchmark, *world.heard)


QUICK = EvaluationRecipe(shuffles=2, bootstrap_draws=500)


def test_frozen_items_are_read_back_and_a_changed_file_is_refused(world: World, tmp_path: Path) -> None:
    assert len(read_items(world.benchmark)) == 44
    shutil.copytree(world.benchmark.uri, tmp_path / "copy")
    path = tmp_path / "copy" / "out" / "items.jsonl"
    path.write_text(path.read_text().replace('"answer":0', '"answer":1', 1))
    with pytest.raises(BadInput, match="not the item file that was frozen"):
        read_items(dataclasses.replace(world.benchmark, uri=str(tmp_path / "copy")))


def test_batching_changes_no_answer(world: World, listener: Listener) -> None:
    items = read_items(world.benchmark)
    asked = [Asked(item, item.options, item.clip if row % 3 else None) for row, item in enumerate(items)]
    together = listener.letters(asked)
    alone = np.concatenate([listener.letters([one]) for one in asked])
    assert np.allclose(together, alone, atol=1e-5)
    assert np.allclose(together.sum(axis=1), 1)
    unheard = listener.letters([dataclasses.replace(one, clip=None) for one in asked])
    assert np.abs(together - unheard).max() > 1e-4  # the clip matters
    deaf = listener.with_random_projector(3).letters(asked)
    assert np.abs(together - deaf).max() > 1e-5


def test_option_likelihood_equals_one_taken_from_all_logits(world: World, listener: Listener) -> None:
    item = read_items(world.benchmark)[0]
    tokenizer, model = load_tokenizer(world.tokenizer.out), load_listener(world.gpt, world.adapter)
    ids, mask = render(tokenizer, [(item.question, item.options[2])])
    with torch.inference_mode():
        logits = model(None, None, torch.tensor([ids]))[0].log_softmax(dim=-1)
    spoken = [float(logits[place - 1, ids[place]]) for place in range(1, len(ids)) if mask[place]]
    found = listener.log_likelihoods(
        [(item.question, item.options[2]), ("What?", "a much longer answer")], [None, None]
    )
    assert found[0] == pytest.approx(np.mean(spoken), abs=1e-4)


def test_scores_are_complete_and_repeat_byte_for_byte(world: World, scores: Scores, tmp_path: Path) -> None:
    found = scoring.read_scores(scores.out)
    assert found["accuracy"] == scores.accuracy
    assert set(found["groups"]) == set(GROUPS)
    assert {name: b["kind"] for name, b in found["baselines"].items()} == {
        "chance": "no_audio",
        "majority": "no_audio",
        "longest option": "no_audio",
        "no audio": "no_audio",
        "shuffled audio": "ablation",
        "random projector": "ablation",
        "linear probe": "ceiling",
    }
    assert sum(found["letters"].values()) == 4 * 44
    assert set(scoring.read_answers(scores.out)) == {item.id for item in read_items(world.benchmark)}
    again = run(tmp_path / "again", scoring.score_benchmark, Scores, QUICK, world.benchmark, *world.heard)
    assert again.digest == scores.digest


def test_map_repeats_byte_for_byte_and_fits_the_page(world: World, tmp_path: Path) -> None:
    recipe = EmbeddingMapRecipe(clips=20)
    first, second = (
        run(tmp_path / name, embedding_map.map_embeddings, EmbeddingMap, recipe, *world.heard)
        for name in "ab"
    )
    assert first.digest == second.digest
    numbers = embedding_map.read_map(first.out)
    assert first.num_points == len(numbers["words"]) + 20
    assert set(numbers["categories"]) <= set(grammar().categories)
    for name in embedding_map.PICTURES.values():
        assert (first.out / name).stat().st_size < 100_000
        assert b"Software" not in (first.out / name).read_bytes()


class Tags(HTMLParser):
    """Fails where the tag closed is not the last one opened; collects comments and addresses."""

    void = frozenset({"meta", "link", "img", "source"})

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.comments: list[str] = []
        self.addresses: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.addresses += [value or "" for name, value in attrs if name in ("src", "href", "srcset")]
        if tag not in self.void:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        pass

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_comment(self, data: str) -> None:
        self.comments.append(data)


def check_page(path: Path) -> str:
    """The page's text, after checking that it stands alone, is well formed and holds no clock."""
    text, tags = path.read_text(encoding="utf-8"), Tags()
    tags.feed(text)
    assert tags.open == []
    assert tags.comments == [" run provenance "]
    assert all(address.startswith("data:") for address in tags.addresses)
    readable = re.sub(r"base64,[A-Za-z0-9+/=]+", "", text)
    assert not re.search(r"https?:|//|@import|url\(|<script", readable)
    assert not re.search(r"\b20\d\d-\d\d|\d\d:\d\d|\bUTC\b|/tmp|/home", readable)
    return text


def test_report_stands_alone_and_repeats_byte_for_byte(world: World, scores: Scores, tmp_path: Path) -> None:
    mapped = run(
        tmp_path / "map",
        embedding_map.map_embeddings,
        EmbeddingMap,
        EmbeddingMapRecipe(clips=10),
        *world.heard,
    )
    shape = {"width": 8, "num_layers": 1, "frame_rate_hz": 50, "max_audio_s": 3.0}
    (tmp_path / "encoder" / "out").mkdir(parents=True)
    told = {"pitch": {"chance": 0.25, "before": 0.5, "after": 0.9375, "clips": 32}}
    (tmp_path / "encoder" / "out" / "probes.json").write_text(json.dumps(told))
    encoder = handle(tmp_path / "encoder", EncoderFiles, family="whisper", weights="micro", **shape)
    inputs = (
        scores,
        mapped,
        world.benchmark,
        world.gpt,
        world.projector,
        world.adapter,
        world.sounds,
        world.speech,
        encoder,
    )
    first, second = (
        run(tmp_path / name, report.write_report, Report, ReportRecipe(), *inputs) for name in ("one", "two")
    )
    assert first.digest == second.digest
    text = check_page(first.out / report.REPORT)
    assert re.fullmatch(r"\d+\.\d % \[\d+\.\d, \d+\.\d\], chance 25 %", first.headline)
    assert text.count("<audio") == 12
    assert "What the ear carries" in text
    assert "93.8 %" in text
    assert text.count('class="bars"') == 4
    wav = base64.b64decode(text.split("data:audio/wav;base64,")[1].split('"')[0])
    assert page.pcm_of(wav).shape == (4800,)


def test_smoke_report_says_that_plumbing_is_not_hearing(world: World, tmp_path: Path) -> None:
    out = tmp_path / "overfit" / "out"
    out.mkdir(parents=True)
    (out / "curve.json").write_text(json.dumps([{"step": s, "loss": 5.55 - s / 10} for s in range(51)]))
    captions = [
        {"key": f"sound-{n:03d}", "taught": "a <low> tone", "said": "a <low> tone" if n else "a"}
        for n in range(5)
    ]
    (out / "captions.json").write_text(json.dumps(captions))
    overfit = handle(tmp_path / "overfit", Checkpoint, num_parameters=10_800_000, steps=50)
    made = run(tmp_path / "smoke", report.write_smoke_report, Report, ReportRecipe(), overfit, world.sounds)
    text = check_page(made.out / report.REPORT)
    assert made.headline == "loss 5.55 -> 0.55, 4 of 5 captions reproduced"
    assert "memorised 5 strings" in text
    assert text.count("<audio") == 5
