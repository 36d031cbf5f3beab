"""The real recipes: what omni-d12 would do, its rehearsal made small, and the miniatures that it reads."""

import dataclasses
import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import pytest

from flows.planning import plan
from flows.recipes import Run, resolve, settle
from omni_model.artifacts import Artifact, AudioCorpus, Report, SoundFiles, TextCorpus
from omni_model.audio.corpora import read_clips
from omni_model.audio.librispeech import read_librispeech
from omni_model.audio.miniature_sounds import SETS, write_sounds
from omni_model.audio.sound_sets import read_sound_set
from omni_model.config import (
    BadInput,
    LaidOutSetRecipe,
    LibriSpeechRecipe,
    MiniatureSoundsRecipe,
    MiniatureWebRecipe,
    OmniRehearsalRecipe,
    TokenizerRecipe,
)
from omni_model.config.depth import GptSize
from omni_model.storage import Store, open_store
from omni_model.text.corpus import read_texts
from omni_model.text.miniature_web import write_web_text
from omni_model.text.tokenizer import train_bpe
from tasks.execute import Executor, Outcome
from tasks.planner import Step
from tasks.stage import H, P, stage_of
from tests.small_sound import SEED, make
from tests.test_runs import omni

LITTLE = MiniatureSoundsRecipe(utterances=2, max_sentences=1, emotions=2, takes=1)
# The rehearsal made small: the same stages and graph in a fraction of the time.
SMALL = (
    "text.num_documents=150",
    "text.validation_documents=30",
    "tokenizer.vocab_size=600",
    "pretrain.gpt.n_layer=2",
    "pretrain.gpt.n_embd=64",
    "sequence_len=256",
    "pretrain.steps=3",
    "pretrain.batch_tokens=512",
    "pretrain.validation_tokens=512",
    "evaluation.split_tokens=512",
    "core.items_per_task=3",
    "sets.train_rows=60",
    "conversations.smoltalk_rows=30",
    "conversations.mmlu_rows=20",
    "conversations.arc_rows=10",
    "conversations.gsm8k_rows=10",
    "conversations.identity_rows=5",
    "chat.batch_tokens=2048",
    "chat_evaluation.items_per_task=2",
    "chat_evaluation.max_answer_tokens=2",
    *(
        f"sounds.{name}={getattr(LITTLE, name)}"
        for name in ("utterances", "max_sentences", "emotions", "takes")
    ),
    "encoder.width=32",
    "encoder.num_layers=5",
    "encoder.num_heads=2",
    "align.projector.hidden=32",
    "align.steps=3",
    "lora.steps=3",
    "diagnosis.probe_clips=40",
    "diagnosis.transcribed_clips=2",
    "runtime.inline=true",
    "runtime.threads=1",
)


class Silent:
    """A listener that nobody listens to."""

    def waiting(self, label: str, holder: str) -> None: ...
    def started(self, label: str) -> None: ...
    def progressed(self, label: str, progress: dict[str, float]) -> None: ...
    def finished(self, label: str, outcome: Outcome) -> None: ...
    def failed(self, label: str, error: Exception) -> None: ...


class InTurn:
    """A runner that computes one stage after the other, here."""

    def __init__(self, executor: Executor) -> None:
        self.outcomes: list[Outcome] = []
        self._executor = executor

    def __call__(self, task: Callable[P, H], *args: P.args, **kwargs: P.kwargs) -> H:
        recipe, *inputs = args
        handles = cast("tuple[Artifact, ...]", tuple(inputs))
        outcome = self._executor.make(stage_of(task), recipe, handles, task.__name__)
        self.outcomes.append(outcome)
        return cast(H, outcome.handle)


def planned(name: str, place: Path, *settings: str) -> tuple[Run, Store, list[Step]]:
    store = open_store(str(place))
    run = settle(resolve(name, list(settings)), store)
    return run, store, plan(run, store)[0]


@pytest.fixture(scope="module")
def empty(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store without any artifact; what it remembers of the code makes the next plan quicker."""
    return tmp_path_factory.mktemp("empty")


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> SoundFiles:
    return cast(SoundFiles, make(SoundFiles, write_sounds, tmp_path_factory.mktemp("files"), LITTLE))


# -- what would be done -----------------------------------------------------------------------------


def test_omni_d12_can_be_planned_with_nothing_here(empty: Path) -> None:
    _, _, steps = planned("omni-d12", empty)
    labels = [step.label for step in steps]
    assert len(set(labels)) == len(labels)
    assert {step.status for step in steps} == {"will run"}
    assert "import_librispeech:dev-clean" in labels
    assert "extract_features:train-clean-100" in labels


def test_a_card_is_foreseen_for_what_learns_to_hear(empty: Path) -> None:
    done = omni(empty, "plan", "omni-d12", "--card", "5090", "--json")
    assert done.returncode == 0, done.stderr
    rows = {row["name"]: row for row in json.loads(done.stdout)}
    for stage in ("pretrain_gpt", "tune_chat", "align_projector", "finetune_lora"):
        assert rows[stage]["predicted_s"] > 60
        assert 0 < rows[stage]["predicted_gpu_bytes"] < 31.3 * 2**30


def test_the_text_half_is_that_of_base_d12(empty: Path) -> None:
    """So whoever has run base-d12 has half of it."""
    base, whole = (planned(name, empty)[2] for name in ("base-d12", "omni-d12"))
    own = {step.stage.name: (step.recipe, step.identity) for step in whole}
    for step in base[:-1]:  # but for its report
        assert own[step.stage.name] == (step.recipe, step.identity)


def test_the_rehearsal_has_the_shapes_and_the_graph_of_the_real_one(empty: Path) -> None:
    (real, _, steps), (rehearsal, _, own) = (planned(n, empty) for n in ("omni-d12", "omni-d12-rehearsal"))
    shapes = [dataclasses.replace(run.recipe.pretrain.gpt, sequence_len=1) for run in (real, rehearsal)]
    assert shapes[0] == shapes[1]
    assert rehearsal.recipe.align.projector == real.recipe.align.projector
    assert rehearsal.recipe.features == real.recipe.features
    assert rehearsal.recipe.lora.rank == real.recipe.lora.rank
    vocab_size = real.recipe.tokenizer.vocab_size
    assert GptSize.of(rehearsal.recipe.pretrain.gpt, vocab_size).parameters == 286_261_730
    brought = ("fetch_", "import_", "write_", "make_", "read_")
    graphs = [{s.stage.name for s in each if not s.stage.name.startswith(brought)} for each in (steps, own)]
    assert graphs[0] == graphs[1]


def test_sets_of_the_users_join_and_a_wrong_one_is_named(empty: Path, files: SoundFiles) -> None:
    place = files.out / "crema-d"
    _, _, steps = planned("omni-d12", empty, f"folders.crema_d.path={place}")
    labels = [step.label for step in steps]
    assert "extract_features:crema-d" in labels
    asked = next(step for step in steps if step.stage.name == "build_benchmark")
    assert "import_sound_set" in {source.stage.name for source in asked.inputs}
    with pytest.raises(BadInput, match="/nowhere is not a folder"):
        planned("omni-d12", empty, "folders.esc_50.path=/nowhere")


# -- miniatures -------------------------------------------------------------------------------------


def test_miniatures_are_the_same_bytes_every_time(tmp_path: Path, files: SoundFiles) -> None:
    again, other = (make(SoundFiles, write_sounds, tmp_path / str(n), LITTLE, seed=n) for n in (SEED, 12))
    assert again.digest == files.digest != other.digest
    assert files.num_sets == len(SETS)


@pytest.mark.parametrize("form", ["tar", "parquet"])
def test_librispeech_in_miniature_is_read_as_the_real_one(
    form: str, files: SoundFiles, tmp_path: Path
) -> None:
    speakers: list[set[str]] = []
    for part, split in (("train-clean-100", "train"), ("dev-clean", "validation"), ("test-clean", "test")):
        recipe = LibriSpeechRecipe(part=part, form=form, split=split)
        clips = read_clips(make(AudioCorpus, read_librispeech, tmp_path / part, recipe, files))
        assert {clip["split"] for clip in clips} == {split}
        assert {clip["labels"]["voice"] for clip in clips} == {"man", "woman"}
        assert all(clip["transcript"].islower() for clip in clips)
        speakers.append({clip["speaker"] for clip in clips})
    assert not set.intersection(*speakers)
    assert [len(each) for each in speakers] == [4, 2, 2]


@pytest.mark.parametrize("layout", LaidOutSetRecipe.choices["layout"])
def test_every_layout_in_miniature_is_read_whole(layout: str, files: SoundFiles, tmp_path: Path) -> None:
    corpus = make(AudioCorpus, read_sound_set, tmp_path, LaidOutSetRecipe(layout), files)
    assert corpus.num_dropped == 0
    splits = Counter(clip["split"] for clip in read_clips(corpus))
    assert splits["train"]
    if layout != "musan":  # a hash decides there
        assert splits["validation"]
        assert splits["test"]


def test_web_text_in_miniature_has_words_for_a_whole_vocabulary(tmp_path: Path) -> None:
    recipe = MiniatureWebRecipe(num_documents=150, validation_documents=5)
    corpora = [make(TextCorpus, write_web_text, tmp_path / name, recipe) for name in "ab"]
    assert corpora[0].digest == corpora[1].digest
    texts = list(read_texts(corpora[0].out, "train"))
    assert train_bpe(texts, 6_000).get_vocab_size() == 6_000
    # That of the rehearsal has 13 times as many words, and most of them stand nowhere else.
    words = [word for text in texts for word in text.split()[-recipe.strange_words :]]
    assert len(set(words)) > 0.99 * len(words)
    assert (
        OmniRehearsalRecipe().text.num_documents * recipe.strange_words
        > 2 * TokenizerRecipe(vocab_size=32_768).vocab_size
    )


# -- the whole --------------------------------------------------------------------------------------


@pytest.mark.slow
def test_the_rehearsal_runs_from_end_to_end(tmp_path: Path) -> None:
    run, store, steps = planned("omni-d12-rehearsal", tmp_path, *SMALL)
    _, identifier = plan(run, store)
    runner = InTurn(Executor(store, identifier, run.runtime, Silent()))
    report: Any = run.flow(runner, run.recipe)
    assert len(runner.outcomes) == len(steps)
    assert all(outcome.computed for outcome in runner.outcomes)
    assert isinstance(report, Report)
    assert "rehearsal" in (report.out / "report.html").read_text()
    again, _ = plan(run, store)
    assert {step.status for step in again} == {"current"}
