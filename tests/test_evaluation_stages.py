"""The stages of evaluation on small real artifacts: same bytes twice, and a page that stands alone."""

import base64
import dataclasses
import io
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
import soundfile
import torch

from omni_model.artifacts import (
    AdapterCheckpoint,
    Artifact,
    AudioCorpus,
    Benchmark,
    Checkpoint,
    Diagnosis,
    EncoderFiles,
    Familiarity,
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
from omni_model.audio.corpora import read_shard, shard_paths, write_corpus
from omni_model.audio.encoder import make_encoder
from omni_model.audio.features import extract
from omni_model.audio.reader import FeatureReader
from omni_model.config import (
    BadInput,
    BenchmarkRecipe,
    DiagnosisRecipe,
    EncoderRecipe,
    EvaluationRecipe,
    FeatureRecipe,
    ReportRecipe,
    Runtime,
)
from omni_model.evaluation import diagnosis, page, report, scoring
from omni_model.evaluation.answering import Asked, Listener
from omni_model.evaluation.benchmark import build_benchmark
from omni_model.evaluation.benchmark_audio import read_audio
from omni_model.evaluation.benchmark_item import GROUPS, MACRO_GROUPS, read_items
from omni_model.evaluation.benchmark_page import BENCHMARK_PAGE, write_benchmark_page
from omni_model.evaluation.untrained import untrained_frames
from omni_model.model.gpt import GPT, GPTConfig
from omni_model.model.lora import add_lora, save_adapter
from omni_model.model.omni import Sounds
from omni_model.model.projector import Projector
from omni_model.model.weights import load_listener, save_gpt, save_projector
from omni_model.storage import Workspace
from omni_model.telemetry import Metrics
from omni_model.text.conversation import render, render_prompt
from omni_model.text.questions import grammar, multiple_choice
from omni_model.text.tokenizer import load_tokenizer
from omni_model.training.teaching import belonging

SPOKEN = ("number", "colour", "voice", "pace", "loudness")
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
    """72 clips of 0.3 s, a third of them for the test split, each label of a category about equally often.

    Where nobody speaks, three clips of each split are silent.
    """
    known = grammar().categories
    plans = []
    for number in range(72):
        turn, place = divmod(number, 3)
        split = ("train", "validation", "test")[place]
        labels = {c: known[c].options[turn % len(known[c].options)] for c in categories}
        said = f"{labels['number']} {labels['colour']}" if "number" in labels else ""
        speaker = f"{split} {turn % 4}" if said else ""
        how = {"kind": "speech" if said else "sound", "number": number}
        if not said and turn % 8 == 7:
            labels, how = {}, {"kind": "silence", "number": number}
        plans.append(ClipPlan(f"{name}-{number:03d}", split, labels, how, said, speaker))

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
    encoder: EncoderFiles
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

    @property
    def scored(self) -> tuple[Any, ...]:
        made = (self.benchmark, self.gpt, self.adapter, self.tokenizer, self.encoder)
        return *made, self.sound_features, self.speech_features


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
    looks = [{"step": s, "gap": 0.2 * s, "first_token_accuracy": 0.1 * s, "rms_ratio": 1.5} for s in (4, 9)]
    text = {when: {"text_loss": 0.25, "text_accuracy": 0.75} for when in ("before", "after")}
    (root / "projector" / "out" / "truth.json").write_text(json.dumps({"looks": looks, "text": {}}))
    (root / "adapter" / "out" / "truth.json").write_text(json.dumps({"looks": looks, "text": text}))
    save_gpt(gpt, root / "gpt" / "out")
    save_projector(projector, root / "projector" / "out")
    save_projector(projector, root / "adapter" / "out" / "projector")
    save_adapter(add_lora(gpt, rank=2, alpha=4, seed=0), root / "adapter" / "out" / "adapter")
    trained = {"num_parameters": 1000, "steps": 9}
    benchmark = run(
        root / "benchmark",
        build_benchmark,
        Benchmark,
        SIZES,
        sounds,
        speech,
    )
    base = handle(root / "gpt", GptCheckpoint, **trained, n_embd=32, vocab_size=257)
    belongs = trained | belonging(base, FeatureReader(*features))
    return World(
        sounds,
        speech,
        encoder,
        *features,
        handle(root / "tokenizer", TokenizerFiles, vocab_size=257),
        base,
        handle(root / "projector", ProjectorCheckpoint, **belongs),
        handle(root / "adapter", AdapterCheckpoint, **belongs, rank=2),
        benchmark,
    )


@pytest.fixture(scope="module")
def listener(world: World) -> Listener:
    frames = FeatureReader(world.sound_features, world.speech_features).frames
    return Listener(load_listener(world.gpt, world.adapter), load_tokenizer(world.tokenizer.out), frames)


@pytest.fixture(scope="module")
def scores(world: World, tmp_path_factory: pytest.TempPathFactory) -> Scores:
    root = tmp_path_factory.mktemp("scores")
    return run(root / "scores", scoring.score_benchmark, Scores, QUICK, *world.scored)


QUICK = EvaluationRecipe(shuffles=1, bootstrap_draws=500)
SIZES = BenchmarkRecipe(words=8, speaker=4, prosody=4, quality=4, room=4, events=20, conflict=8)


def test_frozen_items_are_read_back_and_a_changed_file_is_refused(world: World, tmp_path: Path) -> None:
    items = read_items(world.benchmark)
    assert len(items) == 52
    assert {len(item.clips) for item in items} == {1, 2}
    shutil.copytree(world.benchmark.uri, tmp_path / "copy")
    path = tmp_path / "copy" / "out" / "items.jsonl"
    path.write_text(path.read_text().replace('"answer":0', '"answer":1', 1))
    with pytest.raises(BadInput, match="not the item file that was frozen"):
        read_items(dataclasses.replace(world.benchmark, uri=str(tmp_path / "copy")))


def test_the_benchmark_holds_the_sounds_of_its_corpora(world: World, tmp_path: Path) -> None:
    wavs = read_audio(world.benchmark)
    assert set(wavs) == {key for item in read_items(world.benchmark) for key in item.clips}
    there = {
        key: sound
        for corpus in (world.sounds, world.speech)
        for path in shard_paths(corpus)
        for key, sound, _ in read_shard(path)
    }
    assert all(wavs[key] == there[key] for key in wavs)
    again = run(tmp_path / "again", build_benchmark, Benchmark, SIZES, world.speech, world.sounds)
    assert again.digest == world.benchmark.digest


def test_items_without_a_sound_or_features_are_named(world: World, tmp_path: Path) -> None:
    shutil.copytree(world.speech.uri, tmp_path / "speech")
    (tmp_path / "speech" / "out" / "clips-test-00000.tar").unlink()
    silent = dataclasses.replace(world.speech, uri=str(tmp_path / "speech"))
    with pytest.raises(BadInput, match=r"item words-number-00 .* word-\d+, whose sound is in none"):
        run(tmp_path / "benchmark", build_benchmark, Benchmark, SIZES, world.sounds, silent)
    with pytest.raises(BadInput, match=r"item words-number-00 .* word-\d+, which none of the features"):
        run(tmp_path / "scores", scoring.score_benchmark, Scores, QUICK, *world.scored[:-1])


def test_another_encoder_than_that_of_the_features_is_refused(world: World, tmp_path: Path) -> None:
    other = dataclasses.replace(world.encoder, digest="another")
    inputs = [other if part is world.encoder else part for part in world.scored]
    with pytest.raises(BadInput, match="the features were made by another encoder"):
        run(tmp_path / "scores", scoring.score_benchmark, Scores, QUICK, *inputs)


def test_an_untrained_encoder_has_the_shape_and_not_the_weights(world: World, tmp_path: Path) -> None:
    reader, wavs = FeatureReader(world.sound_features, world.speech_features), read_audio(world.benchmark)
    key = sorted(wavs)[0]
    first, again, other = (
        untrained_frames(world.encoder, reader.policy, {key: wavs[key]}, tmp_path / "scratch", seed)[key]
        for seed in (1, 1, 2)
    )
    assert np.array_equal(first, again)
    assert first.shape == other.shape == reader.frames(key).shape
    assert np.abs(first - other).max() > 0.01
    assert np.abs(first - reader.frames(key)).max() > 0.01
    assert not (tmp_path / "scratch").exists()


def test_batching_changes_no_answer_and_every_clip_matters(world: World, listener: Listener) -> None:
    items = read_items(world.benchmark)
    asked = [Asked(item, item.options, item.clips if row % 3 else ()) for row, item in enumerate(items)]
    together = listener.letters(asked)
    alone = np.concatenate([listener.letters([one]) for one in asked])
    assert np.allclose(together, alone, atol=1e-5)
    assert np.allclose(together.sum(axis=1), 1)
    unheard = listener.letters([dataclasses.replace(one, clips=()) for one in asked])
    assert np.abs(together - unheard).max() > 1e-4
    deaf = listener.with_random_projector(3).letters(asked)
    assert np.abs(together - deaf).max() > 1e-5
    two = [one for one in asked if len(one.clips) == 2]
    turned = listener.letters([dataclasses.replace(one, clips=one.clips[::-1]) for one in two])
    assert np.abs(listener.letters(two) - turned).min(axis=0).max() > 1e-7  # which one comes first, too


def test_two_clips_stand_in_front_as_in_training(world: World, listener: Listener) -> None:
    item = next(item for item in read_items(world.benchmark) if len(item.clips) == 2)
    tokenizer, model = load_tokenizer(world.tokenizer.out), load_listener(world.gpt, world.adapter)
    features = FeatureReader(world.sound_features, world.speech_features)
    frames = [torch.from_numpy(features.frames(key)) for key in item.clips]
    zeros = torch.zeros(2, dtype=torch.long)
    padded = torch.nn.utils.rnn.pad_sequence(frames, batch_first=True)
    sounds = Sounds(padded, torch.tensor([len(each) for each in frames]), zeros, zeros)
    prompt = render_prompt(tokenizer, multiple_choice(item.question, item.options))
    with torch.inference_mode():
        logits = model(torch.tensor([prompt]), sounds=sounds, logits="last")[0, -1]
    letters = logits[[tokenizer.encode(letter)[0] for letter in "ABCD"]].softmax(dim=-1)
    found = listener.letters([Asked(item, item.options, item.clips)])[0]
    assert found == pytest.approx(letters.numpy(), abs=1e-5)


def test_option_likelihood_equals_one_taken_from_all_logits(world: World, listener: Listener) -> None:
    item = read_items(world.benchmark)[0]
    tokenizer, model = load_tokenizer(world.tokenizer.out), load_listener(world.gpt, world.adapter)
    ids, mask = render(tokenizer, [(item.question, item.options[2])])
    with torch.inference_mode():
        logits = model(torch.tensor([ids]))[0].log_softmax(dim=-1)
    spoken = [float(logits[place - 1, ids[place]]) for place in range(1, len(ids)) if mask[place]]
    found = listener.log_likelihoods(
        [(item.question, item.options[2]), ("What?", "a much longer answer")], [(), item.clips]
    )
    assert found[0] == pytest.approx(np.mean(spoken), abs=1e-4)


def test_what_it_writes_is_its_likeliest_token_again_and_again(world: World, listener: Listener) -> None:
    items = read_items(world.benchmark)[:3]
    tokenizer, model = load_tokenizer(world.tokenizer.out), load_listener(world.gpt, world.adapter)
    written = listener.says([Asked(item, item.options, ()) for item in items], max_tokens=4)
    for item, text in zip(items, written, strict=True):
        ids = render_prompt(tokenizer, multiple_choice(item.question, item.options))
        said: list[int] = []
        while len(said) < 4 and tokenizer.special("<|assistant_end|>") not in said:
            with torch.inference_mode():
                said.append(int(model(torch.tensor([[*ids, *said]]), logits="last")[0, -1].argmax()))
        assert text == tokenizer.decode([i for i in said if i != tokenizer.special("<|assistant_end|>")])


def test_scores_are_complete_and_repeat_byte_for_byte(world: World, scores: Scores, tmp_path: Path) -> None:
    found = scoring.read_scores(scores.out)
    assert found["accuracy"] == scores.accuracy
    assert set(found["groups"]) == set(MACRO_GROUPS)
    assert set(found["parts"]) == set(GROUPS)
    assert {name: b["kind"] for name, b in found["baselines"].items()} == {
        "chance": "no_audio",
        "majority": "no_audio",
        "longest option": "no_audio",
        "no audio": "no_audio",
        "silence": "no_audio",
        "shuffled audio": "ablation",
        "shuffled across groups": "ablation",
        "random projector": "ablation",
        "random encoder": "ablation",
        "linear probe": "ceiling",
    }
    assert sum(found["letters"].values()) == 4 * 52
    assert set(found["scorers"]) == {"letters", "likelihood", "text"}
    assert "left_out" not in found
    items, answers = read_items(world.benchmark), scoring.read_answers(scores.out)
    assert list(answers) == [item.id for item in items]
    for item in items:
        answer = answers[item.id]
        taken = [answer["chosen"], answer["likelihood_chosen"], *answer["beside"].values()]
        assert set(taken) <= set(item.options)
        assert set(answer["beside"]) == set(found["baselines"]) - {"chance", "majority", "longest option"}
    again = run(tmp_path / "again", scoring.score_benchmark, Scores, QUICK, *world.scored)
    assert again.digest == scores.digest


def test_without_a_silent_clip_silence_is_left_out(world: World) -> None:
    items = read_items(world.benchmark)
    heard = scoring.heard_by_others(QUICK, items, FeatureReader(world.speech_features), seed=1)
    assert list(heard) == ["no audio", "shuffled audio", "shuffled across groups"]


class Tags(HTMLParser):
    """Fails where the tag closed is not the last one opened; collects comments and addresses."""

    void = frozenset({"meta", "link", "img", "source", "input", "hr"})

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
    assert all(address.startswith("data:") or address == BENCHMARK_PAGE for address in tags.addresses)
    readable = re.sub(r"base64,[A-Za-z0-9+/=]+", "", text)
    assert not re.search(r"https?:|//|@import|url\(|<script", readable)
    assert not re.search(r"\b20\d\d-\d\d|\d\d:\d\d|\bUTC\b|/tmp|/home", readable)
    return text


def test_report_stands_alone_and_repeats_byte_for_byte(world: World, scores: Scores, tmp_path: Path) -> None:
    recipe = DiagnosisRecipe(clips=10, bootstrap_draws=200)
    diagnosed = run(tmp_path / "diagnosis", diagnosis.diagnose, Diagnosis, recipe, *world.heard)
    shape = {"width": 8, "num_layers": 1, "frame_rate_hz": 50, "max_audio_s": 3.0}
    (tmp_path / "encoder" / "out").mkdir(parents=True)
    told = {"pitch": {"chance": 0.25, "before": 0.5, "after": 0.9375, "clips": 32}}
    (tmp_path / "encoder" / "out" / "probes.json").write_text(json.dumps(told))
    encoder = handle(tmp_path / "encoder", EncoderFiles, family="whisper", weights="micro", **shape)
    (tmp_path / "familiarity" / "out").mkdir(parents=True)
    share = {"clips": 40, "marked": 0.925, "ci95": [0.8, 0.97], "median_distance": 2.0}
    foreign = {"clips": 8, "median_distance": 1.5, "categories": {}}
    found = {"strange": {"music": share}, "in_range": share | {"marked": 0.02}, "foreign": foreign}
    (tmp_path / "familiarity" / "out" / "familiarity.json").write_text(json.dumps(found))
    inputs = (
        scores,
        diagnosed,
        handle(tmp_path / "familiarity", Familiarity, words_limit=0.5, sounds_limit=0.5),
        world.benchmark,
        world.gpt,
        world.projector,
        world.adapter,
        encoder,
        world.sounds,
        world.speech,
    )
    first, second = (
        run(tmp_path / name, report.write_report, Report, ReportRecipe(), *inputs) for name in ("one", "two")
    )
    assert first.digest == second.digest
    assert {path.name for path in first.out.iterdir()} == {"benchmark.html", "report.html", "report.md"}
    text = check_page(first.out / report.REPORT)
    assert re.fullmatch(r"\d+\.\d % \[\d+\.\d, \d+\.\d\], chance 25 %", first.headline)
    assert text.count('class="card item"') == 12
    assert "What the ear carries" in text
    assert "multiple choice 75.0 % and 75.0 %" in text
    assert 'href="benchmark.html"' in text
    assert "93.8 %" in text
    assert text.count('class="bars"') == 6  # all questions, four groups, and what is not known
    assert "music 92.5 %" in text
    wav = base64.b64decode(text.split("data:audio/wav;base64,")[1].split('"')[0])
    assert page.pcm_of(wav).shape == (4800,)


def test_every_question_can_be_heard_and_read(world: World, scores: Scores, tmp_path: Path) -> None:
    items, answers, wavs = (
        read_items(world.benchmark),
        scoring.read_answers(scores.out),
        read_audio(world.benchmark),
    )
    (tmp_path / "page.html").write_text(write_benchmark_page("demo", items, answers, wavs))
    text = check_page(tmp_path / "page.html")
    assert text.count("<audio") == sum(len(item.clips) for item in items)
    assert all(f'id="{item.id}"' in text for item in items)
    assert text.count('class="card item') == 52
    assert text.count('type="radio"') == 1 + len(GROUPS) + 3
    for name in ("likelihood", "text", "no audio", "shuffled audio", "random encoder", "linear probe"):
        assert text.count(f"<td>{name}</td>") == 52
    item = items[0]
    flac = base64.b64decode(text.split("data:audio/flac;base64,")[1].split('"')[0])
    samples, rate_hz = soundfile.read(io.BytesIO(flac))
    assert rate_hz == 16_000
    assert np.array_equal(samples, page.pcm_of(wavs[item.clips[0]]))


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
