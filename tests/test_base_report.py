"""The page about a text model: from given scores and curves, what a stranger would read."""

import json
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from omni_model.artifacts import (
    BaseScores,
    ChatScores,
    Conversations,
    GptCheckpoint,
    TokenizerFiles,
)
from omni_model.config import ReportRecipe, Runtime
from omni_model.evaluation.base_report import choose_answers, meaning_of, write_base_report
from omni_model.storage import Workspace
from omni_model.telemetry import Metrics

TASKS = {
    "told place": {"kind": "multiple_choice", "accuracy": 0.9, "baseline": 0.25, "centered": 0.8667, "n": 50},
    "last word": {"kind": "language_modeling", "accuracy": 0.0, "baseline": 0.0, "centered": 0.0, "n": 50},
    "which story": {"kind": "schema", "accuracy": 0.52, "baseline": 0.5, "centered": 0.04, "n": 50},
}
CHAT_TASKS = {
    "mmlu": {
        "kind": "choice",
        "accuracy": 0.6,
        "ci95": [0.5, 0.7],
        "baseline": 0.25,
        "centered": 0.4667,
        "n": 100,
    },
    "gsm8k": {"kind": "sum", "accuracy": 0.0, "ci95": [0.0, 0.0], "baseline": 0.0, "centered": 0.0, "n": 20},
}
BASE: dict[str, Any] = {
    "val_bpb": 1.234,
    "train_bpb": 1.1,
    "core": 0.3022,
    "bundle": "miniature",
    "tasks": TASKS,
    "continuations": [{"prompt": "In the <kitchen>", "text": " a dog barks."}],
}
CHAT: dict[str, Any] = {"chat_core": 0.2333, "tasks": CHAT_TASKS}


def answer(number: int, right: bool) -> dict[str, Any]:
    said = "A" if right else "B"
    return {
        "task": "mmlu",
        "index": number,
        "question": f"Question {number}?\nA dog\nB <cat>",
        "expected": "A",
        "said": said,
        "right": right,
    }


def place(kind: Any, directory: Path, files: dict[str, Any], **facts: Any) -> Any:
    (directory / "out").mkdir(parents=True)
    for name, content in files.items():
        text = "\n".join(map(json.dumps, content)) if name.endswith("l") else json.dumps(content)
        (directory / "out" / name).write_text(text + "\n")
    return kind("stage", "0" * 64, str(directory), "1" * 64, **facts)


@pytest.fixture
def inputs(tmp_path: Path) -> tuple[Any, ...]:
    curve = [{"step": step, "loss": 6.0 / step} for step in range(1, 101)]
    samples = [{"step": step, "prompt": "The red", "text": f" written at {step}"} for step in (50, 100)]
    learned = {"curve.json": curve, "samples.json": samples}
    training = {
        "batch_tokens": 4096,
        "steps": 100,
        "tokens": 409600,
        "flops_per_token": 6e6,
        "dtype": "float32",
    }
    validation = [{"step": 50, "bpb": 1.5}, {"step": 100, "bpb": 1.234}]
    shape = {"num_parameters": 1_200_000, "steps": 100, "n_embd": 128, "vocab_size": 1024}
    answers = [answer(number, number % 4 == 0) for number in range(40)]
    return (
        place(BaseScores, tmp_path / "base", {"scores.json": BASE}, val_bpb=1.234, core=0.3022),
        place(
            ChatScores, tmp_path / "talk", {"scores.json": CHAT, "answers.jsonl": answers}, chat_core=0.2333
        ),
        place(
            GptCheckpoint,
            tmp_path / "gpt",
            learned | {"validation.json": validation, "training.json": training},
            **shape,
        ),
        place(GptCheckpoint, tmp_path / "chat", learned, **shape),
        place(TokenizerFiles, tmp_path / "tokenizer", {}, vocab_size=1024),
        place(Conversations, tmp_path / "conversations", {}, num_conversations=5_000),
    )


class Outside(HTMLParser):
    """Collects what a page would load from elsewhere, and its words."""

    def __init__(self) -> None:
        super().__init__()
        self.loads: list[str] = []
        self.words = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.loads += [v for k, v in attrs if k in ("src", "href") and v and not v.startswith("data:")]

    def handle_data(self, data: str) -> None:
        self.words += data


def test_the_page_tells_scores_writing_and_answers(inputs: tuple[Any, ...], tmp_path: Path) -> None:
    directory = tmp_path / "report"
    (directory / "out").mkdir(parents=True)
    work = Workspace(directory, 0, Metrics(directory / "metrics.jsonl"))
    facts = write_base_report(ReportRecipe(listed_items=6), *inputs, work=work, runtime=Runtime())
    assert facts["headline"] == "1.234 bits per byte, miniature CORE 0.302, miniature ChatCORE 0.233"
    text = (work.out / "report.html").read_text()
    seen = Outside()
    seen.feed(text)
    assert not seen.loads
    for words in (
        "written at 50",
        "written at 100",
        "In the <kitchen>",
        "B <cat>",
        "the exact words",
        "52.0 %",
    ):
        assert words in seen.words
    assert seen.words.count("expected: ") == 6
    markdown = (work.out / "report.md").read_text()
    assert "| gsm8k | number | 0.0 % | 0.0 % | 20 |" in markdown
    again = Workspace(tmp_path / "again", 0, Metrics(tmp_path / "again" / "metrics.jsonl"))
    again.out.mkdir()
    write_base_report(ReportRecipe(listed_items=6), *inputs, work=again, runtime=Runtime())
    assert (again.out / "report.html").read_text() == text


def test_only_an_interval_above_guessing_counts() -> None:
    assert meaning_of(BASE, CHAT) == (
        "The base model is above guessing in 1 of 3 tasks, the chat model in 1 of 2."
    )


def test_answers_shown_are_half_right_where_there_are_enough() -> None:
    answers = [answer(number, number < 3) for number in range(20)]
    assert [shown["right"] for shown in choose_answers(answers, 8)] == [True] * 3 + [False] * 5
    assert choose_answers(answers, 8) == choose_answers(list(reversed(answers)), 8)
