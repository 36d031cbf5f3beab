"""Chat: conversations as ids, packed rows that always teach, tuning that resumes bit by bit, the terminal."""

import contextlib
import dataclasses
import fcntl
import io
import itertools
import json
import multiprocessing
import os
import pty
import select
import socket
import sys
import termios
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import torch

from omni_model import cli
from omni_model.artifacts import (
    Artifact,
    Conversations,
    GptCheckpoint,
    TextCorpus,
    TokenizerFiles,
    hash_payload,
)
from omni_model.config import BadInput, ChatRecipe, GptShape, LearningRates, Runtime
from omni_model.model.gpt import GPT
from omni_model.model.weights import load_gpt, new_gpt, save_gpt
from omni_model.serving.engine import Engine
from omni_model.serving.sampling import Sampling
from omni_model.serving.segments import Text
from omni_model.serving.talk import Talk, spoken
from omni_model.storage import Workspace
from omni_model.telemetry import Metrics
from omni_model.text.conversation import render, render_conversation, render_for_completion, render_prompt
from omni_model.text.corpus import write_shard
from omni_model.text.tokenizer import BpeTokenizer, ByteTokenizer, Tokenizer, train_bpe
from omni_model.training import chat as chat_module
from omni_model.training.chat import (
    PROMPTS,
    ChatTuning,
    Replay,
    decode,
    num_replayed,
    tokens_in_pretraining,
    tune_chat,
)
from omni_model.training.chat_rows import (
    CONVERSATIONS_FILE,
    ChatRows,
    Rendered,
    pack_whole,
    reading_order,
    render_all,
)
from omni_model.training.optim import MuonAdamW, parameter_groups
from omni_model.training.ranks import ALONE, Ranks
from omni_model.training.setup import Ready

GOLDEN = json.loads((Path(__file__).parent / "golden" / "conversations.json").read_text())

ANSWER_TOKENS = 6


# --- rendering -----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def bpe() -> Tokenizer:
    return BpeTokenizer(train_bpe(GOLDEN["texts"], GOLDEN["vocab_size"]))


@pytest.mark.parametrize("case", GOLDEN["conversations"], ids=lambda case: case["name"])
def test_conversations_render_as_in_nanochat(bpe: Tokenizer, case: dict[str, Any]) -> None:
    assert render_conversation(bpe, case["messages"]) == (case["ids"], case["mask"])
    for cut, expected in case["cut"].items():
        assert list(render_conversation(bpe, case["messages"], int(cut))) == expected
    if "completion" in case:
        assert render_for_completion(bpe, case["messages"]) == case["completion"]


def test_a_question_without_an_answer_is_completed_as_if_its_answer_were_dropped() -> None:
    tokenizer = ByteTokenizer()
    asked = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    asked += [{"role": "user", "content": "c"}]
    answered = [*asked, {"role": "assistant", "content": "d"}]
    assert render_for_completion(tokenizer, asked) == render_for_completion(tokenizer, answered)
    assert render_prompt(tokenizer, "c", [("a", "b")]) == render_for_completion(tokenizer, asked)
    assert render(tokenizer, [("a", "b")]) == render_conversation(tokenizer, asked[:2])


@pytest.mark.parametrize(
    ("messages", "sentence"),
    [
        ([{"role": "assistant", "content": "x"}], "message 1 of a conversation is from 'assistant'"),
        ([{"role": "user", "content": "x"}] * 2, "message 2 .* must be from 'assistant'"),
        ([{"role": "system", "content": "x"}], "system message must be followed"),
        ([{"role": "user", "content": ["x"]}], "a part of a question must be a text"),
        ([{"role": "user", "content": 3}], "must say a text"),
        ([{"content": "x"}], "is from None"),
        (
            [{"role": "user", "content": "x"}, {"role": "assistant", "content": [{"type": "image"}]}],
            "of type text, python, python_output",
        ),
    ],
)
def test_what_is_no_conversation_is_refused_in_a_sentence(messages: list[Any], sentence: str) -> None:
    with pytest.raises(BadInput, match=sentence):
        render_conversation(ByteTokenizer(), messages)


# --- a small world -------------------------------------------------------------------------------------

SHAPE = GptShape(n_layer=2, n_embd=32, n_head=2, n_kv_head=2, sequence_len=64)
RATES = LearningRates(
    matrix=0.2, embedding=3.0, unembedding=0.08, scalar=0.5
)  # for a batch 1000 times smaller
RECIPE = ChatRecipe(batch_tokens=512, epochs=0.7, replay_share=0.2, rates=RATES, dtype="float32")


def little_conversations(count: int) -> list[list[dict[str, Any]]]:
    """Sums with the calculator, words to be repeated, and now and then one that is too long."""
    made = []
    for number in range(count):
        word = ("dog", "bell", "rain")[number % 3]
        asked, said = f"Say {word} {number % 40}.", [{"type": "text", "text": f"{word} {number % 40}"}]
        if number % 4 == 1:
            said.append({"type": "python", "text": "1+2"})
            said.append({"type": "python_output", "text": "3"})
        messages = [{"role": "user", "content": asked}, {"role": "assistant", "content": said}]
        if number % 7 == 2:
            messages = [{"role": "system", "content": "Be brief."}, *messages]
        if number % 11 == 5:
            messages += [
                {"role": "user", "content": "And more? " * 9},
                {"role": "assistant", "content": "No."},
            ]
        if number % 13 == 4:
            messages[-1] = {"role": "assistant", "content": "word after word " * 12}
        made.append(messages)
    return made


def write_conversations(directory: Path, conversations: Sequence[Any], group: int = 40) -> Conversations:
    (directory / "out").mkdir(parents=True)
    texts = [each if isinstance(each, str) else json.dumps(each) for each in conversations]
    table = pyarrow.table({"messages": pyarrow.array(texts, pyarrow.string())})
    path = directory / "out" / CONVERSATIONS_FILE
    pyarrow.parquet.write_table(table, path, row_group_size=group)
    return Conversations("build_conversations", "k", str(directory), "d", len(texts))


def learned_gpt(shape: GptShape = SHAPE) -> GPT:
    """A GPT as after some pretraining: at the very start some gradients are zero but for rounding."""
    gpt = new_gpt(shape, 257, 3)
    with torch.no_grad():
        gpt.lm_head.weight.mul_(100)
        for block in gpt.transformer["h"]:
            for matrix in (block.attn.c_proj.weight, block.mlp.c_proj.weight):
                matrix.normal_(0.0, 0.1, generator=torch.Generator().manual_seed(matrix.numel()))
    return gpt


@dataclasses.dataclass(frozen=True)
class World:
    root: Path
    text: TextCorpus
    tokenizer: TokenizerFiles
    gpt: GptCheckpoint
    conversations: Conversations

    @property
    def inputs(self) -> tuple[Artifact, ...]:
        return self.gpt, self.tokenizer, self.conversations, self.text


def described(root: Path) -> World:
    """The handles on what `world` makes."""
    places = {name: str(root / name) for name in ("text", "tokenizer", "gpt", "said")}
    return World(
        root,
        TextCorpus("write_corpus", "k", places["text"], "d", 600, 1),
        TokenizerFiles("train_tokenizer", "k", places["tokenizer"], "d", 257),
        GptCheckpoint("pretrain_gpt", "k", places["gpt"], "d", learned_gpt().num_params(), 1, 32, 257),
        Conversations("build_conversations", "k", places["said"], "d", 120),
    )


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    root = tmp_path_factory.mktemp("chat")
    torch.set_num_threads(1)
    for name in ("text", "tokenizer", "gpt"):
        (root / name / "out").mkdir(parents=True)
    documents = [f"A {('dog', 'bell')[n % 2]} is heard in room {n}. It is loud." for n in range(300)]
    for split in ("train", "validation"):
        write_shard(root / "text" / "out" / f"{split}-00000.parquet", {"text": documents})
    (root / "tokenizer" / "out" / "tokenizer.json").write_text('{"kind":"bytes"}\n')
    save_gpt(learned_gpt(), root / "gpt" / "out")
    write_conversations(root / "said", little_conversations(120))
    return described(root)


class Killed(Exception):
    """Stands for SIGKILL."""


class KillingMetrics(Metrics):
    """Ends the stage's work when the loss of a step at or after `kill_at` is told."""

    def __init__(self, path: Path, kill_at: int) -> None:
        super().__init__(path)
        self._kill_at = kill_at

    def log(self, step: int, total: int, **values: float) -> None:
        if "loss" in values and step >= self._kill_at:
            raise Killed


def tuned(
    world: World,
    directory: Path,
    recipe: ChatRecipe = RECIPE,
    *,
    kill_at: int = 0,
    runtime: Runtime | None = None,
    metrics: str = "metrics.jsonl",
    **instead: Any,
) -> Any:
    """Run the stage and return its handle; the facts must be the handle's."""
    (directory / "out").mkdir(parents=True, exist_ok=True)
    path = directory / metrics
    work = Workspace(directory, 5, KillingMetrics(path, kill_at) if kill_at else Metrics(path))
    inputs = dataclasses.replace(world, **instead).inputs
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(chat_module, "ANSWER_TOKENS", ANSWER_TOKENS)
        patch.setattr(chat_module, "EVALUATIONS", 2)
        facts = tune_chat(recipe, *inputs, work=work, runtime=runtime or Runtime())  # type: ignore[arg-type]
    assert set(facts) == GptCheckpoint.fact_names()
    (directory / "summary.json").write_text(json.dumps(work.metrics.summaries))
    return GptCheckpoint("tune_chat", "k", str(directory), "d", **facts)  # type: ignore[arg-type]


def payload(handle: Artifact) -> dict[str, str]:
    return {file.path: file.sha256 for file in hash_payload(handle.out)}


def told(handle: Artifact, name: str) -> Any:
    return json.loads((handle.out / name).read_text())


@pytest.fixture(scope="module")
def chat(world: World) -> Any:
    return tuned(world, world.root / "chat")


# --- rows ----------------------------------------------------------------------------------------------


def test_packing_takes_the_longest_that_fits_and_never_cuts() -> None:
    lengths = [5, 9, 3, 10, 3, 2, 9]
    assert pack_whole(range(7), lengths, 10) == [[3], [1], [6], [0, 2, 5], [4]]
    many = np.random.default_rng(0).integers(2, 60, size=2000).tolist()
    rows = pack_whole(range(2000), many, 64)
    assert sorted(number for row in rows for number in row) == list(range(2000))
    assert all(0 < sum(many[number] for number in row) <= 64 for row in rows)
    assert sum(many) / (64 * len(rows)) > 0.95


def test_a_conversation_waits_among_a_hundred_at_most() -> None:
    lengths = [9] * 100 + [10]  # the longest is the last, and the hundred before it are all there is to see
    assert [row for row in pack_whole(range(101), lengths, 10)][:2] == [[0], [100]]


def rendered(tmp_path: Path, conversations: Sequence[Any], max_tokens: int, **options: Any) -> Rendered:
    (tmp_path / "tokenizer").mkdir(parents=True, exist_ok=True)
    (tmp_path / "tokenizer" / "tokenizer.json").write_text('{"kind":"bytes"}\n')
    said = write_conversations(tmp_path / "said", conversations, **options)
    return render_all(said.out, tmp_path / "tokenizer", max_tokens, tmp_path / "place", 1, lambda count: None)


def test_what_is_kept_on_disk_is_the_rendering(tmp_path: Path) -> None:
    conversations = little_conversations(25)
    kept, tokenizer = rendered(tmp_path, conversations, 65, group=10), ByteTokenizer()
    starts = kept.starts()
    for number, messages in enumerate(conversations):
        ids, mask = render_conversation(tokenizer, messages, 65)
        coded = kept.tokens[starts[number] : starts[number] + kept.lengths[number]]
        assert [each if each >= 0 else ~each for each in coded.tolist()] == ids
        assert [int(each >= 0) for each in coded] == mask
        assert kept.learned[number] == sum(mask)


def test_workers_and_a_second_attempt_change_no_byte(tmp_path: Path, world: World) -> None:
    def files(place: Path, num_workers: int) -> list[bytes]:
        render_all(world.conversations.out, world.tokenizer.out, 65, place, num_workers, lambda count: None)
        return [path.read_bytes() for path in sorted(place.iterdir())]

    alone = files(tmp_path / "one", 1)
    assert len(alone) == 2
    assert files(tmp_path / "two", 2) == alone

    def die(count: int) -> None:
        raise Killed

    with pytest.raises(Killed):
        render_all(world.conversations.out, world.tokenizer.out, 65, tmp_path / "killed", 1, die)
    assert files(tmp_path / "killed", 1) == alone


def test_every_row_teaches_whatever_the_lengths(tmp_path: Path) -> None:
    """All too long; users who never stop; nobody who answers; an answer that begins where the row ends."""
    long_answer = [{"role": "user", "content": "x"}, {"role": "assistant", "content": "y" * 300}]
    long_question = [{"role": "user", "content": "x" * 300}, {"role": "assistant", "content": "y"}]
    no_answer = [{"role": "user", "content": "x"}]
    # Beside the letters there are <|bos|>, <|user_start|>, <|user_end|> and <|assistant_start|>.
    edge = [
        [{"role": "user", "content": "x" * size}, {"role": "assistant", "content": "ab"}] for size in (60, 61)
    ]
    tail = [*long_answer[:1], {"role": "assistant", "content": "y"}, {"role": "user", "content": "x" * 300}]
    conversations = [long_question, long_answer, no_answer, *edge, tail] * 9
    kept = rendered(tmp_path, conversations, 65)
    assert kept.lengths.max() == 65
    assert kept.learned[:6].tolist() == [0, 60, 0, 1, 0, 2]
    taught, held_out = kept.divided()
    assert len(taught) + len(held_out) == 27
    assert not set(kept.hashes[taught]) & set(kept.hashes[held_out])
    rows = ChatRows(kept, reading_order(taught, 3.0, 0), 65, 256)
    coded = rows.read(range(len(rows)))
    per_row = (coded[:, 1:] >= 0).sum(axis=1)
    assert per_row.min() >= 1
    assert rows.num_targets(range(len(rows))) == per_row.sum() == 3 * kept.learned[taught].sum()


def test_conversations_without_an_answer_are_refused(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="of 4 conversations too few have an answer"):
        rendered(tmp_path, [[{"role": "user", "content": "x"}]] * 4, 65).divided()
    answered = [{"role": "user", "content": "x"}, {"role": "assistant", "content": "y"}]
    with pytest.raises(BadInput, match="there must be two different ones"):
        rendered(tmp_path / "same", [answered] * 4, 65).divided()
    with pytest.raises(BadInput, match="row group 0 holds '{\"rol.*, which is no conversation"):
        rendered(tmp_path / "broken", ['{"role": 1'], 65)
    with pytest.raises(BadInput, match="holds no conversation"):
        rendered(tmp_path / "empty", [], 65)


def test_a_second_epoch_reads_all_again_in_another_order() -> None:
    numbers = np.arange(50)
    order = reading_order(numbers, 2.5, 1)
    assert order[:50] == list(range(50))
    assert sorted(order[50:100]) == list(range(50)) != order[50:100]
    assert len(set(order[100:])) == 25
    assert reading_order(numbers, 0.2, 1) == list(range(10))


def test_targets_follow_the_mask() -> None:
    coded = torch.tensor([[~256, ~5, 7, 0, ~0, 8, ~256, ~256]])
    ids, targets = decode(coded)
    assert ids.tolist() == [[256, 5, 7, 0, 0, 8, 256]]
    assert targets.tolist() == [[-1, 7, 0, -1, 8, -1, -1]]


# --- tuning --------------------------------------------------------------------------------------------


def test_the_payload_tells_all(world: World, chat: Any) -> None:
    names = {
        "config.json",
        "curve.json",
        "model.safetensors",
        "samples.json",
        "training.json",
        "validation.json",
    }
    assert payload(chat).keys() == names
    assert load_gpt(chat.out).num_params() == chat.num_parameters == world.gpt.num_parameters
    told_of = told(chat, "training.json")
    assert told_of["batch_tokens"] == 512
    assert told_of["steps"] == chat.steps > 5
    assert told_of["tokens"] == 512 * chat.steps
    assert told_of["dtype"] == "float32"
    losses = [each["loss"] for each in told(chat, "validation.json")]
    assert losses[-1] < 0.8 * losses[0]
    assert told(chat, "validation.json")[-1]["step"] == chat.steps
    asked = [each["prompt"] for each in told(chat, "samples.json") if each["step"] == chat.steps]
    assert asked == list(PROMPTS)
    summary = json.loads((Path(chat.uri) / "summary.json").read_text())
    assert {"loss", "val_loss", "tokens_per_s", "skipped"} <= summary.keys()
    assert summary["val_loss"] == losses[-1]
    curve = [each["loss"] for each in told(chat, "curve.json")]
    assert curve[-1] < 0.8 * curve[0]


@pytest.mark.parametrize("kill_at", [1, 4, 7])
def test_killed_and_resumed_is_undisturbed(world: World, chat: Any, tmp_path: Path, kill_at: int) -> None:
    often = Runtime(checkpoint_every_s=1e-9)
    with pytest.raises(Killed):
        tuned(world, tmp_path / "killed", kill_at=kill_at, runtime=often)
    assert payload(tuned(world, tmp_path / "killed", runtime=often)) == payload(chat)


def test_microbatches_change_nothing_but_rounding(world: World, chat: Any, tmp_path: Path) -> None:
    same_learning(chat, tuned(world, tmp_path / "small", runtime=Runtime(microbatch_rows=1)))


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_narrow_dtypes_learn_too(world: World, chat: Any, tmp_path: Path, dtype: str) -> None:
    narrow = tuned(world, tmp_path, dataclasses.replace(RECIPE, dtype=dtype))
    assert told(narrow, "training.json")["dtype"] == dtype
    ours, theirs = ([each["loss"] for each in told(handle, "validation.json")] for handle in (narrow, chat))
    assert ours == pytest.approx(theirs, rel=0.05)
    assert load_gpt(narrow.out).num_params() == chat.num_parameters


def same_learning(left: Artifact, right: Artifact) -> None:
    """Curves and held-out losses, which drift apart as rounding grows."""
    for name in ("curve.json", "validation.json"):
        ours, theirs = ([each["loss"] for each in told(handle, name)] for handle in (left, right))
        assert ours[0] == pytest.approx(theirs[0], abs=2e-5)
        assert ours == pytest.approx(theirs, abs=2e-3)


def fork_server() -> Any:
    """Where processes begin with torch already imported."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__, "torch._dynamo"])  # the latter for torch.optim: it is slow
    return context


def one_of_two(rank: int, port: int, root: Path) -> None:
    """What torchrun would start: the stage as one of two ranks, in the directory of both."""
    torch.set_num_threads(1)
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2", LOCAL_WORLD_SIZE="2")
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    tuned(
        described(root),
        root / "two",
        runtime=Runtime(gpus=2),
        metrics="metrics.jsonl" if rank == 0 else "rest",
    )


def test_two_ranks_learn_what_one_process_learns(world: World, chat: Any) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    ranks = [fork_server().Process(target=one_of_two, args=(rank, port, world.root)) for rank in range(2)]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join(timeout=120)
        process.kill()
    assert [process.exitcode for process in ranks] == [0, 0]
    two = dataclasses.replace(chat, uri=str(world.root / "two"))
    assert payload(two).keys() == payload(chat).keys()
    same_learning(chat, two)


def objective(world: World, place: Path, ranks: Ranks = ALONE, recipe: ChatRecipe = RECIPE) -> ChatTuning:
    """What the stage trains, over 8 rows a step, 2 of them text."""
    kept = render_all(world.conversations.out, world.tokenizer.out, 65, place, 1, lambda count: None)
    taught, held_out = kept.divided()
    gpt = load_gpt(world.gpt.out)
    ready = Ready(gpt, MuonAdamW(parameter_groups(gpt)), None, ranks, torch.device("cpu"))
    rows = [ChatRows(kept, numbers.tolist(), 65, 256) for numbers in (taught, held_out)]
    replay = Replay(world.text.out, world.tokenizer.out, 65, 2)
    return ChatTuning(recipe, ready, ByteTokenizer(), *rows, replay, 8, 4)


def test_ranks_share_the_rows_of_a_single_process(world: World, tmp_path: Path) -> None:
    steps = 3
    with contextlib.ExitStack() as reading:

        def read(ranks: Ranks) -> list[tuple[np.ndarray, int]]:
            reader = objective(world, tmp_path, ranks)
            reading.enter_context(reader.replay)
            return [reader.batch(step) for step in range(steps)]

        alone, world_of_two = read(ALONE), [read(Ranks(rank, 2)) for rank in range(2)]
    for step in range(steps):
        rows, total = alone[step]
        assert rows.shape == (8, 65)
        assert total == (rows[:, 1:] >= 0).sum()
        assert (rows[-2:] >= 0).all()  # of text all is learned
        assert np.array_equal(rows, np.concatenate([part[step][0] for part in world_of_two]))
        assert {part[step][1] for part in world_of_two} == {total}
    assert not np.array_equal(alone[0][0], alone[1][0])


def loss_of(world: World, tmp_path: Path, messages: list[dict[str, Any]]) -> float:
    """Mean loss per learned token of one conversation under the base model."""
    kept = rendered(tmp_path, [messages], 65)
    ids, targets = decode(torch.from_numpy(ChatRows(kept, [0], 65, 256).read([0])).long())
    gpt = load_gpt(world.gpt.out)
    with torch.no_grad():
        gpt.lm_head.weight.normal_(generator=torch.Generator().manual_seed(0))  # at the start it is near zero
        return float(gpt(ids, targets))


def test_only_what_the_assistant_says_counts(world: World, tmp_path: Path) -> None:
    said = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}]
    losses = [
        loss_of(world, tmp_path / str(number), messages)
        for number, messages in enumerate(
            [
                said,
                [*said, {"role": "user", "content": "what else"}],
                [*said, {"role": "user", "content": "something other"}],
                [said[0], {"role": "assistant", "content": "hellp"}],
                [said[0], {"role": "assistant", "content": [{"type": "python", "text": "hello"}]}],
            ]
        )
    ]
    assert losses[0] == pytest.approx(losses[1], abs=1e-6) == losses[2]
    assert len({round(loss, 3) for loss in losses}) == 3


def test_the_loss_of_a_step_is_the_mean_over_its_learned_tokens(world: World, tmp_path: Path) -> None:
    learner = objective(world, tmp_path)
    with learner.replay:
        shares = [float(share.detach()) for share in learner.loss(0)]
        learner.replay.cursor = None
    again = objective(world, tmp_path)
    with again.replay:
        ids, targets = decode(torch.from_numpy(again.batch(0)[0]).long())
    assert len(shares) == 2
    assert sum(shares) == pytest.approx(float(again.gpt(ids, targets).detach()), rel=1e-5)


def test_the_schedule_is_flat_then_falls_to_zero(world: World, tmp_path: Path) -> None:
    learner = objective(world, tmp_path, recipe=dataclasses.replace(RECIPE, warmup_steps=2))
    learner.steps = 400
    rates, momenta = [], []
    for step in range(400):
        learner.set_schedule(step)
        group = learner.optimizer.param_groups[-1]
        rates.append(group["lr"] / group["initial_lr"])
        momenta.append(group["momentum"])
        assert group["weight_decay"] == 0
    assert rates[:3] == pytest.approx([0.4, 0.8, 0.8])
    assert rates[200] == pytest.approx(0.8)
    assert rates[300] == pytest.approx(0.4)
    assert rates[399] == pytest.approx(0.8 / 200)
    assert (momenta[0], momenta[150], momenta[300], momenta[399]) == pytest.approx((0.85, 0.9, 0.95, 0.95))


@pytest.mark.parametrize(
    ("share", "rows", "expected"),
    [(0, 8, 0), (0.05, 16, 1), (0.05, 256, 13), (0.01, 8, 1), (0.5, 1, 0), (0.9, 2, 1)],
)
def test_how_many_rows_are_text(share: float, rows: int, expected: int) -> None:
    assert num_replayed(share, rows) == expected


def test_the_batch_is_that_of_pretraining_unless_told(tmp_path: Path) -> None:
    assert tokens_in_pretraining(tmp_path) == 2**19
    (tmp_path / "training.json").write_text('{"batch_tokens": 4096}')
    assert tokens_in_pretraining(tmp_path) == 4096


def test_a_tokenizer_of_another_model_is_refused(world: World, tmp_path: Path) -> None:
    other = dataclasses.replace(world.tokenizer, vocab_size=300)
    with pytest.raises(BadInput, match="has 257 tokens and the tokenizer in .* 300"):
        tuned(world, tmp_path, tokenizer=other)
    with pytest.raises(BadInput, match="ChatRecipe.replay_share must be below 1, not 1.0"):
        tuned(world, tmp_path, dataclasses.replace(RECIPE, replay_share=1.0))
    with pytest.raises(BadInput, match="batch_tokens 100 must be a multiple of 64"):
        tuned(world, tmp_path, dataclasses.replace(RECIPE, batch_tokens=100))


def test_samples_are_what_the_engine_says(chat: Any) -> None:
    gpt, tokenizer = load_gpt(chat.out), ByteTokenizer()
    said = [each["text"] for each in told(chat, "samples.json") if each["step"] == chat.steps]
    prompts = [[Text(render_prompt(tokenizer, prompt))] for prompt in PROMPTS]
    replies = Engine(gpt, tokenizer).generate(
        prompts, sampling=Sampling(temperature=0), max_tokens=ANSWER_TOKENS
    )
    assert [reply.text for reply in replies if not any(reply.forced)] == [
        text for text, reply in zip(said, replies, strict=True) if not any(reply.forced)
    ]


# --- the terminal --------------------------------------------------------------------------------------

START, END, PYTHON, SUM, OUTPUT_END = (
    ByteTokenizer().special(f"<|{name}|>")
    for name in ("assistant_start", "assistant_end", "python_start", "python_end", "output_end")
)


def scripted(directory: Path, script: bytes, *, sequence_len: int = 256, ends: bool = True) -> GptCheckpoint:
    """A GPT that says `script`, no byte of it twice, then stops, or begins it again and again.

    Its blocks add nothing, embeddings are one-hot, and the head maps each token to the next one.
    """
    shape = GptShape(n_layer=1, n_embd=288, n_head=2, n_kv_head=2, sequence_len=sequence_len)
    gpt = new_gpt(shape, 257, 0)
    chain = [START, *script, END if ends else script[0]]
    with torch.no_grad():
        table, head = gpt.transformer["wte"].weight, gpt.lm_head.weight
        table.zero_()
        head.zero_()
        head[END] = 1.0  # after any other token
        for token in range(257):
            table[token, token] = 1.0
        for token, following in itertools.pairwise(chain):
            head[following, token] = 100.0
    save_gpt(gpt, directory / "out")
    return GptCheckpoint("tune_chat", "k", str(directory), "d", gpt.num_params(), 1, 288, 257)


SAID = "é: ".encode() + bytes([PYTHON]) + b"2*4" + bytes([SUM])  # and once the calculator has answered
AFTER = "!😀".encode()


@pytest.fixture(scope="module")
def talker(tmp_path_factory: pytest.TempPathFactory) -> GptCheckpoint:
    """It says "é: ", has 2*4 calculated, and says "!" and a smile of four bytes."""
    return scripted(tmp_path_factory.mktemp("talker"), SAID + bytes([OUTPUT_END]) + AFTER)


def talk_to(gpt: GptCheckpoint, world: World, **instead: Any) -> None:
    options = {"prompt": None, "temperature": 0.0, "top_k": None, "seed": 0, "as_json": False}
    cli.chat(gpt, world.tokenizer, **{**options, **instead})


def test_a_character_is_told_once_it_is_whole() -> None:
    tokenizer = ByteTokenizer()
    pieces = [text for text, _ in spoken("a😀é".encode(), tokenizer)]
    assert [piece for piece in pieces if piece] == ["a", "😀", "é"]
    broken = [text for text, _ in spoken(b"\xf0\x9f!\xc3", tokenizer)]
    assert "".join(broken) == "\ufffd!\ufffd"
    bpe = BpeTokenizer(train_bpe(GOLDEN["texts"], GOLDEN["vocab_size"]))
    text = "é 你好 😀 it's"
    pieces = [piece for piece, _ in spoken(bpe.encode(text), bpe)]
    assert "".join(pieces) == text
    assert len([piece for piece in pieces if piece]) > 4


def test_tool_calls_are_told_apart() -> None:
    tokenizer = ByteTokenizer()
    output = [tokenizer.special("<|output_start|>"), *b"3", OUTPUT_END]
    with_value = [*b"x", PYTHON, *b"1+2", SUM, *output, *b"y"]
    without_value = [*b"x", PYTHON, *b"1+", SUM, *b"y", PYTHON, *b"4"]

    def told(tokens: list[int]) -> list[str]:
        whole = {False: "", True: ""}
        for text, in_tool in spoken(tokens, tokenizer):
            whole[in_tool] += text
        return [whole[False], whole[True]]

    assert told(with_value) == ["xy", "[1+2 = 3]"]
    assert told(without_value) == ["xy", "[1+][4]"]


def test_a_prompt_gets_its_answer_alone(
    talker: GptCheckpoint, world: World, capsys: pytest.CaptureFixture[str]
) -> None:
    talk_to(talker, world, prompt="hello")
    assert capsys.readouterr().out == "é: !😀\n"
    talk_to(talker, world, prompt="hello", as_json=True)
    said = len(SAID) + len("<8>") + len(AFTER)
    assert json.loads(capsys.readouterr().out) == {"answer": "é: !😀", "tokens": said, "stopped": True}


def type_in(monkeypatch: pytest.MonkeyPatch, *lines: str) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO("".join(f"{line}\n" for line in lines)))


def test_a_talk_through_pipes(
    talker: GptCheckpoint,
    world: World,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    type_in(
        monkeypatch, "hello", "", "/back", "/back", "again", "/new", "/help", "/hep x", "/quit", "unheard"
    )
    talk_to(talker, world)
    answer = "é: [2*4 = 8]!😀"
    assert capsys.readouterr().out.splitlines() == [
        answer,
        "taken back",
        "there is nothing to take back",
        answer,
        "a new conversation",
        *cli.HELP.splitlines(),
        "/hep x is no command; /help lists them",
    ]


def test_a_full_conversation_begins_anew(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """64 tokens: 16 are kept for an answer; "hi" and its answer take 7, or 6 and the beginning."""
    short = scripted(tmp_path, b"o", sequence_len=64)
    type_in(monkeypatch, *["hi"] * 8, "x" * 45, "x" * 44)
    talk_to(short, world)
    told = capsys.readouterr().out.splitlines()
    new = "the conversation is full; a new one begins"
    assert told == [
        *["o"] * 7,
        new,
        "o",
        new,
        "that is 49 tokens long, and 48 are the most that can be read here; shorten it",
        "o",
    ]
    with pytest.raises(BadInput, match="that is 49 tokens long"):
        talk_to(short, world, prompt="x" * 45)


def test_after_going_back_the_model_has_not_heard_it() -> None:
    engine = Engine(learned_gpt(dataclasses.replace(SHAPE, sequence_len=512)), ByteTokenizer())
    straight, turned = (Talk(engine, Sampling(temperature=0.0)) for _ in range(2))
    first = [list(itertools.islice(talk.ask("Say dog 1."), 30)) for talk in (straight, turned)]
    assert first[0] == first[1]
    assert len(set(first[0])) > 5
    next(turned.ask("And?"))  # abandoned after one token
    assert turned.go_back()
    assert list(turned.ask("Who?")) == list(straight.ask("Who?"))


def test_what_does_not_go_together_is_refused(talker: GptCheckpoint, world: World, tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="--json prints one answer"):
        talk_to(talker, world, as_json=True)
    with pytest.raises(BadInput, match="--prompt is empty"):
        talk_to(talker, world, prompt=" ")
    with pytest.raises(BadInput, match="temperature must be"):
        talk_to(talker, world, prompt="x", temperature=-1.0)
    (tmp_path / "out").mkdir()
    BpeTokenizer(train_bpe(GOLDEN["texts"], 330))._model.save(str(tmp_path / "out" / "tokenizer.json"))
    other = TokenizerFiles("train_tokenizer", "k", str(tmp_path), "d", 330)
    with pytest.raises(BadInput, match="they do not belong together"):
        talk_to(talker, dataclasses.replace(world, tokenizer=other), prompt="x")


def sit_at(terminal: str, gpt: GptCheckpoint, tokenizer: TokenizerFiles) -> None:
    """`omni chat` as the session of a terminal of its own."""
    os.setsid()
    place = os.open(terminal, os.O_RDWR)
    fcntl.ioctl(place, termios.TIOCSCTTY, 0)
    for number in range(3):
        os.dup2(place, number)
    sys.stdin, sys.stdout = os.fdopen(0, closefd=False), os.fdopen(1, "w", closefd=False)
    torch.set_num_threads(1)
    cli.chat(gpt, tokenizer, prompt=None, temperature=0.0, top_k=None, seed=0, as_json=False)


def test_ctrl_c_stops_the_answer_and_then_leaves(world: World, tmp_path: Path) -> None:
    endless = scripted(tmp_path, b"ab ", sequence_len=2048, ends=False)
    ours, theirs = pty.openpty()
    process = fork_server().Process(target=sit_at, args=(os.ttyname(theirs), endless, world.tokenizer))
    process.start()
    seen = b""

    def wait_for(what: bytes) -> None:
        nonlocal seen
        while what not in seen:
            assert select.select([ours], [], [], 60)[0], f"{what!r} did not come after {seen!r}"
            seen += os.read(ours, 4096)
        seen = seen[seen.index(what) + len(what) :]

    wait_for(b"2,048 tokens; /help")
    wait_for(b"> ")
    os.write(ours, b"talk\n")
    wait_for(b"ab ab ab")
    os.write(ours, b"\x03")
    wait_for(b"(stopped)")
    wait_for(b"> ")
    os.write(ours, b"and again\n")
    wait_for(b"ab ab ab")
    os.write(ours, b"\x03")
    wait_for(b"> ")
    os.write(ours, b"\x03")
    process.join(timeout=60)
    process.kill()
    assert process.exitcode == 0
