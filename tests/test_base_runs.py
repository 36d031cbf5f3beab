"""The text half as a person uses it: base-tiny made small, a chat, texts of one's own."""

import json
from pathlib import Path
from typing import Any

import pytest

from tests import small
from tests.test_runs import omni

CHAT_SIDE = {"tune_chat", "evaluate_chat", "write_base_report"}

pytestmark = pytest.mark.slow


def run(store: Path, *words: str) -> dict[str, Any]:
    done = omni(store, "run", *words, "--json")
    assert done.returncode == 0, done.stdout + done.stderr
    return dict(json.loads(done.stdout))


def computed(summary: dict[str, Any]) -> set[str]:
    return {stage["name"] for stage in summary["stages"] if stage["status"] == "computed"}


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store with one whole run."""
    place = tmp_path_factory.mktemp("base") / "store"
    summary = run(place, *small.base_tiny())
    assert len(summary["stages"]) == len(computed(summary)) == 11
    return place


def test_the_report_tells_both_models_and_what_they_cost(store: Path) -> None:
    page = (store / "latest" / "report.html").read_text()
    for words in ("bits per byte", "ChatCORE", "How it learned", "What it writes", "gsm8k", "Computing took"):
        assert words in page
    summary = json.loads((store / "latest" / "summary.json").read_text())
    assert summary["audiobench_mini"] is None
    assert "bits per byte" in summary["headline"]


def test_only_what_follows_from_a_changed_number_runs_again(store: Path) -> None:
    again = omni(store, "plan", *small.base_tiny(), "--json")
    assert {step["status"] for step in json.loads(again.stdout)} == {"current"}
    changed = omni(store, "plan", *small.base_tiny("chat.replay_share=0.1"), "--json")
    assert {s["name"] for s in json.loads(changed.stdout) if s["status"] != "current"} == CHAT_SIDE


def test_the_newest_chat_model_answers(store: Path) -> None:
    told = omni(store, "chat", "--prompt", "Who are you?", "--temperature", "0", "--json")
    assert told.returncode == 0, told.stderr
    assert set(json.loads(told.stdout)) == {"answer", "tokens", "stopped"}
    refused = omni(store.parent / "empty", "chat", "--prompt", "Hello")
    assert refused.returncode == 2
    assert "no model in" in refused.stderr
    assert "omni run base-tiny makes one" in refused.stderr


def test_texts_of_ones_own_are_judged_by_tasks_that_lie_here(store: Path, tmp_path: Path) -> None:
    (core,), (sets,) = store.glob("write_core/*/out"), store.glob("write_sets/*/out")
    texts = tmp_path / "texts"
    texts.mkdir()
    lines = (
        json.dumps({"text": f"The bell rings {n} times near the harbour, and {n + 1} birds answer. " * 3})
        for n in range(400)
    )
    (texts / "some.jsonl").write_text("\n".join(lines))
    words = ["base-folder", "--set", f"texts.folder.path={texts}", "--set", f"core.place={core}"]
    for setting in (
        f"sets.place={sets}",
        "depth=1",
        "sequence_len=128",
        "tokenizer.vocab_size=400",
        "pretrain.steps=4",
        "pretrain.batch_tokens=512",
        "pretrain.validation_tokens=512",
        "evaluation.split_tokens=512",
        "evaluation.core_items_per_task=4",
        "runtime.wandb=off",
        *(setting for setting in small.BASE_SETTINGS if setting.startswith(("conversations.", "chat_"))),
    ):
        words += ["--set", setting]
    summary = run(tmp_path / "store", *words)
    assert [stage["name"] for stage in summary["stages"]][:1] == ["import_text"]
    (texts / "broken.txt").write_bytes(b"fine until here \xff")
    refused = omni(tmp_path / "store", "run", *words)
    assert refused.returncode == 2
    assert "broken.txt" in refused.stderr
