"""Training stages on miniature data: facts, payloads, kill and resume, and the guards."""

import dataclasses
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from omni_model.artifacts import (
    AdapterCheckpoint,
    Artifact,
    AudioCorpus,
    Checkpoint,
    FeatureShards,
    GptCheckpoint,
    Instructions,
    ProjectorCheckpoint,
    TextCorpus,
    TokenizerFiles,
    hash_payload,
)
from omni_model.audio.shards import INDEX, record_path, write_index, write_shard
from omni_model.config import (
    AlignRecipe,
    BadInput,
    GptShape,
    InstructionsRecipe,
    LessonsRecipe,
    LoraRecipe,
    OverfitRecipe,
    ProjectorShape,
    Runtime,
    TextRecipe,
    TokenizerRecipe,
)
from omni_model.model.omni import Sounds
from omni_model.model.weights import load_gpt, load_listener, load_projector
from omni_model.storage import Workspace
from omni_model.telemetry import Metrics
from omni_model.text.embedded import write_corpus
from omni_model.text.questions import grammar
from omni_model.text.tokenizer import train_tokenizer
from omni_model.training import lessons as lessons_module
from omni_model.training.align import align
from omni_model.training.finetune import finetune
from omni_model.training.instructions import build_instructions
from omni_model.training.lessons import learn_lessons, match_at_start, new_gpt
from omni_model.training.overfit import overfit

WIDTH = 8
SHAPE = GptShape(n_layer=2, n_embd=32, n_head=2, n_kv_head=2, sequence_len=64)
PROJECTOR = ProjectorShape(stack=4, hidden=16)
LESSONS = LessonsRecipe(
    gpt=SHAPE,
    max_steps=40,
    last_lesson_steps=15,
    packed_rows_per_step=2,
    exchanges_per_step=4,
    lesson_accuracy=0.0,
    settling_accuracy=0.0,
    min_accuracy=0.0,
)
MIX = InstructionsRecipe(rows=80, validation_rows=60, replay=0.2)
ALIGN = AlignRecipe(projector=PROJECTOR, steps=12, rows_per_step=4, warmup_steps=2, min_gap=0)
LORA = LoraRecipe(rank=2, alpha=4, steps=24, rows_per_step=4, warmup_steps=2, min_gap=0)

Stage = Callable[..., dict[str, Any]]


class Killed(Exception):
    """Stands for SIGKILL."""


class KillingMetrics(Metrics):
    """Ends the process's work at the first log at or after a step."""

    def __init__(self, path: Path, step: int) -> None:
        super().__init__(path)
        self._last = step

    def log(self, step: int, total: int, **values: float) -> None:
        if step >= self._last:
            raise Killed


def workspace(directory: Path, kill_at: int = 0) -> Workspace:
    (directory / "out").mkdir(parents=True, exist_ok=True)
    path = directory / "metrics.jsonl"
    return Workspace(directory, 5, KillingMetrics(path, kill_at) if kill_at else Metrics(path))


def make(stage: Stage, kind: type[Artifact], recipe: Any, *inputs: Artifact, directory: Path) -> Any:
    """Run a stage and return the handle on what it made; the facts must be the handle's."""
    work = workspace(directory)
    facts = stage(recipe, *inputs, work=work, runtime=Runtime())
    assert set(facts) == kind.fact_names()
    (directory / "summary.json").write_text(json.dumps(work.metrics.summaries))
    return kind(stage.__name__, "k", str(directory), "d", **facts)


def summary_of(handle: Artifact) -> dict[str, Any]:
    return dict(json.loads((Path(handle.uri) / "summary.json").read_text()))


def write_features(directory: Path, clips: list[dict[str, Any]]) -> FeatureShards:
    """A feature payload of random frames, as the feature stage writes it."""
    (directory / "out").mkdir(parents=True)

    def rows() -> Iterator[tuple[str, np.ndarray, dict[str, Any]]]:
        for number, clip in enumerate(clips):
            frames = np.random.default_rng([7, number]).normal(size=(6 + number % 5, WIDTH))
            yield clip["key"], frames.astype(np.float16), clip

    record = write_shard(directory / "out" / "features-00000.tar", "corpus", rows())
    record_path(directory / "out" / "features-00000.tar").unlink()
    facts = {"num_layers": 1, "policy": {"encoder": "e"}, "width": WIDTH}
    write_index(directory / "out" / INDEX, facts, [record])
    frames = record["num_frames"]
    return FeatureShards("features", "k", str(directory), "d", len(clips), frames, WIDTH, 1, 50)


def write_clips(directory: Path, clips: list[dict[str, Any]]) -> AudioCorpus:
    """A corpus of which only its list of clips is there."""
    (directory / "out").mkdir(parents=True)
    lines = "".join(json.dumps(clip) + "\n" for clip in clips)
    (directory / "out" / "clips.jsonl").write_text(lines)
    return AudioCorpus("corpus", "k", str(directory), "d", len(clips), 1.0, 16_000, 0)


def make_clips(name: str, categories: tuple[str, ...], count: int) -> list[dict[str, Any]]:
    clips = []
    for number in range(count):
        options = [grammar().categories[category].options for category in categories]
        labels = {c: values[number % len(values)] for c, values in zip(categories, options, strict=True)}
        split = ("train", "train", "validation", "test")[(number + number // 4) % 4]
        transcript = labels.get("animal", "")
        key = f"{name}-{number:03d}"
        clips.append({"key": key, "split": split, "labels": labels, "transcript": transcript})
    return clips


@dataclasses.dataclass(frozen=True)
class World:
    text: TextCorpus
    tokenizer: TokenizerFiles
    sounds: FeatureShards
    speech: FeatureShards
    instructions: Instructions
    gpt: GptCheckpoint
    projector: ProjectorCheckpoint
    adapter: AdapterCheckpoint


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    """The whole chain, made once."""
    root = tmp_path_factory.mktemp("stages")
    torch.set_num_threads(1)
    text = make(
        write_corpus,
        TextCorpus,
        TextRecipe(num_documents=1200, validation_documents=100),
        directory=root / "text",
    )
    tokenizer = make(
        train_tokenizer, TokenizerFiles, TokenizerRecipe(vocab_size=400), text, directory=root / "tokenizer"
    )
    clips = {"sounds": make_clips("tone", ("pitch", "loudness"), 16)}
    clips["speech"] = make_clips("speech", ("animal", "voice"), 16)
    sounds, speech = (write_features(root / name, each) for name, each in clips.items())
    corpora = [write_clips(root / f"{name}-clips", each) for name, each in clips.items()]
    mix = make(build_instructions, Instructions, MIX, *corpora, directory=root / "instructions")
    gpt = make(learn_lessons, GptCheckpoint, LESSONS, text, tokenizer, directory=root / "gpt")
    heard = (tokenizer, mix, sounds, speech)
    projector = make(align, ProjectorCheckpoint, ALIGN, gpt, *heard, directory=root / "projector")
    adapter = make(finetune, AdapterCheckpoint, LORA, gpt, projector, *heard, directory=root / "adapter")
    return World(text, tokenizer, sounds, speech, mix, gpt, projector, adapter)


# --- what the stages leave behind ----------------------------------------------------------------


def test_pretraining_goes_through_every_lesson(world: World) -> None:
    lessons = [
        json.loads(line).get("lesson")
        for line in (Path(world.gpt.uri) / "metrics.jsonl").read_text().splitlines()
    ]
    assert [each for each in lessons if each] == [1.0]
    assert world.gpt.steps == 40  # the gates ask every 25 steps, so max_steps ends it
    assert load_gpt(world.gpt.out).num_params() == world.gpt.num_parameters
    assert 0 <= summary_of(world.gpt)["text_multiple_choice"] <= 1


def test_curves_are_plain_and_complete(world: World) -> None:
    curve = json.loads((world.gpt.out / "curve.json").read_text())
    assert [each["step"] for each in curve] == [1, *range(5, 41, 5)]
    assert all(each["loss"] > 0 for each in curve)


def test_alignment_leaves_the_gpt_alone_and_says_what_it_heard(world: World) -> None:
    projector = load_projector(world.projector.out)
    assert (projector.stack, world.projector.input_width, world.projector.n_embd) == (4, WIDTH, 32)
    told = (
        "loss",
        "validation_accuracy",
        "shuffled_audio_gap",
        "audio_text_rms_ratio",
        "first_token_accuracy",
    )
    assert set(told) <= summary_of(world.projector).keys()
    truth = json.loads((world.projector.out / "truth.json").read_text())["looks"]
    assert [each["step"] for each in truth] == [5, 10, 12]
    assert all(each["projector_gradient"] > 0 for each in truth)
    assert (world.projector.gpt_digest, len(world.projector.policy_digest)) == (world.gpt.digest, 64)


def test_text_is_asked_before_and_after(world: World) -> None:
    told = summary_of(world.adapter)
    assert {
        f"text_{name}_{when}" for name in ("loss", "accuracy") for when in ("before", "after")
    } <= told.keys()
    assert told["text_loss_before"] != told["text_loss_after"]
    text = json.loads((world.adapter.out / "truth.json").read_text())["text"]
    assert text["after"]["text_loss"] == told["text_loss_after"]


def test_the_listener_loads_and_its_adapter_differs_from_the_base(world: World) -> None:
    listener = load_listener(world.gpt, world.adapter)
    frames, lengths = torch.randn(2, 6, WIDTH), torch.tensor([6, 4])
    ids = torch.randint(0, 300, (2, 5))
    with torch.no_grad():
        heard = listener(ids, sounds=Sounds.in_front(frames, lengths))
        base = load_gpt(world.gpt.out)
        rows, counts = listener.projector(frames, lengths)
        plain = base(ids, audio_features=rows, audio_lengths=counts)
    assert heard.shape == plain.shape
    assert not torch.allclose(heard, plain)
    assert sorted(path.name for path in (world.adapter.out / "adapter").iterdir()) == [
        "adapter_config.json",
        "adapter_model.safetensors",
    ]


# --- killed and resumed --------------------------------------------------------------------------


def assert_same_after_kill(
    stage: Stage, recipe: Any, inputs: tuple[Artifact, ...], root: Path, kill_at: int
) -> None:
    """A run killed at a step and resumed leaves the bytes of an undisturbed one."""
    straight = workspace(root / "straight")
    stage(recipe, *inputs, work=straight, runtime=Runtime())
    often = Runtime(checkpoint_every_s=1e-6)
    with pytest.raises(Killed):
        stage(recipe, *inputs, work=workspace(root / "killed", kill_at=kill_at), runtime=often)
    resumed = workspace(root / "killed")
    assert any(path.name.startswith("step-") for path in resumed.partial.iterdir())
    stage(recipe, *inputs, work=resumed, runtime=Runtime())
    assert hash_payload(resumed.out) == hash_payload(straight.out)


def test_killed_pretraining_resumes_to_the_same_bytes(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lessons_module, "EXAMINE_EVERY", 5)  # so that lessons open before and after the kill
    assert_same_after_kill(learn_lessons, LESSONS, (world.text, world.tokenizer), tmp_path, kill_at=18)
    curve = json.loads((tmp_path / "straight" / "out" / "curve.json").read_text())
    assert curve[-1]["step"] == 35  # four gates of five steps, then fifteen with a falling rate


def test_killed_finetuning_resumes_to_the_same_bytes(world: World, tmp_path: Path) -> None:
    inputs = (world.gpt, world.projector, world.tokenizer, world.instructions, world.sounds, world.speech)
    assert_same_after_kill(finetune, LORA, inputs, tmp_path, kill_at=11)


def test_killed_alignment_resumes_to_the_same_bytes(world: World, tmp_path: Path) -> None:
    inputs = (world.gpt, world.tokenizer, world.instructions, world.sounds, world.speech)
    assert_same_after_kill(align, dataclasses.replace(ALIGN, distillation=0.5), inputs, tmp_path, 7)


# --- the smoke stage -----------------------------------------------------------------------------


def test_overfitting_learns_captions_and_writes_what_is_said(world: World, tmp_path: Path) -> None:
    clips = [
        {"key": f"sine-{n}", "split": "train", "labels": {}, "transcript": text}
        for n, text in enumerate(("a low tone", "a high tone"))
    ]
    features = write_features(tmp_path / "features", clips)
    recipe = OverfitRecipe(gpt=SHAPE, projector=PROJECTOR, steps=60, lr=1e-2)
    made = make(overfit, Checkpoint, recipe, features, directory=tmp_path / "overfit")
    summary = summary_of(made)
    assert summary["first_loss"] == pytest.approx(np.log(257), abs=0.1)
    assert summary["loss_drop"] > 4
    told = json.loads((made.out / "captions.json").read_text())
    assert [each["taught"] for each in told] == ["a low tone", "a high tone"]
    assert all(each["said"].endswith("tone") for each in told)
    with pytest.raises(RuntimeError, match="min_loss_drop"):
        make(
            overfit,
            Checkpoint,
            dataclasses.replace(recipe, steps=2, min_loss_drop=5.0),
            features,
            directory=tmp_path / "short",
        )


# --- guards --------------------------------------------------------------------------------------


def test_a_model_that_cannot_choose_fails_the_stage(world: World, tmp_path: Path) -> None:
    recipe = dataclasses.replace(LESSONS, max_steps=2, min_accuracy=0.98)
    with pytest.raises(RuntimeError, match="min_accuracy"):
        learn_lessons(recipe, world.text, world.tokenizer, work=workspace(tmp_path), runtime=Runtime())


def test_impossible_shapes_and_foreign_weights_are_refused(world: World, tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="n_head"):
        new_gpt(dataclasses.replace(SHAPE, n_head=3), 300, 0)
    for name in ("model.safetensors", "config.json"):
        (tmp_path / name).write_bytes((world.gpt.out / name).read_bytes())
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "n_layer": 3}))
    with pytest.raises(BadInput, match="does not match"):
        load_gpt(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({**config, "n_wings": 3}))
    with pytest.raises(BadInput, match="n_wings"):
        load_gpt(tmp_path)
    with pytest.raises(BadInput, match="missing"):
        load_projector(tmp_path / "nowhere")


@pytest.mark.parametrize(
    ("field", "sentence"), [("policy_digest", "other features"), ("gpt_digest", "another GPT")]
)
def test_a_projector_of_another_encoder_or_gpt_is_refused(
    world: World, tmp_path: Path, field: str, sentence: str
) -> None:
    foreign = dataclasses.replace(world.projector, **{field: "f" * 64})
    inputs = (world.gpt, foreign, world.tokenizer, world.instructions, world.sounds, world.speech)
    with pytest.raises(BadInput, match=sentence) as refusal:
        finetune(LORA, *inputs, work=workspace(tmp_path), runtime=Runtime())
    assert "ffffffff" in str(refusal.value)
    assert foreign.uri in str(refusal.value)


def test_a_run_that_hears_nothing_stops_with_likely_causes(world: World, tmp_path: Path) -> None:
    inputs = (world.gpt, world.tokenizer, world.instructions, world.sounds, world.speech)
    deaf = dataclasses.replace(ALIGN, min_gap=5.0)
    with pytest.raises(RuntimeError, match=r"after 10 of 12 steps .* align.min_gap 5.0: nothing is heard"):
        align(deaf, *inputs, work=workspace(tmp_path), runtime=Runtime())
    assert not list((tmp_path / "out").iterdir())


def test_keys_can_start_as_queries() -> None:
    gpt = new_gpt(SHAPE, 300, 0)
    match_at_start(gpt)
    for block in gpt.transformer["h"]:
        assert torch.equal(block.attn.c_k.weight, block.attn.c_q.weight)
