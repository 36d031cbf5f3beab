"""Pretraining: against a loop written out, against itself after a kill, and on two ranks; and its parts."""

import dataclasses
import json
import math
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from omni_model import hardware
from omni_model.artifacts import GptCheckpoint, TextCorpus, TokenizerFiles, hash_payload
from omni_model.config import BadInput, GptShape, LearningRates, PretrainRecipe, Runtime
from omni_model.model.gpt import GPT
from omni_model.model.greedy import continue_greedily
from omni_model.model.weights import load_gpt, new_gpt
from omni_model.storage import Workspace
from omni_model.telemetry import Metrics, mirrored
from omni_model.text.corpus import write_shard
from omni_model.text.loader import PackedRows, validation_rows
from omni_model.text.tokenizer import load_tokenizer, token_bytes
from omni_model.training import microbatch
from omni_model.training import pretrain as stage_module
from omni_model.training.bits_per_byte import bits_per_byte
from omni_model.training.checkpoint import latest
from omni_model.training.loop import Objective, train
from omni_model.training.microbatch import largest, microbatch_rows, powers_of_two, try_step
from omni_model.training.optim import MuonAdamW, parameter_groups, set_lr, set_muon
from omni_model.training.pretrain import PROMPTS, continue_pretraining, pretrain
from omni_model.training.ranks import ALONE, Ranks
from omni_model.training.setup import Pace, Ready, RowFeed, prepare, rows_per_step
from tests.test_distributed import run_ranks

LENGTH, ROWS, STEPS = 32, 8, 12
SHAPE = GptShape(n_layer=2, n_embd=32, n_head=2, n_kv_head=2, sequence_len=LENGTH, window_pattern="SL")
RECIPE = PretrainRecipe(
    gpt=SHAPE,
    steps=STEPS,
    batch_tokens=ROWS * LENGTH,
    weight_decay=0.2,
    rates=LearningRates(matrix=0.5, embedding=3.0, unembedding=0.2, scalar=0.5),
    warmup_steps=3,
    dtype="float32",
    validate_every=5,
    validation_tokens=5 * LENGTH,
    sample_every=4,
)
QUARTERS = Runtime(microbatch_rows=2)  # of a step's rows at once


class Killed(Exception):
    """Stands for SIGKILL."""


class KillingMetrics(Metrics):
    """Ends the process's work at the first line at or after a step."""

    def __init__(self, path: Path, step: int) -> None:
        super().__init__(path)
        self._last = step

    def log(self, step: int, total: int, **values: float) -> None:
        super().log(step, total, **values)
        if step >= self._last:
            raise Killed


def workspace(directory: Path, kill_at: int = 10**9) -> Workspace:
    (directory / "out").mkdir(parents=True, exist_ok=True)
    return Workspace(directory, 5, KillingMetrics(directory / "metrics.jsonl", kill_at))


@dataclasses.dataclass(frozen=True)
class World:
    text: TextCorpus
    tokenizer: TokenizerFiles


def write_world(root: Path) -> World:
    """Two files of counting to train on, one to validate with; bytes as tokens."""
    corpus, tokenizer = root / "text" / "out", root / "tokenizer" / "out"
    for folder in (corpus, tokenizer):
        folder.mkdir(parents=True)
    for name, numbers in (
        ("train-0", range(900)),
        ("train-1", range(900, 1500)),
        ("validation-0", range(50)),
    ):
        texts = [" ".join(str(n + k) for k in range(2 + n * 7919 % 9)) for n in numbers]
        write_shard(corpus / f"{name}.parquet", {"text": texts})
    (tokenizer / "tokenizer.json").write_text('{"kind":"bytes"}')
    size = sum(path.stat().st_size for path in corpus.iterdir())
    return World(
        TextCorpus("write_corpus", "k", str(root / "text"), "d", 1550, size),
        TokenizerFiles("train_tokenizer", "k", str(root / "tokenizer"), "d", 257),
    )


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    torch.set_num_threads(1)
    return write_world(tmp_path_factory.mktemp("world"))


def run(
    world: World, directory: Path, runtime: Runtime = QUARTERS, kill_at: int = 10**9, **changes: Any
) -> Any:
    """The stage in `directory`: its handle, or Killed."""
    work, recipe = workspace(directory, kill_at), dataclasses.replace(RECIPE, **changes)
    facts = pretrain(recipe, world.text, world.tokenizer, work=work, runtime=runtime)
    assert set(facts) == GptCheckpoint.fact_names()
    (directory / "summary.json").write_text(json.dumps(work.metrics.summaries))
    return GptCheckpoint("pretrain_gpt", "k", str(directory), "d", **facts)


@pytest.fixture(scope="module")
def straight(world: World, tmp_path_factory: pytest.TempPathFactory) -> GptCheckpoint:
    """An undisturbed run."""
    made: GptCheckpoint = run(world, tmp_path_factory.mktemp("straight") / "pretrain_gpt" / "key")
    return made


def lines(handle: GptCheckpoint) -> list[dict[str, float]]:
    return [json.loads(line) for line in (Path(handle.uri) / "metrics.jsonl").read_text().splitlines()]


def read(handle: GptCheckpoint, name: str) -> Any:
    return json.loads((handle.out / name).read_text())


# --- the stage -----------------------------------------------------------------------------------


def by_hand(world: World) -> tuple[GPT, list[float]]:
    """The same training, written out: no loop, no objective, no other process; weights and losses."""
    gpt = new_gpt(SHAPE, 257, 5)
    scale = math.sqrt(ROWS * LENGTH / 2**19)
    rates = {"matrix_lr": 0.5, "embedding_lr": 3.0, "unembedding_lr": 0.2, "scalar_lr": 0.5}
    optimizer = MuonAdamW(parameter_groups(gpt, **rates, batch_scale=scale))
    paths = (world.text.out, "train", world.tokenizer.out)
    stream, losses = PackedRows(*paths, row_tokens=LENGTH + 1, rows_per_step=ROWS), []
    for step in range(STEPS):
        ids = torch.from_numpy(stream.next()[0]).long()
        warmdown = round(0.65 * STEPS)
        left = min(1.0, (STEPS - step) / warmdown)
        set_lr(optimizer, (step + 1) / 3 if step < 3 else left + (1 - left) * 0.05)
        decay = 0.2 * 0.5 * (1 + math.cos(math.pi * step / STEPS))
        set_muon(optimizer, momentum=0.85 + 0.12 * step / 400, weight_decay=decay)
        parts = [gpt(part[:, :-1], part[:, 1:]) / 4 for part in ids.split(2)]
        for part in parts:
            part.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(sum(part.item() for part in parts))
    return gpt, losses


def test_the_stage_is_the_loop_written_out(world: World, straight: GptCheckpoint) -> None:
    gpt, losses = by_hand(world)
    curve = {each["step"]: each["loss"] for each in read(straight, "curve.json")}
    assert sorted(curve) == [1, 5, 10, 12]
    for step, loss in curve.items():
        assert loss == pytest.approx(losses[step - 1], abs=2e-6)
    assert losses[-1] < losses[0] - 0.5
    made = load_gpt(straight.out).state_dict()
    assert all(torch.equal(made[name], weight) for name, weight in gpt.state_dict().items())


def test_what_it_leaves_behind(world: World, straight: GptCheckpoint) -> None:
    assert (straight.steps, straight.n_embd, straight.vocab_size) == (STEPS, 32, 257)
    gpt = load_gpt(straight.out)
    assert straight.num_parameters == gpt.num_params()
    assert read(straight, "training.json") == {
        "batch_tokens": ROWS * LENGTH,
        "dtype": "float32",
        "flops_per_token": gpt.flops_per_token(),
        "steps": STEPS,
        "tokens": STEPS * ROWS * LENGTH,
    }
    validation = read(straight, "validation.json")
    assert [each["step"] for each in validation] == [5, 10, 12]  # the last though it was not its turn
    rows = torch.from_numpy(validation_rows(world.text.out, world.tokenizer.out, LENGTH + 1, 5)).long()
    spelled = torch.tensor([1] * 256 + [0])
    assert validation[-1]["bpb"] == pytest.approx(written_out(gpt, rows, spelled), abs=1e-5)
    assert validation[-1]["bpb"] < validation[0]["bpb"]
    samples = read(straight, "samples.json")
    assert [(each["step"], each["prompt"]) for each in samples] == [
        (s, p) for s in (4, 8, 12) for p in PROMPTS
    ]
    summary = json.loads((Path(straight.uri) / "summary.json").read_text())
    assert summary.keys() == {"val_bpb", "loss", "tokens_per_s", "card"}  # no MFU where the peak is unknown
    assert summary["card"] == "cpu"
    assert summary["val_bpb"] == validation[-1]["bpb"]
    told = lines(straight)
    assert [line["step"] for line in told if "val_bpb" in line] == [5, 10, 12]
    paces = [line for line in told if "step_s" in line]
    assert all(
        line["tokens_per_s"] == pytest.approx(ROWS * LENGTH / line["step_s"], abs=0.1) for line in paces
    )


def test_killed_twice_it_ends_in_the_same_bytes(
    world: World, straight: GptCheckpoint, tmp_path: Path
) -> None:
    place = tmp_path / "key"
    with pytest.raises(Killed):
        run(world, place, dataclasses.replace(QUARTERS, checkpoint_every_s=1e-9), kill_at=4)
    found = latest(place / "partial")
    assert found is not None
    assert found.name == "step-00000003"
    with pytest.raises(Killed):  # with eight steps read and perhaps four more in flight since that checkpoint
        run(world, place, dataclasses.replace(QUARTERS, checkpoint_every_s=1e9), kill_at=8)
    assert latest(place / "partial") == found
    made = run(world, place)
    assert hash_payload(made.out) == hash_payload(straight.out)


def test_more_rows_at_once_change_rounding_alone(
    world: World, straight: GptCheckpoint, tmp_path: Path
) -> None:
    whole = run(world, tmp_path / "key", Runtime(), sample_every=10)
    # Evaluated together every five steps, and once more after the last.
    assert [line["step"] for line in lines(whole) if "val_bpb" in line] == [5, 10]
    assert [each["step"] for each in read(whole, "validation.json")] == [5, 10, 12]
    assert sorted({each["step"] for each in read(whole, "samples.json")}) == [10, 12]
    for ours, theirs in zip(read(whole, "curve.json"), read(straight, "curve.json"), strict=True):
        assert ours == pytest.approx(theirs, abs=2e-4)


def test_evaluation_compiles_nothing(world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a card, where blocks are compiled: torch gives up on one that it meets in too many shapes."""
    graphs = []

    def count(graph: torch.fx.GraphModule, _: list[Tensor]) -> Callable[..., Any]:
        graphs.append(graph)
        return graph.forward

    def compiled(*how: Any) -> GPT:
        gpt = new_gpt(*how)
        for block in gpt.transformer["h"]:
            block.compile(dynamic=False, backend=count)
        return gpt

    monkeypatch.setattr(stage_module, "new_gpt", compiled)
    made = run(world, tmp_path / "key", steps=3, validate_every=1, sample_every=1)
    assert len(read(made, "samples.json")) == 3 * len(PROMPTS)
    assert len(graphs) == 2  # layers with and without value embeddings


def test_it_can_begin_with_what_was_learned_before(
    world: World, straight: GptCheckpoint, tmp_path: Path
) -> None:
    stream = PackedRows(
        world.text.out, "train", world.tokenizer.out, row_tokens=LENGTH + 1, rows_per_step=ROWS
    )
    ids = torch.from_numpy(stream.next()[0]).long()
    with torch.no_grad():
        expected = load_gpt(straight.out)(ids[:, :-1], ids[:, 1:]).item()
    recipe, given = dataclasses.replace(RECIPE, steps=2), (straight, world.text, world.tokenizer)
    work = workspace(tmp_path / "key")
    facts = continue_pretraining(recipe, *given, work=work, runtime=QUARTERS)
    assert facts["steps"] == 2
    curve = json.loads((work.out / "curve.json").read_text())
    assert curve[0]["loss"] == pytest.approx(expected, abs=2e-6)
    other = dataclasses.replace(recipe, gpt=dataclasses.replace(SHAPE, n_layer=3))
    with pytest.raises(BadInput, match="has n_layer 2 and .* ask for 3"):
        continue_pretraining(other, *given, work=workspace(tmp_path / "other"), runtime=QUARTERS)


def two_ranks_pretrain(ranks: Ranks, place: Path) -> None:
    world = World(*(dataclasses.replace(handle, uri=str(place / name)) for handle, name in HANDLES))
    run(world, place / f"rank{ranks.rank}" / "key", Runtime(checkpoint_every_s=1e9))


HANDLES = (
    (TextCorpus("write_corpus", "k", "", "d", 1550, 1), "text"),
    (TokenizerFiles("train_tokenizer", "k", "", "d", 257), "tokenizer"),
)


def test_two_ranks_learn_from_the_same_batches(straight: GptCheckpoint, tmp_path: Path) -> None:
    write_world(tmp_path)
    assert run_ranks(2, two_ranks_pretrain, tmp_path) == [0, 0]
    first, second = (tmp_path / f"rank{rank}" / "key" for rank in (0, 1))
    assert list((second / "out").iterdir()) == []
    assert (second / "metrics.jsonl").read_text() == ""
    assert json.loads((second / "summary.json").read_text()) == {}
    shared = GptCheckpoint("pretrain_gpt", "k", str(first), "d", 0, 0, 0, 0)
    for name in ("curve.json", "validation.json"):
        for ours, theirs in zip(read(shared, name), read(straight, name), strict=True):
            assert ours == pytest.approx(theirs, abs=5e-4), name
    states = [
        json.loads((partial / "state.json").read_text())
        for partial in (latest(first / "partial"), latest(Path(straight.uri) / "partial"))
        if partial is not None
    ]
    assert states[0]["objective"]["cursor"] == states[1]["objective"]["cursor"]


@pytest.mark.parametrize(
    ("changes", "runtime", "sentence"),
    [
        ({"steps": 0}, Runtime(), "pretrain.steps is 0; set it"),
        ({"gpt": dataclasses.replace(SHAPE, sequence_len=0)}, Runtime(), "gpt.sequence_len is 0; set it"),
        (
            {"batch_tokens": 100},
            Runtime(),
            "batch_tokens 100 must be a multiple of 32 tokens a row x 1 ranks",
        ),
        (
            {"batch_tokens": 2**20},
            Runtime(),
            "the text corpus fills .* rows of 33 tokens and a step reads 32768",
        ),
        ({"gpt": dataclasses.replace(SHAPE, n_head=3)}, Runtime(), "the recipe's gpt shape is not possible"),
        ({"fp8": True}, Runtime(), "pretrain.fp8 is not possible: No matrix"),
        ({}, Runtime(microbatch_rows=3), "runtime.microbatch_rows 3 does not divide a rank's 8 rows"),
    ],
)
def test_what_does_not_fit_is_refused(
    world: World, tmp_path: Path, changes: dict[str, Any], runtime: Runtime, sentence: str
) -> None:
    with pytest.raises(BadInput, match=sentence):
        run(world, tmp_path, runtime, **changes)
    assert hash_payload(tmp_path / "out") == []


def test_another_tokenizer_and_a_corpus_without_validation_are_refused(world: World, tmp_path: Path) -> None:
    other = dataclasses.replace(world.tokenizer, vocab_size=400)
    with pytest.raises(BadInput, match="has 257 ids and its record says 400; make it again"):
        run(dataclasses.replace(world, tokenizer=other), tmp_path / "other")
    whole = write_world(tmp_path)
    (whole.text.out / "validation-0.parquet").unlink()
    with pytest.raises(BadInput, match="holds no validation-"):
        run(whole, tmp_path / "half")


# --- bits per byte -------------------------------------------------------------------------------


@torch.no_grad()
def written_out(gpt: GPT, rows: Tensor, num_bytes: Tensor) -> float:
    """lm-core 1.13, token by token from the logits."""
    nats = spelled = 0.0
    for row in rows:
        log_p = F.log_softmax(gpt(row[None, :-1])[0].double(), dim=-1)
        for position, target in enumerate(row[1:].tolist()):
            if num_bytes[target] > 0:
                nats -= log_p[position, target].item()
                spelled += int(num_bytes[target])
    return nats / (math.log(2) * spelled)


def test_bits_per_byte_is_the_sum_written_out() -> None:
    gpt = new_gpt(SHAPE, 257, 1)
    with torch.no_grad():
        gpt.lm_head.weight.mul_(300)
    draws = torch.Generator().manual_seed(0)
    rows = torch.randint(257, (6, LENGTH + 1), generator=draws)
    num_bytes = torch.randint(0, 4, (257,), generator=draws)  # a quarter of the ids count as special
    expected = written_out(gpt, rows, num_bytes)
    for size in (1, 4, 6):
        assert bits_per_byte(gpt, rows.split(size), num_bytes) == pytest.approx(expected, rel=1e-6)
    assert abs(written_out(gpt, rows, num_bytes.clamp(min=1)) - expected) > 0.1  # specials do matter
    with pytest.raises(ValueError, match="Not one token"):
        bits_per_byte(gpt, [rows], torch.zeros(257, dtype=torch.long))


def test_the_byte_tokenizer_spells_one_byte_a_token(world: World) -> None:
    assert sum(token_bytes(load_tokenizer(world.tokenizer.out))) in (248, 256)


# --- its parts -----------------------------------------------------------------------------------


def test_a_sample_is_the_likeliest_token_each_time(straight: GptCheckpoint) -> None:
    gpt, ids = load_gpt(straight.out), [256, *b"12 13"]
    written = continue_greedily(gpt, ids, 20)
    whole = torch.tensor([[*ids, *written]])
    with torch.no_grad():
        likeliest = gpt(whole)[0].argmax(dim=-1)
    assert likeliest[len(ids) - 1 : -1].tolist() == written
    assert len(written) == 20
    assert continue_greedily(gpt, ids, 20, stop=(written[3],)) == written[: written.index(written[3])]


def ready(gpt: GPT, ranks: Ranks = ALONE) -> Ready:
    return Ready(gpt, MuonAdamW(parameter_groups(gpt)), None, ranks, torch.device("cpu"))


def test_rows_at_once_are_the_most_that_fit_and_are_found_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert powers_of_two(24) == [8, 4, 2, 1]
    tried = []

    def attempt(count: int) -> None:
        tried.append(count)
        if count > 2:
            raise torch.OutOfMemoryError

    assert largest([8, 4, 2, 1], attempt) == 2
    assert tried == [8, 4, 2]
    with pytest.raises(BadInput, match="not even one row fits"):
        largest([8, 4], attempt)
    # On a card, as the stage asks: what was found is kept, and taken by another number of ranks too.
    monkeypatch.setattr(microbatch, "try_step", lambda ready, count: attempt(count // 4))
    card = dataclasses.replace(ready(new_gpt(SHAPE, 257, 0)), device=torch.device("cuda"))
    work = workspace(tmp_path)
    tried.clear()
    for rows, found in ((32, 8), (32, 8), (12, 4)):
        assert microbatch_rows(card, rows, work=work, runtime=Runtime()) == found
    assert tried == [8, 4, 2]
    assert microbatch_rows(card, 12, work=work, runtime=Runtime(microbatch_rows=3)) == 3


def test_on_a_processor_a_fixed_number_of_tokens_is_read_at_once(tmp_path: Path) -> None:
    here, work = ready(new_gpt(SHAPE, 257, 0)), workspace(tmp_path)
    found = [microbatch_rows(here, rows, work=work, runtime=Runtime()) for rows in (1, 12, 128, 1024)]
    assert found == [1, 4, 128, 128]
    assert not (work.partial / "microbatch.json").exists()


def test_a_try_leaves_nothing_behind() -> None:
    here = ready(new_gpt(SHAPE, 257, 0))
    before = {name: weight.clone() for name, weight in here.gpt.named_parameters()}
    try_step(here, 4)
    assert all(weight.grad is None for weight in here.gpt.parameters())
    assert all(torch.equal(weight, before[name]) for name, weight in here.gpt.named_parameters())
    assert here.optimizer.state == {}


def test_the_batch_is_divided_evenly_or_refused() -> None:
    assert rows_per_step(4096, 256, Ranks(0, 4)) == 16
    with pytest.raises(BadInput, match="a multiple of 256 tokens a row x 3 ranks = 768"):
        rows_per_step(4096, 256, Ranks(0, 3))


def test_learning_rates_are_scaled_and_fp16_has_a_loss_scale(tmp_path: Path) -> None:
    gpt = new_gpt(SHAPE, 257, 0, torch.float16)
    rates = LearningRates(matrix=0.1, embedding=0.2, unembedding=0.3, scalar=0.4)
    made = prepare(gpt, rates, ranks=ALONE, work=workspace(tmp_path), batch_scale=0.5, weight_decay=0.7)
    assert made.loss_scale is not None
    assert made.optimizer.polar_dtype == torch.float32
    found = [group["initial_lr"] for group in made.optimizer.param_groups]
    width = (32 / 768) ** -0.5
    assert found[:5] == pytest.approx([0.15 * width, 0.1 * width, 0.05 * width, 0.002, 0.2])
    assert set(found[6:]) == {0.05}
    assert {g["weight_decay"] for g in made.optimizer.param_groups if g["kind"] == "muon"} == {0.7}


def test_rows_reach_the_device_as_they_are() -> None:
    feed = RowFeed(hardware.device(), 4, 9)
    for number in range(5):  # more than there are buffers
        rows = np.random.default_rng(number).integers(0, 2**31 - 1, (4, 9), dtype=np.int32)
        carried = feed.carry(rows.copy())
        assert carried.dtype == torch.int64
        assert np.array_equal(carried.cpu().numpy(), rows)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a card")
def test_rows_at_once_on_a_card(tmp_path: Path) -> None:
    shape = dataclasses.replace(SHAPE, n_embd=256, sequence_len=256)
    made = prepare(
        new_gpt(shape, 4096, 0, torch.bfloat16), LearningRates(), ranks=ALONE, work=workspace(tmp_path)
    )
    rows = microbatch_rows(made, 2**16, work=workspace(tmp_path), runtime=Runtime())
    assert 16 <= rows <= 2**16
    assert json.loads((tmp_path / "partial" / "microbatch.json").read_text()) == rows
    ids = torch.zeros(rows, 256, dtype=torch.long, device=made.device)
    made.gpt(ids, ids).backward()
    made.optimizer.step()


# --- figures -------------------------------------------------------------------------------------


def test_pace_and_mfu_follow_from_the_seconds_of_a_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hardware, "card_name", lambda: "NVIDIA GeForce RTX 4090")
    gpt = new_gpt(SHAPE, 257, 0)
    metrics = Metrics(tmp_path / "metrics.jsonl")
    pace = Pace(metrics, step_tokens=10**9, gpt=gpt, ranks=Ranks(0, 2))
    for step, step_s in ((10, 9.0), (20, 2.0), (30, 2.5)):
        pace.log(step, 30, loss=1.0, step_s=step_s)
    pace.log(30, 30, val_bpb=1.0)
    told = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert told[1]["tokens_per_s"] == 5e8
    assert told[1]["mfu"] == round(5e8 * gpt.flops_per_token() / (2 * 165.2e12), 4)
    assert told[3].keys() == {"time", "step", "total", "val_bpb"}
    summary = pace.summary()  # of the median step
    assert (summary["card"], summary["tokens_per_s"]) == ("NVIDIA GeForce RTX 4090", 4e8)
    assert summary["mfu"] == pytest.approx(0.8 * told[1]["mfu"], rel=0.01)


class Slow(Objective):
    """A step of nothing, an evaluation of 50 ms."""

    def __init__(self) -> None:
        self.weight = torch.nn.Parameter(torch.ones(2))
        self.optimizer = torch.optim.SGD([self.weight], lr=0.1)

    def tensors(self) -> Mapping[str, Tensor]:
        return {"weight": self.weight}

    def set_schedule(self, step: int) -> None:
        pass

    def loss(self, step: int) -> Iterator[Tensor]:
        yield self.weight[0] * 0.25
        yield self.weight[1] * 0.75

    def evaluate(self, step: int) -> dict[str, float]:
        time.sleep(0.05)
        return {}


def test_evaluations_are_no_part_of_a_steps_time(tmp_path: Path) -> None:
    metrics = Metrics(tmp_path / "metrics.jsonl")
    train(Slow(), steps=40, partial=tmp_path / "partial", metrics=metrics, evaluate_every=2)
    told = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    paces = sorted(line["step_s"] for line in told if "step_s" in line)
    assert len(paces) == 20
    assert paces[10] < 0.02  # half of the evaluation's 50 ms would be 0.025
    assert told[0]["loss"] == pytest.approx((1.0 + 0.25 * 0.975 + 0.75 * 0.925) / 2)  # shares are summed


def test_peaks_are_known_of_whole_names_alone() -> None:
    peaks = {
        "NVIDIA GeForce RTX 5090": 209.5e12,
        "NVIDIA GeForce RTX 4090": 165.2e12,
        "RTX 3090": 71e12,
        "NVIDIA H100 80GB HBM3": 989e12,
        "NVIDIA H100 PCIe": 756e12,
        "NVIDIA H200": 989e12,
        "NVIDIA A100-SXM4-80GB": 312e12,
        "NVIDIA A100 80GB PCIe": 312e12,
    }
    assert {name: hardware.peak_flops(name) for name in peaks} == peaks
    others = ("cpu", "NVIDIA GeForce RTX 4090 D", "NVIDIA GeForce RTX 4090 Laptop GPU", "NVIDIA H100 NVL")
    more = ("NVIDIA GeForce RTX 3090 Ti", "NVIDIA GH200 480GB", "NVIDIA H100 80GB HBM3 MIG 1g.10gb", "")
    assert {hardware.peak_flops(name) for name in (*others, *more)} == {None}


@pytest.mark.parametrize(
    ("told", "dtype"),
    [("8.9\n12.0\n", "bfloat16"), ("7.5\n8.0\n", "float32"), ("", "float32"), ("[N/A]", "float32")],
)
def test_the_dtype_of_training_is_asked_of_the_driver(
    told: str, dtype: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    driver = tmp_path / "nvidia-smi"
    driver.write_text(f"#!/bin/sh\nprintf '{told}'\n")
    driver.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("NANOCHAT_DTYPE", raising=False)
    assert hardware.training_dtype() == dtype
    monkeypatch.setenv("NANOCHAT_DTYPE", "float16")
    assert hardware.training_dtype() == "float16"
    monkeypatch.setenv("NANOCHAT_DTYPE", "float8")
    with pytest.raises(BadInput, match="NANOCHAT_DTYPE is 'float8'"):
        hardware.training_dtype()


# --- wandb ---------------------------------------------------------------------------------------

WITH_WANDB = pytest.mark.skipif(find_spec("wandb") is None, reason="wandb is not installed")
TRACKED = """
import glob, os, signal, sys
from importlib.util import find_spec
from pathlib import Path
from omni_model.telemetry import Metrics, mirrored

place, killing = Path(sys.argv[1]), sys.argv[2] == "kill"
metrics = Metrics(place / "metrics.jsonl")
with mirrored(metrics, place, "auto", project="nanochat", settings={"steps": 2}):
    metrics.log(1, 2, loss=2.5)
    for children in glob.glob("/proc/self/task/*/children") if killing else ():
        for child in Path(children).read_text().split():
            os.kill(int(child), signal.SIGKILL)
    for step in range(2, 50):
        metrics.log(step, 50, loss=2.25, found_only_here=0.5)
    metrics.summary(val_bpb=1.25)
print("went on")
"""


def track(place: Path, word: str, nobody: socket.socket) -> subprocess.CompletedProcess[str]:
    """A stage's tracking in a process of its own, whose every way out leads to `nobody`."""
    place.mkdir(parents=True)
    address = f"http://127.0.0.1:{nobody.getsockname()[1]}"
    kept = {k: v for k, v in os.environ.items() if not k.startswith("WANDB_") and k.lower() != "no_proxy"}
    proxies = {name: address for name in ("HTTP_PROXY", "HTTPS_PROXY", "http_proxy", "https_proxy")}
    environment = {**kept, **proxies, "WANDB_BASE_URL": address, "HOME": str(place.parent.parent)}
    words = [sys.executable, "-c", TRACKED, str(place), word]
    return subprocess.run(words, env=environment, capture_output=True, text=True, check=True, timeout=60)


@pytest.fixture
def nobody() -> Iterator[socket.socket]:
    """A listener that answers nobody; who connected can be asked by accepting."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        listener.setblocking(False)
        yield listener


@WITH_WANDB
def test_without_a_login_wandb_writes_beside_the_payload_and_asks_nobody(
    tmp_path: Path, nobody: socket.socket
) -> None:
    place = tmp_path / "pretrain_gpt" / "0123456789abcdef"
    done = track(place, "live", nobody)
    assert done.stdout == "went on\n"
    assert done.stderr == ""
    with pytest.raises(BlockingIOError):
        nobody.accept()
    (kept,) = place.glob("wandb/offline-run-*/run-0123456789abcdef.wandb")
    content = kept.read_bytes()
    assert all(word in content for word in (b"found_only_here", b"val_bpb", b"pretrain_gpt 01234567"))
    assert sorted(path.name for path in place.iterdir()) == ["metrics.jsonl", "wandb"]
    assert len((place / "metrics.jsonl").read_text().splitlines()) == 49


@WITH_WANDB
@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="finds wandb's process in /proc")
def test_a_stage_outlives_wandb(tmp_path: Path, nobody: socket.socket) -> None:
    done = track(tmp_path / "pretrain_gpt" / "key", "kill", nobody)
    assert done.stdout == "went on\n"
    assert done.stderr.count("wandb failed and is told nothing more") == 1
    assert len((tmp_path / "pretrain_gpt" / "key" / "metrics.jsonl").read_text().splitlines()) == 49


def test_without_the_package_only_an_explicit_wish_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    metrics = Metrics(tmp_path / "metrics.jsonl")
    for wish in ("off", "auto"):
        with mirrored(metrics, tmp_path, wish, project="nanochat", settings={}):
            metrics.log(1, 1, loss=1.0)
    told = capsys.readouterr().err
    assert told.startswith("wandb is not installed; `pip install wandb`")
    assert told.count("\n") == 1
    for wish in ("online", "offline"):
        with (
            pytest.raises(
                BadInput, match=f"runtime.wandb is {wish} and wandb is not installed; `pip install"
            ),
            mirrored(metrics, tmp_path, wish, project="nanochat", settings={}),
        ):
            pass


@pytest.mark.parametrize(
    ("variables", "netrc", "mode"),
    [
        ({}, "", "offline"),
        ({"WANDB_API_KEY": "k"}, "", "online"),
        ({}, "machine api.wandb.ai login user password k\n", "online"),
        ({}, "machine other.org login user password k\n", "offline"),
        ({"WANDB_BASE_URL": "https://ours.org:8080"}, "machine ours.org:8080 password k\n", "online"),
        ({"WANDB_BASE_URL": "https://ours.org:8080"}, "machine api.wandb.ai password k\n", "offline"),
        ({}, "not a netrc\n", "offline"),
        ({"WANDB_API_KEY": "k", "OMNI_OFFLINE": "1"}, "", "offline"),
        ({"WANDB_API_KEY": "k", "WANDB_MODE": "offline"}, "", "offline"),
        ({"WANDB_MODE": "disabled"}, "", "disabled"),
    ],
)
def test_who_has_logged_in_is_online(
    variables: dict[str, str], netrc: str, mode: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("WANDB_API_KEY", "WANDB_BASE_URL", "WANDB_MODE", "OMNI_OFFLINE", "HF_HUB_OFFLINE"):
        monkeypatch.delenv(name, raising=False)
    (tmp_path / "netrc").write_text(netrc)
    for name, value in {**variables, "NETRC": str(tmp_path / "netrc"), "WANDB_ERROR_REPORTING": ""}.items():
        monkeypatch.setenv(name, value)
    assert hardware.wandb_mode() == mode
    assert os.environ["WANDB_ERROR_REPORTING"] == "false"
