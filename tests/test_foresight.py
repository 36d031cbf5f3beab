"""What is foreseen, against what is: counts against the real GPT, memory against what tensors really take,
disk against files that were written, and the table in infra/README.md against the code."""

from __future__ import annotations

import dataclasses
import weakref
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from flows import recipes
from flows.cards import CARDS, GIB, Machine, Speed, find_card, speed
from flows.foresight import chat_evaluation, pretraining, table
from flows.gpt_memory import (
    MUON_BYTES,
    checkpoint_bytes,
    fitting_rows,
    kept_for_backward,
    training_bytes,
    weights_bytes,
)
from flows.planning import foresee, plan_json, plan_rows, plan_summary
from omni_model import hardware
from omni_model.artifacts import Manifest, PayloadFile
from omni_model.config import (
    BadInput,
    BaseClimbMixRecipe,
    BaseFolderRecipe,
    ChatEvaluationRecipe,
    GptShape,
    MiniatureSetsRecipe,
    Runtime,
    TokenizerRecipe,
)
from omni_model.config.depth import REFERENCE_BATCH_TOKENS, GptSize, derive, windows
from omni_model.model.gpt import GPT, GPTConfig, window_sizes
from omni_model.model.weights import save_gpt
from omni_model.plain import identity, override
from omni_model.storage import Store
from omni_model.training import checkpoint, optim, schedule
from omni_model.training.optim import MuonAdamW, parameter_groups
from tasks.identity import Identifier
from tasks.planner import Planner, Step

ROOT = Path(__file__).parent.parent


def deep(*settings: str) -> BaseClimbMixRecipe:
    recipe = BaseClimbMixRecipe(tokens_per_parameter=10.5)
    for setting in settings:
        recipe = override(recipe, *setting.split("="))
    return recipe


def real(shape: GptShape, vocab_size: int, dtype: torch.dtype = torch.float32) -> GPT:
    return GPT(GPTConfig(**dataclasses.asdict(shape), vocab_size=vocab_size), dtype)


# -- the dial -----------------------------------------------------------------------------------------

TOTALS = {4: 36_700_242, 6: 73_531_538, 8: 125_829_354, 12: 286_261_730, 20: 896_533_746, 24: 1_384_122_122}


@pytest.mark.parametrize(
    ("settings", "vocab_size"),
    [
        *[((f"depth={depth}",), 32_768) for depth in (*TOTALS, 26)],
        (("depth=5", "pretrain.gpt.n_kv_head=1"), 1000),  # an odd depth, shared keys, a vocabulary to pad
        (("pretrain.gpt.n_embd=96", "pretrain.gpt.n_head=4", "pretrain.gpt.n_kv_head=2"), 257),
        (("depth=3", "sequence_len=3000", "pretrain.gpt.window_pattern=sl"), 32_768),
    ],
)
def test_counts_are_those_of_the_real_gpt(settings: Sequence[str], vocab_size: int) -> None:
    shape = derive(deep(*settings, f"tokenizer.vocab_size={vocab_size}")).pretrain.gpt
    size = GptSize.of(shape, vocab_size)
    with torch.device("meta"):
        gpt = real(shape, vocab_size)
    tables = sum(p.numel() for p in [gpt.transformer["wte"].weight, *gpt.value_embeds.parameters()])
    assert size.parameters == gpt.num_params()
    assert size.scaling_parameters == gpt.num_scaling_params()
    assert (size.tables, size.head) == (tables, gpt.lm_head.weight.numel())
    assert size.flops_per_token == gpt.flops_per_token()
    assert windows(shape) == window_sizes(gpt.config)


@pytest.mark.parametrize(
    ("depth", "batch", "weight_decay", "steps"),
    [(4, 2**18, 1.8899, 462), (8, 2**18, 0.5197, 1680), (12, 2**19, 0.28, 2205), (20, 2**20, 0.1002, 4357),
     (24, 2**20, 0.0597, 7308)],
)  # fmt: skip
def test_depth_decides_what_it_decides_in_nanochat(
    depth: int, batch: int, weight_decay: float, steps: int
) -> None:
    recipe = derive(deep(f"depth={depth}"))
    pretrain, gpt = recipe.pretrain, recipe.pretrain.gpt
    assert (pretrain.batch_tokens, pretrain.steps, recipe.chat.batch_tokens) == (batch, steps, batch)
    assert pretrain.weight_decay == pytest.approx(weight_decay, abs=5e-5)
    assert (gpt.n_layer, gpt.n_embd, gpt.sequence_len) == (depth, 64 * depth, 2048)
    assert gpt.n_head == gpt.n_kv_head == gpt.n_embd // 128
    assert derive(recipe) == recipe
    assert schedule.batch_scale(REFERENCE_BATCH_TOKENS) == 1.0
    assert schedule.batch_scale(batch) == pytest.approx((batch / 2**19) ** 0.5)


def test_what_is_stated_is_kept_and_what_follows_uses_it() -> None:
    stated = derive(deep("depth=12", "pretrain.batch_tokens=262144", "chat.batch_tokens=8192"))
    free = derive(deep("depth=12"))
    assert stated.pretrain.steps == 2 * free.pretrain.steps
    assert stated.chat.batch_tokens == 8192
    assert stated.pretrain.weight_decay == pytest.approx(free.pretrain.weight_decay * 0.5**0.5)
    short = derive(deep("depth=12", "pretrain.steps=200"))
    assert short.pretrain.batch_tokens == free.pretrain.batch_tokens
    assert short.pretrain.weight_decay > 10 * free.pretrain.weight_decay  # a short run forgets faster
    assert short.climbmix.num_shards < free.climbmix.num_shards / 5
    assert derive(deep("climbmix.num_shards=3")).climbmix.num_shards == 3
    wide = derive(deep("depth=12", "pretrain.gpt.n_layer=6")).pretrain.gpt
    assert (wide.n_layer, wide.n_embd, wide.n_head) == (6, 384, 3)


def test_rows_of_any_length_make_whole_batches() -> None:
    pretrain = derive(deep("depth=12", "sequence_len=3000")).pretrain
    rows, left = divmod(pretrain.batch_tokens, 3000)
    assert left == 0
    assert rows.bit_count() == 1
    assert 0.7 < pretrain.batch_tokens / 2**19 < 1.4


def test_shards_last_and_are_never_none() -> None:
    # nanochat found about 150 shards to be enough for depth 24 at 8 tokens a parameter, and takes 170.
    assert 165 <= derive(deep("depth=24", "tokens_per_parameter=8")).climbmix.num_shards <= 190
    assert derive(deep("depth=1", "tokens_per_parameter=1")).climbmix.num_shards == 1
    assert derive(deep("depth=60", "tokens_per_parameter=200")).climbmix.num_shards == 6542
    bytes_too = derive(deep("tokenizer.kind=bytes")).climbmix.num_shards
    assert bytes_too < derive(deep()).climbmix.num_shards
    assert derive(BaseFolderRecipe(depth=6)).pretrain.gpt.n_embd == 384  # no shards there


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (("pretrain.gpt.n_head=5",), "set n_embd, n_head and n_kv_head together"),
        (("pretrain.gpt.n_kv_head=4",), "does not come out even"),
        (("pretrain.batch_tokens=100000",), "not a whole number of rows of 2048"),
        (("tokens_per_parameter=0.001",), "less than one batch"),
    ],
)
def test_what_does_not_come_out_even_is_refused(settings: Sequence[str], words: str) -> None:
    with pytest.raises(BadInput, match=words):
        derive(deep(*settings))


def test_known_totals() -> None:
    sizes = {depth: GptSize.of(derive(deep(f"depth={depth}")).pretrain.gpt, 32_768) for depth in TOTALS}
    assert {depth: size.parameters for depth, size in sizes.items()} == TOTALS


# -- memory and disk ----------------------------------------------------------------------------------

SHAPES = [
    (GptShape(4, 128, 2, 2, 256, "SSSL"), 1024, 4),
    (GptShape(3, 192, 3, 1, 256, "SSSL"), 4096, 1),  # shared keys, an odd depth, a heavy head
    (GptShape(4, 64, 4, 4, 128, "L"), 256, 16),  # activations outweigh the weights
]


def some_ids(shape: GptShape, vocab_size: int, rows: int) -> torch.Tensor:
    return torch.arange(rows * shape.sequence_len).view(rows, -1) % vocab_size


@pytest.mark.parametrize(("shape", "vocab_size", "rows"), SHAPES)
def test_activations_are_what_autograd_keeps(shape: GptShape, vocab_size: int, rows: int) -> None:
    gpt, ids = real(shape, vocab_size), some_ids(shape, vocab_size, rows)
    lasting = {t.untyped_storage().data_ptr() for t in (*gpt.parameters(), gpt.cos, gpt.sin)}
    kept: dict[int, torch.Tensor] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        kept.setdefault(tensor.untyped_storage().data_ptr(), tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        loss = gpt(ids, ids)
    assert loss.requires_grad
    measured = sum(t.untyped_storage().nbytes() for place, t in kept.items() if place not in lasting)
    foreseen = kept_for_backward(shape, ids.numel(), element_bytes=4)
    assert measured == pytest.approx(foreseen, rel=0.05)


class PeakBytes(TorchDispatchMode):
    """Bytes of all living storages, and the most there ever were."""

    def __init__(self, known: Sequence[torch.Tensor]) -> None:
        super().__init__()
        self.living: dict[int, int] = {}
        self.peak = 0
        for tensor in known:
            self.see(tensor)

    def see(self, value: Any) -> None:
        if isinstance(value, torch.Tensor) and value.untyped_storage()._cdata not in self.living:
            storage = value.untyped_storage()
            self.living[storage._cdata] = storage.nbytes()
            self.peak = max(self.peak, sum(self.living.values()))
            weakref.finalize(storage, self.living.pop, storage._cdata)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        for value in tree_leaves(made):
            self.see(value)
        return made


@pytest.mark.parametrize(("shape", "vocab_size", "rows"), SHAPES)
def test_the_peak_of_a_training_step(shape: GptShape, vocab_size: int, rows: int) -> None:
    gpt, ids = real(shape, vocab_size), some_ids(shape, vocab_size, rows)
    optimizer = MuonAdamW(parameter_groups(gpt))
    gpt(ids, ids).backward()
    optimizer.step()  # its state exists from now on
    optimizer.zero_grad(set_to_none=True)
    state = [t for each in optimizer.state.values() for t in each.values() if isinstance(t, torch.Tensor)]
    with PeakBytes([*gpt.parameters(), gpt.cos, gpt.sin, *state]) as memory:
        for _ in range(2):
            gpt(ids, ids).backward()
        optimizer.step()
    assert memory.peak == pytest.approx(training_bytes(shape, vocab_size, rows, element_bytes=4), rel=0.06)


def test_constants_of_the_optimizer_are_still_those() -> None:
    assert MUON_BYTES == optim.SLICE_BYTES_GPU


def test_weights_and_checkpoints_on_disk(tmp_path: Path) -> None:
    shape, vocab_size = SHAPES[1][:2]
    gpt, ids = real(shape, vocab_size, torch.bfloat16), some_ids(shape, vocab_size, 1)[:, :32]
    optimizer = MuonAdamW(parameter_groups(gpt))
    gpt(ids, ids).backward()
    optimizer.step()
    (tmp_path / "payload").mkdir()
    save_gpt(gpt, tmp_path / "payload")
    tensors, scalars = checkpoint.flatten_optimizer(optimizer)
    checkpoint.save(tmp_path / "step-00000001", dict(gpt.named_parameters()), tensors, {"optimizer": scalars})

    def written(directory: Path) -> int:
        return sum(file.stat().st_size for file in directory.iterdir())

    size = GptSize.of(shape, vocab_size)
    assert written(tmp_path / "payload") == pytest.approx(weights_bytes(size), rel=0.01)
    assert written(tmp_path / "step-00000001") == pytest.approx(checkpoint_bytes(size), rel=0.01)


@pytest.mark.parametrize("name", ["5090", "4090", "h100"])
@pytest.mark.parametrize("depth", [12, 20])
def test_the_microbatch_is_the_largest_that_fits(name: str, depth: int) -> None:
    card, pretrain = find_card(name), derive(deep(f"depth={depth}")).pretrain
    in_a_step = pretrain.batch_tokens // 2048
    rows = fitting_rows(pretrain.gpt, 32_768, card.usable_bytes, in_a_step)
    assert in_a_step % rows == 0
    assert training_bytes(pretrain.gpt, 32_768, rows) <= card.usable_bytes
    assert 1.1 * training_bytes(pretrain.gpt, 32_768, 2 * rows) > card.usable_bytes
    shared = training_bytes(pretrain.gpt, 32_768, rows, gpus=4)
    assert shared < training_bytes(pretrain.gpt, 32_768, rows)  # each card keeps a part of the state


def test_what_fits_no_card_is_said_so() -> None:
    recipe = derive(deep("depth=34"))
    forecast = pretraining(recipe.pretrain, 32_768, Machine(CARDS["4090"], Speed(1e14, "")))
    assert (forecast.rows, forecast.seconds) == (0, None)
    assert "rows at once: 1 need" in forecast.assumed[0]
    assert (forecast.gpu_bytes or 0) > 24 * GIB


# -- speed --------------------------------------------------------------------------------------------


def test_peaks_are_those_of_the_cards() -> None:
    peaks = {name: card.peak_flops for name, card in CARDS.items()}
    assert peaks == {"5090": 209.5e12, "4090": 165.2e12, "h100": 989e12, "h200": 989e12, "cpu": None}
    with pytest.raises(BadInput, match="did you mean"):
        find_card("509")


def trained(depth: int, card: str, machine: str = "", **figures: float) -> Manifest:
    """A pretraining that an earlier run left in a store."""
    recipe = derive(deep(f"depth={depth}"))
    return Manifest(
        stage="pretrain_gpt",
        key=f"{depth:064x}",
        handle="GptCheckpoint",
        components={
            "recipe": identity(recipe.pretrain),
            "inputs": {"text": "t", "tokenizer": "t"},
            "code": {},
            "packages": {},
        },
        files=[PayloadFile("model.safetensors", 7, f"{depth}")],
        facts={
            "num_parameters": GptSize.of(recipe.pretrain.gpt, 32_768).parameters,
            "steps": recipe.pretrain.steps,
            "n_embd": recipe.pretrain.gpt.n_embd,
            "vocab_size": 32_768,
        },
        metrics={"card": card, **figures},
        timings={"seconds": 1234.0, "peak_memory_bytes": 1e9},
        versions={"machine": machine or f"8 x Some Processor, 64 GiB, {card}"},
    )


def test_a_measured_share_wins_over_an_assumed_one_and_the_nearest_depth_over_others() -> None:
    name = "NVIDIA GeForce RTX 5090"
    earlier = [trained(6, name, mfu=0.3), trained(20, name, mfu=0.5), trained(12, name + " D", mfu=0.6)]
    card = CARDS["5090"]
    assert speed(card, earlier, 26).flops == pytest.approx(0.5 * 209.5e12)
    assert speed(card, earlier, 8).told == "MFU 30%, measured at depth 6"
    assert "assumed" in speed(CARDS["4090"], earlier, 8).told
    assert (
        speed(card, [trained(6, name)], 6).told == speed(card, [], 6).told
    )  # a resumed end measures nothing


def test_of_a_processor_nothing_is_assumed() -> None:
    here, card = hardware.machine(), CARDS["cpu"]
    assert speed(card, [], 4).flops is None
    measured = speed(card, [trained(4, "cpu", here, tokens_per_s=100.0)], 4)
    assert measured.flops == 100 * GptSize.of(derive(deep("depth=4")).pretrain.gpt, 32_768).flops_per_token
    assert speed(card, [trained(4, "cpu", "another machine", tokens_per_s=100.0)], 4).flops is None
    forecast = pretraining(derive(deep("depth=4")).pretrain, 32_768, Machine(card, measured))
    assert forecast.seconds
    assert (forecast.gpu_bytes, forecast.rows) == (None, None)


def test_time_is_work_over_speed() -> None:
    pretrain, card = derive(deep("depth=12")).pretrain, CARDS["h100"]
    once = pretraining(pretrain, 32_768, Machine(card, Speed(4e14, ""))).seconds or 0
    twice = pretraining(pretrain, 32_768, Machine(card, Speed(2e14, ""))).seconds or 0
    work = 759_696_048 * 2205 * 524_288  # FLOPs a token, steps, tokens a step
    assert work / 4e14 < once < 1.2 * work / 4e14
    assert twice - once == pytest.approx(once, rel=0.1)
    four = pretraining(pretrain, 32_768, Machine(card, Speed(4e14, ""), gpus=4))
    assert (four.seconds or 0) < once / 3
    fixed = pretraining(pretrain, 32_768, Machine(card, Speed(4e14, ""), microbatch_rows=8))
    assert fixed.rows == 8


def test_small_sets_are_answered_sooner() -> None:
    shape, machine = SHAPES[0][0], Machine(CARDS["5090"], Speed(7e13, ""))
    recipe = ChatEvaluationRecipe(max_answer_tokens=50)
    all_of_them = chat_evaluation(recipe, shape, 2048, deep().sets, machine)
    few = chat_evaluation(recipe, shape, 2048, MiniatureSetsRecipe(test_rows=10), machine)
    assert (few.seconds or 0) < (all_of_them.seconds or 0) / 50


# -- the plan -----------------------------------------------------------------------------------------


class NoCode:
    """Code that never changes: what stages compute is not asked here."""

    def fingerprint(self, entrypoint: str) -> dict[str, str]:
        return {entrypoint: "same"}


def planned(store: Store, recipe: BaseClimbMixRecipe) -> list[Step]:
    planner = Planner(store, Identifier(NoCode(), recipe.seed, lambda package: "1.0"))  # type: ignore[arg-type]
    recipes.RECIPES["base-d12"].flow(planner, derive(recipe))
    return planner.steps


def put(store: Store, manifest: Manifest) -> None:
    directory = store.directory(manifest.stage, manifest.key)
    directory.mkdir(parents=True)
    manifest.write(directory)


def test_a_plan_for_a_card_says_hours_memory_and_disk_and_on_what_grounds(tmp_path: Path) -> None:
    store = Store(tmp_path)
    steps = planned(store, deep("depth=20"))
    forecasts = foresee(steps, "5090", store, Runtime())
    rows = {row["stage"]: row for row in plan_json(steps, forecasts)}
    assert set(forecasts) == set(rows)
    for stage in ("pretrain_gpt", "tune_chat", "evaluate_base", "evaluate_chat"):
        assert rows[stage]["predicted_s"] > 60
        assert 0 < rows[stage]["predicted_gpu_bytes"] < 32 * GIB
        assert "MFU 35%, assumed" in rows[stage]["assumed"]
    assert rows["pretrain_gpt"]["predicted_s"] > 10 * rows["tune_chat"]["predicted_s"]
    assert (
        rows["fetch_climbmix"]["predicted_bytes"]
        == (derive(deep("depth=20")).climbmix.num_shards + 1) * 10**8
    )
    assert rows["fetch_climbmix"]["predicted_s"] is None  # that is up to the network
    assert rows["train_tokenizer"]["predicted_s"] is None  # and that to the processor
    cells = {row[1]: row[4] for row in plan_rows(steps, forecasts)}
    assert "8 rows at once" in cells["pretrain_gpt"]
    assert "pretrain_gpt: MFU 35%, assumed" in plan_summary(steps, forecasts)
    assert [set(row) for row in plan_json(steps)] == [set(step.to_json()) for step in steps]


def test_an_earlier_run_wins_on_the_same_kind_of_machine(tmp_path: Path) -> None:
    store, name = Store(tmp_path), "NVIDIA GeForce RTX 4090"
    put(store, trained(12, name, mfu=0.5))
    steps = planned(store, deep("depth=12"))
    here, there = (foresee(steps, card, store, Runtime())["pretrain_gpt"] for card in ("4090", "5090"))
    assert (here.seconds, here.assumed) == (1234.0, ("as long as before",))
    assert (there.seconds or 0) > 3600
    deeper = planned(store, deep("depth=20"))
    forecast = foresee(deeper, "4090", store, Runtime())["pretrain_gpt"]
    assert (forecast.seconds or 0) > 3600
    assert forecast.assumed[0] == "MFU 50%, measured at depth 12"
    chat = foresee(steps, "4090", store, Runtime())["tune_chat"]
    assert chat.assumed[0] == "MFU 50%, measured at depth 12"


def test_scores_of_a_smaller_model_say_nothing_of_a_larger_one(tmp_path: Path) -> None:
    store, name = Store(tmp_path), "NVIDIA GeForce RTX 4090"
    small = trained(12, name, mfu=0.5)
    put(store, small)
    scored = dataclasses.replace(
        small,
        stage="evaluate_base",
        components=small.components
        | {"recipe": identity(deep().evaluation), "inputs": {"gpt": small.digest}},
        facts={"val_bpb": 1.0, "core": 0.1},
        metrics={},
    )
    recipe = dataclasses.replace(deep().evaluation, dtype="auto")
    assert identity(recipe) == scored.components["recipe"]
    for depth, expected in ((12, True), (20, False)):
        steps = planned(store, deep(f"depth={depth}"))
        known = [
            dataclasses.replace(step, manifest=scored) if step.stage.name == "evaluate_base" else step
            for step in steps
        ]
        forecast = foresee(known, "4090", store, Runtime())["evaluate_base"]
        assert (forecast.seconds == 1234.0) is expected


def test_on_this_processor_only_what_was_measured_is_foreseen(tmp_path: Path) -> None:
    store = Store(tmp_path)
    steps = planned(store, deep("depth=4", "tokens_per_parameter=1"))
    before = foresee(steps, "cpu", store, Runtime())
    assert all(forecast.seconds is None for forecast in before.values())
    assert "not known" in plan_summary(steps, before)
    put(store, trained(4, "cpu", hardware.machine(), tokens_per_s=1e4))
    after = foresee(steps, "cpu", store, Runtime())["pretrain_gpt"]
    pretrain = derive(deep("depth=4", "tokens_per_parameter=1")).pretrain
    assert (after.seconds or 0) > pretrain.steps * pretrain.batch_tokens / 1e4


def test_the_table_in_the_readme_is_what_the_code_says() -> None:
    assert table() in (ROOT / "infra" / "README.md").read_text(), f"put this there:\n\n{table()}"


def test_a_tokenizer_of_bytes_has_its_own_vocabulary() -> None:
    recipe = dataclasses.replace(deep("depth=4"), tokenizer=TokenizerRecipe(kind="bytes"))
    assert derive(recipe).pretrain.steps < derive(deep("depth=4")).pretrain.steps  # its head is small
