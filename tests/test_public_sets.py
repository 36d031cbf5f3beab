"""Public sets: how a row reads, where files come from, miniatures of them, and conversations out of both."""

import hashlib
import json
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest

from omni_model.artifacts import Conversations, PublicSets, hash_payload
from omni_model.config import BadInput, ConversationsRecipe, MiniatureSetsRecipe, PublicSetsRecipe, Runtime
from omni_model.outside import digest_folder
from omni_model.serving.calculator import calculate
from omni_model.storage import Workspace
from omni_model.telemetry import Metrics
from omni_model.text import questions
from omni_model.text.chat_formats import (
    CALCULATION,
    choice_messages,
    choice_row,
    gsm8k_answer,
    gsm8k_messages,
    multiple_choice,
)
from omni_model.text.conversation import render_conversation
from omni_model.text.conversations import (
    CONVERSATIONS_FILE,
    build_conversations,
    identity_conversation,
    num_conversations,
    read_conversations,
)
from omni_model.text.corpus import group_sizes
from omni_model.text.miniature_sets import KINDS, programs, question_key, words_of, write_sets
from omni_model.text.public_sets import SETS, fetch_sets, num_rows, read_rows, write_rows
from omni_model.text.tokenizer import BpeTokenizer, train_bpe
from tests.loopback import FileServer, dead_url, file_server, stay_at_home

SMALL = MiniatureSetsRecipe(train_rows=60, test_rows=20)
MIXTURE = ConversationsRecipe(smoltalk_rows=40, mmlu_rows=30, arc_rows=150, gsm8k_rows=70, identity_rows=25)


class Killed(Exception):
    """Stands for SIGKILL."""


class KillingMetrics(Metrics):
    """Ends the work at the first log."""

    def log(self, step: int, total: int, **values: float) -> None:
        raise Killed


def workspace(directory: Path, seed: int = 5, metrics: type[Metrics] = Metrics) -> Workspace:
    for name in ("out", "partial"):
        (directory / name).mkdir(parents=True, exist_ok=True)
    return Workspace(directory, seed, metrics(directory / "metrics.jsonl"))


def handle(directory: Path) -> PublicSets:
    return PublicSets("write_sets", "k", str(directory), "d", num_sets=6, num_rows=0)


@pytest.fixture(scope="module")
def sets(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A payload of miniature sets."""
    work = workspace(tmp_path_factory.mktemp("sets"))
    facts = write_sets(SMALL, work=work, runtime=Runtime())
    assert set(facts) == PublicSets.fact_names()
    assert facts == {"num_sets": 6, "num_rows": 5 * 60 + 7 * 20 + len(programs())}
    return work.out


# --- how a row reads -----------------------------------------------------------------------------


def test_four_words_read_as_a_question_about_a_clip_does() -> None:
    options = ["red", "blue", "green", "black"]
    assert multiple_choice("Which colour?", "ABCD", options) == questions.multiple_choice(
        "Which colour?", options
    )
    assert multiple_choice("Why?", "ABC", ["it is", "so", "now"]) == "Why?\nA it is\nB so\nC now"
    with pytest.raises(BadInput, match="2 choices and 3 letters"):
        multiple_choice("Why?", "ABC", ["a", "b"])


def test_every_letter_is_one_token_and_at_a_line_s_start_the_answer_s(sets: Path) -> None:
    rows = [row for name in ("mmlu", "arc-challenge") for row in _of(sets, name, SETS[name].splits[0])]
    texts = [choice_messages("mmlu" if "answer" in r else "arc-easy", r)[0]["content"] for r in rows]
    tokenizer = BpeTokenizer(train_bpe(texts, 600))
    spelled = [tokenizer.decode([i]) for i in tokenizer.encode(multiple_choice("W?", "ABCD", list("wxyz")))]
    assert [each for each in spelled if each.strip() in set("ABCD")] == ["A", " B", " C", " D"]
    ids = tokenizer.encode(multiple_choice("W?", "ABCD", ["the cat", "the dog", "a cow", "it"]))
    for letter in "ABCD":
        assert len(tokenizer.encode(letter)) == 1
        assert ids.count(tokenizer.encode(letter)[0]) == 1


def test_choices_are_lettered_whatever_they_are_labelled() -> None:
    row = {"question": "Q?", "choices": {"text": ["x", "y", "z"], "label": ["1", "2", "3"]}, "answerKey": "3"}
    found = choice_row("arc-easy", row)
    assert (found.letters, found.choices, found.answer) == (("A", "B", "C"), ("x", "y", "z"), "C")
    assert choice_row("mmlu", {"question": "Q?", "choices": ["x", "y"], "answer": 1}).answer == "B"
    for name, bad in (
        ("arc-challenge", row | {"answerKey": "D"}),
        ("mmlu", {"question": "Q?", "choices": ["x", "y"], "answer": 2}),
        ("mmlu", {"question": "Q?", "choices": [], "answer": 0}),
    ):
        with pytest.raises(BadInput, match=r"the answer to 'Q\?' is none of its"):
            choice_row(name, bad)
    with pytest.raises(BadInput, match="'gsm8k' is no set of multiple choice"):
        choice_row("gsm8k", row)


def test_a_sum_becomes_calls_of_the_calculator() -> None:
    answer = "She pays $<<4*3=12>>12.\nWith <<a note>> that is <<12+1,000=1012>>1012.\n#### 1,012"
    asked, said = gsm8k_messages({"question": "How much?", "answer": answer})
    assert asked == {"role": "user", "content": "How much?"}
    assert [(part["type"], part["text"]) for part in said["content"]] == [
        ("text", "She pays $"),
        ("python", "4*3"),
        ("python_output", "12"),
        ("text", "12.\nWith <<a note>> that is "),
        ("python", "12+1,000"),
        ("python_output", "1012"),
        ("text", "1012.\n#### 1,012"),
    ]
    plain = gsm8k_messages({"question": "q", "answer": "none\n#### 3"})[1]["content"]
    assert plain == [{"type": "text", "text": "none\n#### 3"}]


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("#### 72", "72"),
        ("so\n#### -1,200.", "-1200"),
        ("#### $2.50 it is", "2.50"),
        ("#### 5\n#### 6", "5"),
        ("72", None),
        ("#### none", None),
        ("#### ,.", None),
    ],
)
def test_the_number_behind_four_hashes(text: str, number: str | None) -> None:
    assert gsm8k_answer(text) == number


# --- miniatures ----------------------------------------------------------------------------------


def _of(sets: Path, name: str, split: str) -> list[dict[str, Any]]:
    return list(read_rows(sets, name, split))


def test_miniatures_have_every_split_and_are_the_same_bytes_again(sets: Path, tmp_path: Path) -> None:
    for name, known in SETS.items():
        for split in known.splits:
            count = len(programs()) if name == "humaneval" else 60 if split.endswith("train") else 20
            assert num_rows(sets, name, split) == len(_of(sets, name, split)) == count
    again, other = workspace(tmp_path / "again"), workspace(tmp_path / "other", seed=6)
    write_sets(SMALL, work=again, runtime=Runtime(workers=3))
    write_sets(SMALL, work=other, runtime=Runtime())
    assert hash_payload(again.out) == hash_payload(sets)
    assert hash_payload(other.out) != hash_payload(sets)


def test_what_a_test_asks_is_never_taught(tmp_path: Path) -> None:
    work = workspace(tmp_path)
    write_sets(MiniatureSetsRecipe(train_rows=800, test_rows=100), work=work, runtime=Runtime())
    for name in set(SETS) - {"humaneval"}:
        train, *others = [
            [question_key(name, row) for row in _of(work.out, name, split)] for split in SETS[name].splits
        ]
        tests = [key for keys in others for key in keys]
        assert len(set(tests)) == len(tests) == 100 * len(others)
        assert not set(train) & set(tests)
        assert len(set(train)) > 400


def test_miniature_choices_have_one_right_answer(sets: Path) -> None:
    kinds = [word for kind in KINDS for word in words_of(kind)]
    assert len(set(kinds)) == len(kinds)
    for row in _of(sets, "mmlu", "auxiliary_train"):
        right = row["choices"][row["answer"]]
        words = re.findall(r"\w+", row["question"].lower())
        assert right in words
        assert len(set(row["choices"])) == 4
        if row["subject"] == "stories":
            assert not set(row["choices"]) - {right} & set(words)
    labels: Counter[str] = Counter()
    for name in ("arc-easy", "arc-challenge"):
        for row in _of(sets, name, "train"):
            texts, labelled = row["choices"]["text"], "".join(row["choices"]["label"])
            labels[labelled] += 1
            right = texts[labelled.index(row["answerKey"])]
            assert _right(row["question"], texts) == [right]
    assert set(labels) == {"ABCD", "1234"}


def _right(question: str, texts: list[str]) -> list[str]:
    """The choices that answer one of the questions in ARC's form, by reading it."""
    kinds = {f"{asked}?": set(words_of(kind)) for kind, asked in KINDS.items()}
    if question.startswith("Which word is not "):
        return [text for text in texts if text not in kinds[question.removeprefix("Which word is not ")]]
    if question.startswith("Which word is "):
        return [text for text in texts if text in kinds[question.removeprefix("Which word is ")]]
    word = question.removesuffix("?").split()[-1]
    heard = question.splitlines()[0].split() if "\n" in question else []
    return [text for text in texts if text in heard or (not heard and f" {word}" in text)]


def test_miniature_sums_come_out(sets: Path) -> None:
    for row in _of(sets, "gsm8k", "train"):
        results = [(calculate(mark[1]), mark[2]) for mark in CALCULATION.finditer(row["answer"])]
        assert results
        assert all(computed == told for computed, told in results)
        assert gsm8k_answer(row["answer"]) == results[-1][1]
        given = [int(each) for each in re.findall(r"\d+", row["question"])]
        first = CALCULATION.search(row["answer"])
        assert first is not None
        assert all(int(each) in given for each in re.findall(r"\d+", first[1]))


def test_miniature_programs_pass_their_own_checks_and_not_with_another_body() -> None:
    rows = programs()
    assert len(rows) == len({row["task_id"] for row in rows}) == len({row["entry_point"] for row in rows})
    right = "".join(
        f"{r['prompt']}{r['canonical_solution']}\n{r['test']}\ncheck({r['entry_point']})\n" for r in rows
    )
    wrong = "".join(
        f"{r['prompt']}    return None\n{r['test']}\ntry:\n    check({r['entry_point']})\n"
        "except AssertionError:\n    pass\nelse:\n    raise SystemExit(3)\n"
        for r in rows
    )
    subprocess.run([sys.executable, "-I", "-c", right + wrong], check=True)


# --- where files come from -----------------------------------------------------------------------


@pytest.fixture
def hub(sets: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FileServer]:
    """A server that has the miniature sets where Hugging Face has the real ones."""
    stay_at_home(monkeypatch)
    for name in ("OMNI_OFFLINE", "HF_HUB_OFFLINE", "HF_ENDPOINT"):
        monkeypatch.delenv(name, raising=False)
    with file_server() as server:
        publish(server, sets)
        monkeypatch.setenv("HF_MIRRORS", server.url)
        yield server


def publish(server: FileServer, sets: Path) -> None:
    for name, known in SETS.items():
        listing = [
            {"type": "directory", "path": f"{known.folder}/more"},
            _listed(f"{known.folder}/README.md"),
        ]
        for split in known.splits:
            path = f"{known.folder}/{split}-00000-of-00001.parquet"
            content = (sets / name / f"{split}-00000.parquet").read_bytes()
            server.files[f"/datasets/{known.repository}/resolve/main/{path}"] = content
            listing.append(_listed(path, content))
        server.files[f"/api/datasets/{known.repository}/tree/main/{known.folder}"] = json.dumps(
            listing
        ).encode()


def _listed(path: str, content: bytes = b"") -> dict[str, Any]:
    lfs = {"oid": hashlib.sha256(content).hexdigest(), "size": len(content), "pointerSize": 134}
    plain = {"type": "file", "oid": "0" * 40, "size": len(content), "path": path}
    return {**plain, "lfs": lfs} if content else plain


GSM8K = PublicSetsRecipe(names=("gsm8k",))
LISTING = "/api/datasets/openai/gsm8k/tree/main/main"
TRAIN = "/datasets/openai/gsm8k/resolve/main/main/train-00000-of-00001.parquet"


def test_sets_come_whole_from_a_hub(hub: FileServer, sets: Path, tmp_path: Path) -> None:
    work = workspace(tmp_path)
    facts = fetch_sets(PublicSetsRecipe(), work=work, runtime=Runtime())
    assert facts == {"num_sets": 6, "num_rows": 5 * 60 + 7 * 20 + len(programs())}
    assert hash_payload(work.out) == hash_payload(sets)
    last = json.loads((tmp_path / "metrics.jsonl").read_text().splitlines()[-1])
    assert last["step"] == last["total"] == sum(path.stat().st_size for path in sets.rglob("*.parquet"))


def test_a_killed_download_goes_on_from_another_server(
    hub: FileServer, sets: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.faults[TRAIN] = ["cut", 500, 500, 500, 500, 500]
    work = workspace(tmp_path)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("omni_model.text.dataset_hub.RETRIES", 0)
        with pytest.raises(BadInput, match=r"train-00000\.parquet could not be downloaded: http"):
            fetch_sets(GSM8K, work=work, runtime=Runtime())
    assert not list(work.out.rglob("*.parquet"))
    with file_server() as second:
        publish(second, sets)
        monkeypatch.setenv("HF_MIRRORS", f"{dead_url()} {second.url}")
        fetch_sets(GSM8K, work=work, runtime=Runtime())
        assert next(asked for path, asked in second.requests if path == TRAIN).startswith("bytes=")
    assert [f.path for f in hash_payload(work.out)] == [
        "gsm8k/test-00000.parquet",
        "gsm8k/train-00000.parquet",
    ]
    assert len(_of(work.out, "gsm8k", "train")) == 60


def test_a_server_with_half_a_set_or_a_login_page_is_passed_over(
    hub: FileServer, sets: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    listed = json.loads(hub.files[LISTING])
    bad = {
        "1 parts of main/train, of 2": [
            {**each, "path": each["path"].replace("-of-00001", "-of-00002")} for each in listed
        ],
        "cannot be read": [{k: v for k, v in each.items() if k != "lfs"} for each in listed],
        "0 parts of main/train": [],
    }
    with file_server() as second:
        publish(second, sets)
        for number, (reason, listing) in enumerate(bad.items()):
            hub.files[LISTING] = json.dumps(listing).encode()
            monkeypatch.setenv("HF_MIRRORS", hub.url)
            with pytest.raises(BadInput, match=f"openai/gsm8k could not be listed: {hub.url} .*{reason}"):
                fetch_sets(GSM8K, work=workspace(tmp_path / f"{number}"), runtime=Runtime())
            monkeypatch.setenv("HF_MIRRORS", f"{hub.url} {second.url}")
            fetch_sets(GSM8K, work=workspace(tmp_path / f"{number}"), runtime=Runtime())
        hub.faults[LISTING] = ["page", "page"]
        fetch_sets(GSM8K, work=workspace(tmp_path / "page"), runtime=Runtime())


def test_a_file_of_other_bytes_or_other_columns_is_refused(hub: FileServer, tmp_path: Path) -> None:
    good = hub.files[TRAIN]
    hub.files[TRAIN] = good[:-1] + b"?"
    with pytest.raises(BadInput, match="its sha256 is"):
        fetch_sets(GSM8K, work=workspace(tmp_path / "bytes"), runtime=Runtime())
    path = tmp_path / "other.parquet"
    pyarrow.parquet.write_table(pyarrow.table({"question": ["q"], "answer": [4]}), path)
    hub.files[TRAIN] = path.read_bytes()
    listing = json.loads(hub.files[LISTING])
    listing = [
        _listed(each["path"], path.read_bytes()) if "train" in each["path"] else each for each in listing
    ]
    hub.files[LISTING] = json.dumps(listing).encode()
    with pytest.raises(BadInput, match=r"train-00000\.parquet has the column 'answer' as int64 and gsm8k"):
        fetch_sets(GSM8K, work=workspace(tmp_path / "columns"), runtime=Runtime())


def test_offline_nothing_is_asked_and_unknown_names_are_told(
    hub: FileServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(BadInput, match="'squad' is no public set that is known here; one of smoltalk"):
        fetch_sets(PublicSetsRecipe(names=("squad",)), work=workspace(tmp_path), runtime=Runtime())
    monkeypatch.setenv("OMNI_OFFLINE", "1")
    with pytest.raises(BadInput, match=r"OMNI_OFFLINE .* as sets\.place"):
        fetch_sets(GSM8K, work=workspace(tmp_path), runtime=Runtime())
    assert not hub.requests


# --- a folder of the user's ----------------------------------------------------------------------


@pytest.fixture
def place(sets: Path, tmp_path: Path) -> Path:
    """GSM8K in lines of JSON and ARC-Easy in parquet files, as somebody may have them."""
    folder = tmp_path / "mine"
    (folder / "gsm8k").mkdir(parents=True)
    for split in ("train", "test"):
        lines = [json.dumps({**row, "extra": 1}) for row in _of(sets, "gsm8k", split)]
        (folder / "gsm8k" / f"{split}.jsonl").write_text("\n".join(lines) + "\n\n")
    rows = _of(sets, "arc-easy", "train")
    write_rows(folder / "arc-easy" / "train-0.parquet", "arc-easy", rows[:25])
    write_rows(folder / "arc-easy" / "train-1.parquet", "arc-easy", rows[25:])
    wide = pyarrow.table(
        {
            "id": [str(i) for i in range(20)],
            "question": pyarrow.array(["q?"] * 20, pyarrow.large_string()),
            "choices": [{"label": ["A", "B"], "text": ["x", "y"]}] * 20,
            "answerKey": ["B"] * 20,
        }
    )
    pyarrow.parquet.write_table(wide, folder / "arc-easy" / "test.parquet")
    return folder


def mine(place: Path, digest: str = "") -> PublicSetsRecipe:
    return PublicSetsRecipe(names=("gsm8k", "arc-easy"), place=str(place), digest=digest)


def test_a_folder_of_the_user_s_is_taken_over(place: Path, sets: Path, tmp_path: Path) -> None:
    work = workspace(tmp_path / "work")
    facts = fetch_sets(mine(place, digest_folder(place)), work=work, runtime=Runtime())
    assert facts == {"num_sets": 2, "num_rows": 160}
    for name in ("gsm8k", "arc-easy"):
        assert _of(work.out, name, "train") == _of(sets, name, "train")
    assert _of(work.out, "gsm8k", "test") == _of(sets, "gsm8k", "test")
    assert _of(work.out, "arc-easy", "test")[0] == {
        "question": "q?",
        "choices": {"text": ["x", "y"], "label": ["A", "B"]},
        "answerKey": "B",
    }
    with pytest.raises(BadInput, match=r"holds no arc-easy/validation-\*\.parquet"):
        _of(work.out, "arc-easy", "validation")
    with pytest.raises(BadInput, match="has changed since the run was planned"):
        fetch_sets(mine(place, "0" * 64), work=workspace(tmp_path / "changed"), runtime=Runtime())


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-20])


def without_choices(path: Path) -> None:
    pyarrow.parquet.write_table(pyarrow.table({"question": ["q"], "answerKey": ["A"]}), path)


def without_labels(path: Path) -> None:
    rows = {"question": ["q"], "answerKey": ["A"], "choices": [{"text": ["a", "b"]}]}
    pyarrow.parquet.write_table(pyarrow.table(rows), path)


def without_rows(path: Path) -> None:
    write_rows(path, "arc-easy", [])


def a_page(path: Path) -> None:
    path.write_text("<!DOCTYPE html><html>Please sign in</html>")


DAMAGES: list[tuple[str, Callable[[Path], Any], str]] = [
    ("arc-easy/test.parquet", cut, r"test\.parquet is not a whole parquet file"),
    ("arc-easy/test.parquet", a_page, r"test\.parquet is not a whole parquet file"),
    ("arc-easy/test.parquet", without_choices, r"test\.parquet lacks the column 'choices'"),
    (
        "arc-easy/test.parquet",
        without_labels,
        r"has the column 'choices' as struct<text.* and arc-easy has it",
    ),
    ("arc-easy/test.parquet", without_rows, r"test\.parquet holds no rows"),
    ("arc-easy/test.parquet", Path.unlink, r"arc-easy holds neither test\.parquet nor test\.jsonl"),
    ("gsm8k/test.parquet", a_page, r"gsm8k holds both test\.parquet and test\.jsonl"),
    (
        "gsm8k/test.jsonl",
        lambda path: path.write_bytes(b'{"question": "\xff"}'),
        r"test\.jsonl line 1 is not UTF-8",
    ),
    ("gsm8k/test.jsonl", lambda path: path.write_text('"\\ud800"'), r"test\.jsonl line 1 is not UTF-8"),
    ("gsm8k/test.jsonl", lambda path: path.write_text("{} \n{"), r"line 1 lacks the column 'question'"),
    ("gsm8k/test.jsonl", lambda path: path.write_text("{"), r"test\.jsonl line 1 is not JSON"),
    ("gsm8k/test.jsonl", lambda path: path.write_text("\n"), r"test\.jsonl holds no rows"),
    (
        "gsm8k/test.jsonl",
        lambda path: path.write_text('{"question": "q", "answer": 5}'),
        r"test\.jsonl line 1 has no string as its 'answer'",
    ),
]


@pytest.mark.parametrize(("name", "damage", "sentence"), DAMAGES)
def test_what_is_wrong_in_a_folder_is_told(
    place: Path, tmp_path: Path, name: str, damage: Callable[[Path], Any], sentence: str
) -> None:
    good = digest_folder(place)
    kept = {path: path.read_bytes() for path in place.rglob("*") if path.is_file()}
    damage(place / name)
    with pytest.raises(BadInput, match=sentence):
        fetch_sets(mine(place), work=workspace(tmp_path / "bad"), runtime=Runtime())
    for path in place.rglob("*.*"):
        path.unlink()
    for path, content in kept.items():
        path.write_bytes(content)
    fetch_sets(mine(place, good), work=workspace(tmp_path / "mended"), runtime=Runtime())


def test_a_row_with_something_missing_is_told_when_it_is_read(sets: Path, tmp_path: Path) -> None:
    path = tmp_path / "gsm8k" / "test-00000.parquet"
    path.parent.mkdir()
    pyarrow.parquet.write_table(pyarrow.table({"question": ["q", None], "answer": ["a", "b"]}), path)
    rows = read_rows(tmp_path, "gsm8k", "test")
    assert next(rows) == {"question": "q", "answer": "a"}
    with pytest.raises(BadInput, match=r"test-00000\.parquet row 1 has no string as its 'question'"):
        next(rows)
    with pytest.raises(BadInput, match="gsm8k has no split 'dev'; one of train, test"):
        next(read_rows(sets, "gsm8k", "dev"))


# --- conversations -------------------------------------------------------------------------------


def build(sets: Path, work: Workspace, recipe: ConversationsRecipe = MIXTURE) -> list[list[Any]]:
    facts = build_conversations(recipe, handle(sets.parent), work=work, runtime=Runtime())
    assert set(facts) == Conversations.fact_names()
    found = [list(each) for each in read_conversations(work.out)]
    assert facts["num_conversations"] == len(found) == num_conversations(work.out)
    return found


def test_conversations_hold_each_set_as_often_as_wanted(sets: Path, tmp_path: Path) -> None:
    work = workspace(tmp_path)
    found = build(sets, work)
    table = pyarrow.parquet.read_table(work.out / CONVERSATIONS_FILE)
    sources = table.column("source").to_pylist()
    counts = Counter(sources)
    assert counts.pop("arc-easy") + counts.pop("arc-challenge") == 150
    assert counts == {"smoltalk": 40, "mmlu": 30, "gsm8k": 70, "identity": 25}
    assert work.metrics.summaries["gsm8k_rows"] == 70
    assert work.metrics.summaries["left_out"] == 0
    texts: dict[str, Counter[str]] = {source: Counter() for source in sources}
    for source, messages in zip(sources, found, strict=True):
        texts[source][json.dumps(messages, sort_keys=True)] += 1
    wanted = {
        "gsm8k": [gsm8k_messages(row) for row in _of(sets, "gsm8k", "train")],
        "mmlu": [choice_messages("mmlu", row) for row in _of(sets, "mmlu", "auxiliary_train")],
        "arc-easy": [choice_messages("arc-easy", row) for row in _of(sets, "arc-easy", "train")],
        "smoltalk": [row["messages"] for row in _of(sets, "smoltalk", "train")],
    }
    for source, conversations in wanted.items():
        published = Counter(json.dumps(each, sort_keys=True) for each in conversations)
        assert set(texts[source]) <= set(published)
        for text, times in texts[source].items():  # 70 of 60 rows: each once, ten of them twice
            passes = -(-{"gsm8k": 70, "arc-easy": 75}.get(source, 1) // 60)
            assert times <= passes * published[text]
        if source in ("gsm8k", "arc-easy"):
            assert set(texts[source]) == set(published)
    assert sources != sorted(sources)
    mean = {
        source: np.mean([i for i, each in enumerate(sources) if each == source]) for source in set(sources)
    }
    assert all(abs(place / len(sources) - 0.5) < 0.2 for place in mean.values())


def test_conversations_are_the_same_bytes_after_a_kill(sets: Path, tmp_path: Path) -> None:
    killed = workspace(tmp_path / "killed", metrics=KillingMetrics)
    (killed.partial / "stretches").mkdir()
    (killed.partial / "stretches" / "000000").write_text("0\tsmoltalk\t[]\n")
    with pytest.raises(Killed):
        build(sets, killed)
    first, other = workspace(tmp_path / "first"), workspace(tmp_path / "other", seed=6)
    assert build(sets, workspace(tmp_path / "killed")) == build(sets, first)
    assert hash_payload(killed.out) == hash_payload(first.out)
    assert build(sets, other) != build(sets, first)
    assert not list(first.partial.iterdir())


def test_conversations_can_be_read_from_anywhere(
    sets: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("omni_model.text.conversations.STRETCH_ROWS", 500)
    work = workspace(tmp_path)
    found = build(sets, work, ConversationsRecipe(2300, 0, 0, 0, 0))
    assert group_sizes(work.out / CONVERSATIONS_FILE) == [1024, 1024, 252]
    for first in (1, 1023, 1024, 1025, 2299, 2300, 5000):
        assert list(read_conversations(work.out, first)) == found[first:]
    whole = build(sets, workspace(tmp_path / "whole"), ConversationsRecipe(2300, 0, 0, 0, 0))
    monkeypatch.undo()
    assert whole == found == build(sets, workspace(tmp_path / "again"), ConversationsRecipe(2300, 0, 0, 0, 0))


def _talk(*roles: str, **contents: str) -> dict[str, Any]:
    return {"messages": [{"role": role, "content": contents.get(role, "hello")} for role in roles]}


def test_rows_with_nothing_to_learn_are_left_out_and_counted(sets: Path, tmp_path: Path) -> None:
    rows = [
        _talk("system", "user", "assistant", "user", "assistant"),
        _talk("user", "assistant"),
        _talk("user", "assistant", "user"),
        _talk("user", "assistant", assistant=" \n"),
        _talk("system", "user", "assistant", system=""),
    ]
    write_rows(tmp_path / "out" / "smoltalk" / "train-00000.parquet", "smoltalk", rows)
    work = workspace(tmp_path / "work")
    found = build(tmp_path / "out", work, ConversationsRecipe(10, 0, 0, 0, 0))
    assert Counter(len(each) for each in found) == {5: 2, 2: 2}
    assert work.metrics.summaries["left_out"] == 6


@pytest.mark.parametrize(
    "broken",
    [
        _talk("assistant", "user"),
        _talk("user", "user", "assistant"),
        _talk("user", "system", "assistant"),
        _talk("system"),
        _talk("user", "assistant", "narrator"),
        _talk(),
    ],
)
def test_a_row_that_is_no_conversation_is_refused_by_file_and_row(
    tmp_path: Path, broken: dict[str, Any]
) -> None:
    rows = [_talk("user", "assistant"), broken]
    write_rows(tmp_path / "out" / "smoltalk" / "train-00000.parquet", "smoltalk", rows)
    with pytest.raises(BadInput, match=r"train-00000\.parquet row 1 is no conversation"):
        build(tmp_path / "out", workspace(tmp_path / "work"), ConversationsRecipe(2, 0, 0, 0, 0))


def test_a_question_without_its_answer_is_refused_by_file_and_row(tmp_path: Path) -> None:
    row = {"question": "Q?", "subject": "", "choices": ["x", "y"], "answer": 7}
    write_rows(tmp_path / "out" / "mmlu" / "auxiliary_train-00000.parquet", "mmlu", [row])
    with pytest.raises(
        BadInput, match=r"auxiliary_train-00000\.parquet row 0 cannot be taught: mmlu: the answer"
    ):
        build(tmp_path / "out", workspace(tmp_path / "work"), ConversationsRecipe(0, 1, 0, 0, 0))
    with pytest.raises(BadInput, match="holds no gsm8k/train"):
        build(tmp_path / "out", workspace(tmp_path / "work"), ConversationsRecipe(0, 0, 0, 1, 0))
    with pytest.raises(BadInput, match="no rows of any set"):
        build(tmp_path / "out", workspace(tmp_path / "work"), ConversationsRecipe(0, 0, 0, 0, 0))


def test_every_conversation_can_be_rendered_and_says_who_it_is(sets: Path, tmp_path: Path) -> None:
    found = build(sets, workspace(tmp_path))
    tokenizer = BpeTokenizer(train_bpe([json.dumps(each) for each in found], 700))
    for messages in found:
        ids, mask = render_conversation(tokenizer, messages)
        assert len(ids) == len(mask)
        assert any(mask)
    said = [identity_conversation(np.random.default_rng(i)) for i in range(300)]
    texts = [message["content"] for messages in said for message in messages]
    assert len({messages[0]["content"] for messages in said}) > 40
    assert any("nanochat-omni" in text for text in texts)
    assert not any("{" in text for text in texts)
