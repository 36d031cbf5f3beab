"""Several ranks on one machine, over gloo: together they do what one process does, and take over from it."""

from __future__ import annotations

import json
import multiprocessing
import os
import shutil
import signal
import socket
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from omni_model import hardware
from omni_model.model.gpt import GPT, GPTConfig
from omni_model.training import checkpoint
from omni_model.training.loop import Objective, train
from omni_model.training.loss_scale import LossScale
from omni_model.training.optim import MuonAdamW, parameter_groups, plain_adamw
from omni_model.training.ranks import ALONE, Ranks

STEPS, HALF = 6, 3


# -- what the ranks learn -------------------------------------------------------------------------------


class Shared(Objective):
    """Four rows a step, divided among the ranks; an exam that each rank would mark differently."""

    def __init__(self, ranks: Ranks, *, muon: bool = True, deadly_step: int = -1) -> None:
        shape = {
            "sequence_len": 32,
            "vocab_size": 50,
            "n_layer": 3,
            "n_head": 2,
            "n_kv_head": 1,
            "n_embd": 48,
        }
        self.gpt, self.ranks, self.deadly_step = GPT(GPTConfig(**shape)), ranks, deadly_step
        self.marks: list[float] = []
        # At the start some gradients are zero but for rounding, which AdamW would blow up to whole steps.
        with torch.no_grad():
            self.gpt.lm_head.weight.mul_(100)
            for block in self.gpt.transformer["h"]:
                for matrix in (block.attn.c_proj.weight, block.mlp.c_proj.weight):
                    matrix.normal_(0.0, 0.1, generator=torch.Generator().manual_seed(matrix.numel()))
        if muon:
            groups = parameter_groups(self.gpt, batch_scale=0.1)
            self.optimizer: torch.optim.Optimizer = MuonAdamW(groups, ranks=ranks)
        else:
            self.optimizer, self.clip_norm = plain_adamw(self.gpt.parameters(), 1e-3), 0.5

    def tensors(self) -> Mapping[str, Tensor]:
        return dict(self.gpt.named_parameters())

    def set_schedule(self, step: int) -> None:
        pass

    def loss(self, step: int) -> Tensor:
        if step == self.deadly_step and self.ranks.rank == self.ranks.world - 1:
            os.kill(os.getpid(), signal.SIGKILL)
        ids = torch.randint(50, (4, 17), generator=torch.Generator().manual_seed(step))
        own = ids[self.ranks.part(4)]
        return self.gpt(own[:, :-1], own[:, 1:])

    def evaluate(self, step: int) -> dict[str, float]:
        self.marks.append(float(10 * step + self.ranks.rank))
        return {"mark": self.marks[-1]}

    def state(self) -> dict[str, Any]:
        return {"marks": self.marks}

    def restore(self, state: dict[str, Any]) -> None:
        self.marks = list(state["marks"])


class Lines:
    def __init__(self) -> None:
        self.lines: list[dict[str, float]] = []

    def log(self, step: int, total: int, **values: float) -> None:
        self.lines.append({"step": step, **values})


def learn(ranks: Ranks, partial: Path, steps: int = STEPS, **options: Any) -> tuple[Shared, Lines]:
    objective, lines = Shared(ranks, **options), Lines()
    every = {"checkpoint_every_s": 0.0} if options.get("deadly_step", -1) >= 0 else {}
    train(objective, steps=steps, partial=partial, metrics=lines, ranks=ranks, evaluate_every=2, **every)
    return objective, lines


# -- running ranks --------------------------------------------------------------------------------------


def enter(task: Callable[[Ranks, Path], None], rank: int, world: int, port: int, place: Path) -> None:
    torch.set_num_threads(1)
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world))
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    joined = hardware.join_ranks()
    assert joined == (rank, world)
    task(Ranks(*joined), place)


def run_ranks(world: int, task: Callable[[Ranks, Path], None], place: Path) -> list[int | None]:
    """The exit codes of `world` processes that run `task`, joined as torchrun would join them."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__, "torch._dynamo"])  # the latter for torch.optim: it is slow
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    ranks = [context.Process(target=enter, args=(task, rank, world, port, place)) for rank in range(world)]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join(timeout=120)
        if process.is_alive():
            process.kill()
            process.join()
    return [process.exitcode for process in ranks]


# -- what the ranks do ----------------------------------------------------------------------------------


def two_ranks_learn(ranks: Ranks, place: Path) -> None:
    straight, lines = learn(ranks, place / "two")
    learn(ranks, place / "two_halves", HALF)
    learn(ranks, place / "from_one")
    learn(ranks, place / "two_adamw", muon=False)
    assert straight.marks == [20.0, 40.0, 60.0]  # rank 0's, on both
    told = {"lines": lines.lines, "state_bytes": state_bytes(straight.optimizer)}
    (place / f"rank{ranks.rank}.json").write_text(json.dumps(told))


def two_ranks_die(ranks: Ranks, place: Path) -> None:
    learn(ranks, place / "killed", deadly_step=4)


def two_ranks_continue(ranks: Ranks, place: Path) -> None:
    learn(ranks, place / "two_halves")
    learn(ranks, place / "killed")


def four_ranks_continue(ranks: Ranks, place: Path) -> None:
    learn(ranks, place / "from_two_to_four")


def state_bytes(optimizer: torch.optim.Optimizer) -> int:
    tensors = [t for entry in optimizer.state.values() for t in entry.values() if isinstance(t, Tensor)]
    return sum(t.numel() * t.element_size() for t in tensors)


def agree_and_average(ranks: Ranks, place: Path) -> None:
    """The collectives, one by one, on two ranks."""
    me = ranks.rank
    assert ranks.agree({"rank": me, "words": ["é", None]}) == {"rank": 0, "words": ["é", None]}
    assert ranks.average(torch.tensor([1.0 + me]))().tolist() == [1.5]
    assert ranks.average_part(torch.tensor([1.0, 2.0]) * (1 + me))().tolist() == [1.5 + 1.5 * me]
    assert ranks.spread(torch.full((2, 2), float(me)))().tolist() == [[0.0, 0.0], [1.0, 1.0]]
    assert ranks.on_any(torch.tensor([float(me)]))
    assert not ranks.on_any(torch.zeros(1))
    for rows in (1, 3, 4):
        part = torch.arange(float(rows))[ranks.part(rows)]
        found = ranks.collect(part, rows)
        assert (found is None) if me else (found is not None and found.tolist() == list(range(rows)))
    narrow = torch.full((4,), 1.0 + me, dtype=torch.bfloat16)
    assert ranks.average_part(narrow)().tolist() == [1.5, 1.5]
    # One rank's overflow is everyone's.
    p, scale = nn.Parameter(torch.zeros(2)), LossScale(8.0)
    p.grad = torch.tensor([8.0, float("inf") if me else 8.0])
    assert not scale.unscale([p], ranks)
    assert scale == LossScale(4.0)
    # What only rank 0 decides.
    objective = Shared(ranks)
    objective.finished = lambda: me == 0  # type: ignore[method-assign]
    assert train(objective, steps=3, partial=place / "none", metrics=Lines(), ranks=ranks).steps == 0
    # A rank that finds another checkpoint than rank 0, here none, does not go on.
    if me:
        train(Shared(ALONE), steps=1, partial=place / "apart", metrics=Lines())
        with pytest.raises(RuntimeError, match="Rank 1 found checkpoint step-00000001 in"):
            train(Shared(ranks), steps=2, partial=place / "apart", metrics=Lines(), ranks=ranks)
    else:
        ranks.agree(None)


# -- the tests ------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One process's runs, and those of two ranks beside them."""
    place = tmp_path_factory.mktemp("ranks")
    learn(ALONE, place / "one")
    learn(ALONE, place / "one_adamw", muon=False)
    learn(ALONE, place / "from_one", HALF)
    assert run_ranks(2, two_ranks_learn, place) == [0, 0]
    for name in ("from_two_to_one", "from_two_to_four"):
        shutil.copytree(place / "two_halves", place / name)
    return place


def last(partial: Path) -> Path:
    found = checkpoint.latest(partial)
    assert found is not None
    assert found.name == f"step-{STEPS:08d}"
    assert [path.name for path in partial.iterdir()] == [found.name]
    return found


def assert_same_run(left: Path, right: Path) -> None:
    """Weights, optimizer state and losses within rounding; the same names, steps and scalars."""
    for name in (checkpoint.MODEL_FILE, checkpoint.OPTIMIZER_FILE):
        ours, theirs = load_file(last(left) / name), load_file(last(right) / name)
        assert ours.keys() == theirs.keys()
        for key, value in ours.items():
            weights = name == checkpoint.MODEL_FILE  # they move by some tenths, and may end near zero
            # Scalars move by more, and on some processors differ by as much more.
            rtol, size = (1e-5, 0.2 if value.numel() > 1 else 0.5) if weights else (5e-5, 0.0)
            atol = rtol * max(size, value.abs().max().item())
            torch.testing.assert_close(value, theirs[key], rtol=rtol, atol=atol)
    ours, theirs = (json.loads((last(each) / checkpoint.STATE_FILE).read_text()) for each in (left, right))
    assert ours["curve"] == pytest.approx(theirs["curve"], abs=2e-6)
    assert {**ours, "curve": []} == {**theirs, "curve": []}


def assert_same_bytes(left: Path, right: Path) -> None:
    for name in (checkpoint.MODEL_FILE, checkpoint.OPTIMIZER_FILE, checkpoint.STATE_FILE):
        assert (last(left) / name).read_bytes() == (last(right) / name).read_bytes(), name


def test_two_ranks_with_half_the_batch_each_equal_one_process(place: Path) -> None:
    assert_same_run(place / "one", place / "two")
    assert_same_run(place / "one_adamw", place / "two_adamw")  # with a bound on the averaged gradient's norm


def test_rank_0_alone_logs_the_mean_loss_and_each_keeps_its_part_of_the_state(place: Path) -> None:
    first, second = (json.loads((place / f"rank{rank}.json").read_text()) for rank in (0, 1))
    assert second["lines"] == []
    curve = json.loads((last(place / "one") / checkpoint.STATE_FILE).read_text())["curve"]
    losses = [line["loss"] for line in first["lines"] if "loss" in line]
    assert losses == pytest.approx([sum(curve[step : step + 2]) / 2 for step in (0, 2, 4)], abs=1e-5)
    assert [line["mark"] for line in first["lines"] if "mark" in line] == [20.0, 40.0, 60.0]
    whole = state_bytes(learn(ALONE, place / "measured", 1)[0].optimizer)
    held = [told["state_bytes"] for told in (first, second)]
    assert whole < sum(held) < 1.02 * whole  # only the small parameters' state is held twice
    assert max(held) < 0.62 * whole  # of three matrices one rank has two


def test_a_checkpoint_continues_on_any_number_of_ranks(place: Path) -> None:
    learn(ALONE, place / "from_two_to_one")
    assert run_ranks(4, four_ranks_continue, place) == [0, 0, 0, 0]
    for name in ("from_one", "from_two_to_one", "from_two_to_four"):
        assert_same_run(place / "one", place / name)


def test_two_ranks_killed_or_stopped_go_on_bit_by_bit(place: Path) -> None:
    exits = run_ranks(2, two_ranks_die, place)
    assert exits[1] == -signal.SIGKILL
    assert exits[0] not in (0, None)
    assert checkpoint.latest(place / "killed") == place / "killed" / "step-00000004"
    assert run_ranks(2, two_ranks_continue, place) == [0, 0]
    for name in ("killed", "two_halves"):
        assert_same_bytes(place / "two", place / name)


def test_the_collectives(tmp_path: Path) -> None:
    assert run_ranks(2, agree_and_average, tmp_path) == [0, 0]


def test_without_torchrun_a_process_is_alone() -> None:
    assert Ranks(*hardware.join_ranks()) == ALONE
