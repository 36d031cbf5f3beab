"""Chat tasks: letters against brute force, programs that pass and fail, and a whole evaluation.

The model of the whole evaluation has learned a handful of answers by heart, some of them wrong on purpose, so
every score is known beforehand.
"""

import json
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
import torch

from omni_model.artifacts import ChatScores, GptCheckpoint, PublicSets, TokenizerFiles, hash_payload
from omni_model.config import BadInput, ChatEvaluationRecipe, GptShape, Runtime
from omni_model.evaluation import chat_tasks
from omni_model.evaluation.chat_evaluation import evaluate_chat, score
from omni_model.evaluation.chat_tasks import (
    SPLIT,
    TASKS,
    Examinee,
    in_order,
    passes,
    program_of,
    same_number,
    tasks_of,
)
from omni_model.evaluation.statistics import Bootstrap
from omni_model.model.gpt import GPT
from omni_model.model.weights import new_gpt, save_gpt
from omni_model.storage import Workspace
from omni_model.telemetry import Metrics
from omni_model.text.chat_formats import ChoiceQuestion, choice_messages, gsm8k_messages, multiple_choice
from omni_model.text.conversation import Message, render_conversation, render_prompt
from omni_model.text.miniature_sets import programs
from omni_model.text.public_sets import write_rows
from omni_model.text.tokenizer import ByteTokenizer

TOKENIZER = ByteTokenizer()
SHAPE = GptShape(n_layer=2, n_embd=48, n_head=2, n_kv_head=2, sequence_len=128)
RECIPE = ChatEvaluationRecipe(max_answer_tokens=120, bootstrap_draws=200)


def arc(question: str, choices: str, answer: str, labels: str = "ABCDE") -> dict[str, Any]:
    texts = choices.split()
    listed = {"text": texts, "label": list(labels[: len(texts)])}
    return {"question": question, "choices": listed, "answerKey": answer}


def mmlu(question: str, choices: str, answer: int) -> dict[str, Any]:
    return {"question": question, "subject": "sounds", "choices": choices.split(), "answer": answer}


def program(name: str, body: str, test: str, prompt: str = "") -> dict[str, Any]:
    return {
        "task_id": f"Test/{name}",
        "prompt": f'{prompt}def {name}(x):\n    """{name} of x"""\n',
        "canonical_solution": f"    {body}\n",
        "test": f"def check(candidate):\n    {test}\n",
        "entry_point": name,
    }


SETS: dict[str, list[dict[str, Any]]] = {
    "arc-easy": [
        arc("Which is red?", "blood snow grass sky", "A"),
        arc("Which flies?", "stone owl", "2", labels="12"),
        arc("Which sings?", "bell wall", "A"),
        arc("Which is loud?", "mouse drum leaf moss dust", "B"),
    ],
    "mmlu": [mmlu("Who barks?", "cat dog cow owl", 1), mmlu("Who purrs?", "cat dog cow owl", 0)],
    "gsm8k": [
        {"question": "7 drums, 8 beats each?", "answer": "7*8=<<7*8=56>>56\n#### 56"},
        {"question": "1000 bells and 5?", "answer": "It is 1005.\n#### 1,005"},
    ],
    "humaneval": [
        program("double", "return 2 * x", "assert candidate(4) == 8"),
        program("half", "return x / 2", "assert candidate(4) == 2"),
    ],
}
# By heart: two letters of four and one of two, one sum of two (with the calculator), one program of two.
SAID: dict[tuple[str, int], str | list[dict[str, str]]] = {
    ("arc-easy", 1): "B",
    ("arc-easy", 2): "B",
    ("arc-easy", 3): "C",
    ("mmlu", 0): "B",
    ("mmlu", 1): "D",
    ("gsm8k", 1): "#### 1004",
    ("humaneval", 0): "```python\ndef double(x):\n    return x + x\n```",
    ("humaneval", 1): "    return x // 3\n",
}
ACCURACY = {"arc-easy": 0.5, "mmlu": 0.5, "gsm8k": 0.5, "humaneval": 0.5}
BASELINE = {"arc-easy": (1 / 4 + 1 / 2 + 1 / 2 + 1 / 5) / 4, "mmlu": 1 / 4, "gsm8k": 0.0, "humaneval": 0.0}


def conversation(name: str, row: Mapping[str, Any]) -> list[Message]:
    if name == "humaneval":
        answer = row["canonical_solution"]
        return [{"role": "user", "content": row["prompt"]}, {"role": "assistant", "content": answer}]
    return list(gsm8k_messages(row) if name == "gsm8k" else choice_messages(name, row))


def by_heart() -> GPT:
    """A GPT that has learned every answer of SETS, or what SAID has in its place."""
    rows = []
    for name, items in SETS.items():
        for number, row in enumerate(items):
            asked, answer = conversation(name, row)
            said = {**answer, "content": SAID.get((name, number), answer["content"])}
            rows.append(render_conversation(TOKENIZER, [asked, said]))
    longest = max(len(ids) for ids, _ in rows)
    ids, targets = torch.zeros(2, len(rows), longest, dtype=torch.long)
    targets -= 1
    for number, (tokens, mask) in enumerate(rows):
        ids[number, : len(tokens)] = torch.tensor(tokens)
        taught = [token if learned else -1 for token, learned in zip(tokens, mask, strict=True)]
        targets[number, : len(tokens) - 1] = torch.tensor(taught[1:])
    gpt = new_gpt(SHAPE, TOKENIZER.vocab_size, 3)
    optimizer = torch.optim.Adam(gpt.parameters(), lr=1e-2)
    for _ in range(300):
        loss = gpt(ids[:, :-1], targets[:, :-1])
        if loss.item() < 0.01:
            break
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss.item() < 0.01
    return gpt.eval()


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """As a stage has it: several would only wait for each other here."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def learned(one_thread: None) -> GPT:
    return by_heart()


# -- letters ------------------------------------------------------------------------------------------------


def questions(count: int) -> list[ChoiceQuestion]:
    """Of unequal lengths, with two to five choices."""
    found = []
    for number in range(count):
        choices = tuple(f"word{i}" * (1 + number % 3) for i in range(2 + number % 4))
        letters = tuple("ABCDE"[: len(choices)])
        found.append(ChoiceQuestion("Which? " * (1 + number * 5 % 7), letters, choices, "A"))
    return found


def brute_force(gpt: GPT, one: ChoiceQuestion) -> str:
    """The likeliest letter, of one prompt alone and of all its logits."""
    ids = render_prompt(TOKENIZER, multiple_choice(one.question, one.letters, one.choices))
    with torch.inference_mode():
        logits = gpt(torch.tensor([ids]))[0, -1]
    return max(one.letters, key=lambda letter: logits[TOKENIZER.encode(letter)[0]].item())


def random_gpt(sequence_len: int = 128) -> GPT:
    """Every weight is random, so that every token of a prompt counts."""
    gpt = new_gpt(replace(SHAPE, sequence_len=sequence_len), TOKENIZER.vocab_size, 1).eval()
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for weight in gpt.parameters():
            weight.normal_(std=0.5, generator=generator)
    return gpt


def test_letters_are_those_of_each_question_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    gpt = random_gpt()
    asked = questions(23)
    monkeypatch.setattr(chat_tasks, "MAX_POSITIONS", 700)  # a few questions at once
    shares: list[float] = []
    chosen = Examinee(gpt, TOKENIZER, 8).choose(asked, shares.append)
    assert chosen == [brute_force(gpt, one) for one in asked]
    assert len(set(chosen)) > 2  # else it would be no test
    assert shares == sorted(shares)
    assert len(shares) > 3
    assert shares[-1] == 1


def test_a_letter_must_be_one_token() -> None:
    class Spelled(ByteTokenizer):
        def encode(self, text: str) -> list[int]:
            return [0x41, *super().encode(text)] if text == "B" else super().encode(text)

    examinee = Examinee(new_gpt(SHAPE, TOKENIZER.vocab_size, 1), Spelled(), 8)
    with pytest.raises(BadInput, match="the tokenizer cuts the letter B into 2 tokens"):
        examinee.choose(questions(1))


def test_a_question_that_is_too_long_keeps_its_end_and_is_counted() -> None:
    gpt = random_gpt(16)
    examinee = Examinee(gpt, TOKENIZER, 8)
    rest = questions(1)[0]
    long, same = (replace(rest, question="x" * number + rest.question) for number in (500, 400))
    assert examinee.choose([long]) == examinee.choose([same])
    assert examinee.num_shortened == 2
    assert examinee.choose([rest]) == [brute_force(gpt, rest)]
    assert examinee.num_shortened == 2
    assert len(examinee.write(["y" * 500])) == 1


def test_answers_must_leave_room_for_questions() -> None:
    gpt = new_gpt(SHAPE, TOKENIZER.vocab_size, 1)
    with pytest.raises(BadInput, match="max_answer_tokens 1278 leaves no room .* 1280 positions"):
        Examinee(gpt, TOKENIZER, 1278)


# -- sums and programs --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("said", "same"),
    [
        ("18", True),
        ("18.0", True),
        ("018", True),
        ("-18", False),
        ("18.5", False),
        ("1.8.0", False),
        (None, False),
    ],
)
def test_numbers_are_compared_by_value(said: str | None, same: bool) -> None:
    assert same_number(said, "18") == same


def test_what_a_model_writes_is_the_same_alone_and_among_others(
    learned: GPT, monkeypatch: pytest.MonkeyPatch
) -> None:
    examinee = Examinee(learned, TOKENIZER, 40)
    asked = [row["question"] for row in SETS["gsm8k"]] + ["Who barks?\nA cat ; B dog ; C cow ; D owl"]
    together = examinee.write(asked)
    monkeypatch.setattr(chat_tasks, "MAX_WRITERS", 1)
    assert examinee.write(asked) == together
    calculated = "<|python_start|>7*8<|python_end|><|output_start|>56<|output_end|>"
    assert together == [f"7*8={calculated}56\n#### 56", "#### 1004", "B"]


HELPED = "import math\n\ndef helper(x):\n    return math.floor(x)\n\n\n"


@pytest.mark.parametrize(
    ("said", "right"),
    [
        ("    return helper(x) * 2\n", True),
        ("    return helper(x)\n", False),
        ("```python\ndef twice(x):\n    return 2 * math.floor(x)\n```", True),
        (
            "Like this:\n\n```\ndef twice(x):\n    return 2 * helper(x)\n```\nIt doubles.\n```\n1 / 0\n```",
            True,
        ),
        ("```python\ndef helper(x):\n    return 4\n\ndef twice(x):\n    return helper(x)\n", True),
        ("```python\n    return helper(x) * 2\n```", True),
        ("def twice_more(x):\n    return 4", False),
        ("def twice(x) -> int:\n    return 4", True),
        ("", False),
        ("I cannot do that.", False),
        ("    return 4\n'''", False),
        ("    import os\n    os._exit(0)", False),
    ],
)
def test_a_program_is_found_and_judged(said: str, right: bool) -> None:
    row = program("twice", "return 2 * helper(x)", "assert candidate(2.5) == helper(4.2)", HELPED)
    assert passes(row, said) == right


def test_a_function_may_have_the_name_of_a_builtin() -> None:
    row = program("sum", "", "assert candidate(3) == 4 and sum([1, 1]) == 2")
    assert passes(row, "    return x + 1\n")
    assert not passes(row, "    return x\n")


def test_every_miniature_program_passes_as_its_makers_wrote_it_and_not_without_a_body() -> None:
    rows = programs()
    assert all(passes(row, row["canonical_solution"]) for row in rows)
    assert not any(passes(row, "    return NotImplemented\n") for row in rows[:4])
    assert not any(passes(row, "") for row in rows[:4])


def test_what_stands_in_front_of_the_function_is_kept() -> None:
    row = program("twice", "", "", HELPED)
    found = program_of(row["prompt"], "```python\ndef twice(x):\n    return 4\n```", "twice")
    assert found == f"{HELPED}\ndef twice(x):\n    return 4\n"


# -- the whole evaluation -----------------------------------------------------------------------------------


class Killed(Exception):
    """Stands for SIGKILL."""


class KillingMetrics(Metrics):
    """Ends the work at the first log at or after a step."""

    def __init__(self, path: Path, step: float) -> None:
        super().__init__(path)
        self._last, self.steps = step, list[int]()

    def log(self, step: int, total: int, **values: float) -> None:
        self.steps.append(step)
        assert step <= total
        if step >= self._last:
            raise Killed


def workspace(directory: Path, kill_at: float = float("inf")) -> Workspace:
    (directory / "out").mkdir(parents=True, exist_ok=True)
    return Workspace(directory, 5, KillingMetrics(directory / "metrics.jsonl", kill_at))


Inputs = tuple[GptCheckpoint, TokenizerFiles, PublicSets]


@pytest.fixture
def inputs(learned: GPT, tmp_path: Path) -> Inputs:
    for name in ("gpt", "words", "sets"):
        (tmp_path / name / "out").mkdir(parents=True)
    save_gpt(learned, tmp_path / "gpt" / "out")
    (tmp_path / "words" / "out" / "tokenizer.json").write_text('{"kind":"bytes"}\n')
    for name, rows in SETS.items():
        write_rows(tmp_path / "sets" / "out" / name / f"{SPLIT}-00000.parquet", name, rows)
    vocab_size = learned.config.vocab_size
    gpt = GptCheckpoint("gpt", "k", str(tmp_path / "gpt"), "d", learned.num_params(), 1, 48, vocab_size)
    words = TokenizerFiles("words", "k", str(tmp_path / "words"), "d", vocab_size)
    return gpt, words, PublicSets("sets", "k", str(tmp_path / "sets"), "d", len(SETS), 10)


def evaluate(inputs: Inputs, work: Workspace, recipe: ChatEvaluationRecipe = RECIPE) -> dict[str, Any]:
    return evaluate_chat(recipe, *inputs, work=work, runtime=Runtime())


def test_scores_are_what_the_model_was_taught(inputs: Inputs, tmp_path: Path) -> None:
    work = workspace(tmp_path / "run")
    facts = evaluate(inputs, work)
    assert set(facts) == ChatScores.fact_names()
    scores = json.loads((work.out / "scores.json").read_text())
    tasks = scores["tasks"]
    assert {name: task["accuracy"] for name, task in tasks.items()} == ACCURACY
    assert {name: task["baseline"] for name, task in tasks.items()} == pytest.approx(BASELINE, abs=1e-6)
    assert {name: task["n"] for name, task in tasks.items()} == {
        name: len(rows) for name, rows in SETS.items()
    }
    assert {name: task["kind"] for name, task in tasks.items()} == {name: TASKS[name] for name in SETS}
    centered = [(ACCURACY[name] - BASELINE[name]) / (1 - BASELINE[name]) for name in SETS]
    assert facts["chat_core"] == scores["chat_core"] == pytest.approx(sum(centered) / 4, abs=1e-5)
    for task in tasks.values():
        low, high = task["ci95"]
        assert 0 <= low < task["accuracy"] < high <= 1
    answers = [json.loads(line) for line in (work.out / "answers.jsonl").read_text().splitlines()]
    assert {tuple(each) for each in answers} == {("expected", "index", "question", "right", "said", "task")}
    found = {(each["task"], each["index"]): each for each in answers}
    assert len(found) == sum(map(len, SETS.values()))
    assert {key: found[key]["said"] for key in SAID} == SAID
    assert [key for key in found if not found[key]["right"]] == [
        key for key in found if key in SAID and key not in (("mmlu", 0), ("arc-easy", 1), ("humaneval", 0))
    ]
    assert found["arc-easy", 1]["question"] == "Which flies?\nA stone ; B owl"
    told = work.metrics.summaries
    assert told["left_out"] == "arc-challenge"
    assert (told["chat_core"], told["shortened"]) == (facts["chat_core"], 0)
    assert str(told["programs_behind"]).startswith("limits")


@pytest.mark.parametrize("kill_at", [3, 26])
def test_an_evaluation_that_was_killed_goes_on(
    kill_at: int, inputs: Inputs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, halved = workspace(tmp_path / "whole"), workspace(tmp_path / "halved", kill_at)
    evaluate(inputs, whole)
    with pytest.raises(Killed):
        evaluate(inputs, halved)
    read: list[str] = []

    def counted(sets: Path, name: str, count: int) -> list[tuple[int, Any]]:
        read.append(name)
        return in_order(sets, name, count)

    monkeypatch.setattr("omni_model.evaluation.chat_evaluation.in_order", counted)
    again = workspace(tmp_path / "halved")
    evaluate(inputs, again)
    assert hash_payload(again.out) == hash_payload(whole.out)
    assert read == tasks_of(inputs[2].out)[kill_at // 10 :]  # what was done is not done again
    assert isinstance(whole.metrics, KillingMetrics)
    assert whole.metrics.steps[-1] == 40


def test_items_are_the_first_of_one_order(tmp_path: Path) -> None:
    rows = [mmlu(f"Question {number}", "a b c d", number % 4) for number in range(50)]
    write_rows(tmp_path / "mmlu" / "test-00000.parquet", "mmlu", rows)
    every = in_order(tmp_path, "mmlu", 0)
    assert sorted(index for index, _ in every) == list(range(50)) != [index for index, _ in every]
    assert all(row == rows[index] for index, row in every)
    assert in_order(tmp_path, "mmlu", 7) == every[:7]
    assert in_order(tmp_path, "mmlu", 70) == every


def test_fewer_items_and_fewer_tasks(inputs: Inputs, tmp_path: Path) -> None:
    for name in ("humaneval", "gsm8k"):
        (inputs[2].out / name / f"{SPLIT}-00000.parquet").unlink()
    work = workspace(tmp_path / "run")
    evaluate(inputs, work, replace(RECIPE, items_per_task=1))
    tasks = json.loads((work.out / "scores.json").read_text())["tasks"]
    assert {name: task["n"] for name, task in tasks.items()} == {"arc-easy": 1, "mmlu": 1}
    assert work.metrics.summaries["left_out"] == "arc-challenge, gsm8k, humaneval"
    assert "programs_behind" not in work.metrics.summaries


def test_a_score_is_centred_on_guessing() -> None:
    answers = [{"right": right, "chance": 0.25} for right in (True, True, True, False)]
    task = score("choice", answers, Bootstrap(1, 100))
    assert (task["accuracy"], task["baseline"], task["centered"]) == (0.75, 0.25, 0.666667)


def refused(inputs: Inputs, tmp_path: Path) -> str:
    work = workspace(tmp_path / "refused")
    with pytest.raises(BadInput) as caught:
        evaluate(inputs, work)
    assert not list(work.out.iterdir())
    return str(caught.value)


def test_a_tokenizer_of_another_model_is_refused(inputs: Inputs, tmp_path: Path) -> None:
    gpt, words, sets = inputs
    told = refused((replace(gpt, vocab_size=300), words, sets), tmp_path)
    assert "has 300 tokens and the tokenizer in" in told


def test_sets_without_a_task_are_refused(inputs: Inputs, tmp_path: Path) -> None:
    for name in SETS:
        (inputs[2].out / name / f"{SPLIT}-00000.parquet").unlink()
    assert "holds none of arc-easy, arc-challenge, mmlu, gsm8k, humaneval; add one" in refused(
        inputs, tmp_path
    )


def test_a_damaged_file_is_named(inputs: Inputs, tmp_path: Path) -> None:
    path = inputs[2].out / "mmlu" / f"{SPLIT}-00000.parquet"
    path.write_bytes(path.read_bytes()[:-20])
    assert f"{path} is not a whole parquet file" in refused(inputs, tmp_path)


def test_a_missing_column_is_named(inputs: Inputs, tmp_path: Path) -> None:
    path = inputs[2].out / "gsm8k" / f"{SPLIT}-00000.parquet"
    table = pyarrow.parquet.read_table(path)
    pyarrow.parquet.write_table(table.drop_columns(["answer"]), path)
    assert f"{path} lacks the column 'answer'" in refused(inputs, tmp_path)


@pytest.mark.parametrize(
    ("name", "row", "told"),
    [
        (
            "arc-easy",
            arc("Which?", "red blue", "F"),
            "arc-easy: the answer to 'Which?' is none of its 2 choices",
        ),
        ("mmlu", mmlu("Which?", "red blue", 2), "mmlu: the answer to 'Which?' is none of its 2 choices"),
        (
            "gsm8k",
            {"question": "1+1?", "answer": "2"},
            "gsm8k, test row 0: its answer has no number behind ####",
        ),
    ],
)
def test_a_row_without_a_right_answer_is_named(
    name: str, row: dict[str, Any], told: str, inputs: Inputs, tmp_path: Path
) -> None:
    write_rows(inputs[2].out / name / f"{SPLIT}-00000.parquet", name, [row])
    assert told in refused(inputs, tmp_path)


def test_programs_that_cannot_be_run_here_are_named(
    inputs: Inputs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("omni_model.evaluation.sandbox.WALLS", tmp_path / "gone.py")
    assert "leave humaneval out of sets.names" in refused(inputs, tmp_path)
