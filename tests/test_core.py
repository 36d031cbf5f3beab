"""CORE against nanochat's own run of it, its bundles from outside, and the stage that judges a base model."""

import csv
import dataclasses
import json
import math
import random
import shutil
import zipfile
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from omni_model.artifacts import (
    BaseScores,
    CoreBundle,
    GptCheckpoint,
    Manifest,
    TextCorpus,
    TokenizerFiles,
    hash_payload,
    sha256_file,
)
from omni_model.config import (
    BadInput,
    BaseEvaluationRecipe,
    CoreBundleRecipe,
    GptShape,
    MiniatureCoreRecipe,
    Runtime,
    TextRecipe,
    TokenizerRecipe,
)
from omni_model.evaluation import core, core_bundle
from omni_model.evaluation.base_evaluation import evaluate_base
from omni_model.evaluation.core import Scored, in_order, judge, prompts, rows_of_items, score
from omni_model.evaluation.core_bundle import fetch_core, write_core
from omni_model.evaluation.core_tasks import KINDS, Item, Task, read_bundle, read_items
from omni_model.model.gpt import GPT, GPTConfig
from omni_model.model.weights import new_gpt, save_gpt
from omni_model.outside import digest_folder
from omni_model.storage import Workspace
from omni_model.telemetry import Metrics
from omni_model.text.embedded import write_corpus
from omni_model.text.tokenizer import ByteTokenizer, train_tokenizer
from tests.loopback import FileServer, dead_url, file_server, stay_at_home
from tests.test_model import with_formula_weights

GOLDEN = Path(__file__).parent / "golden" / "core.json"
SHAPE = GptShape(n_layer=2, n_embd=32, n_head=2, n_kv_head=1, sequence_len=64, window_pattern="SL")
RECIPE = BaseEvaluationRecipe(split_tokens=512, core_items_per_task=4, dtype="float32")
BYTES = ByteTokenizer()


@pytest.fixture(scope="module")
def golden() -> dict[str, Any]:
    return json.loads(GOLDEN.read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def golden_gpt(golden: dict[str, Any]) -> GPT:
    return with_formula_weights(GPT(GPTConfig(**golden["config"]))).eval()


def write_bundle(directory: Path, golden: dict[str, Any]) -> Path:
    """The bundle that nanochat judged, in its own formats."""
    for name, items in golden["data"].items():
        path = directory / "eval_data" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("".join(json.dumps(item) + "\n" for item in items), encoding="utf-8")
    (directory / "core.yaml").write_text(json.dumps({"icl_tasks": golden["tasks"]}))
    with (directory / "eval_meta_data.csv").open("w", newline="") as file:
        table = csv.writer(file)
        table.writerow(("Eval Task", "Description", "Random baseline"))
        table.writerows((label, "some, text", percent) for label, percent in golden["baselines"].items())
    return directory


@pytest.fixture
def bundle(tmp_path: Path, golden: dict[str, Any]) -> Path:
    return write_bundle(tmp_path / "bundle", golden)


class Killed(Exception):
    """Stands for SIGKILL."""


class KillingMetrics(Metrics):
    """Ends the work at the first line at or after a step."""

    def __init__(self, path: Path, step: int) -> None:
        super().__init__(path)
        self._last = step

    def log(self, step: int, total: int, **values: float) -> None:
        if step >= self._last:
            raise Killed


def workspace(directory: Path, kill_at: int = 0) -> Workspace:
    for name in ("out", "partial"):
        (directory / name).mkdir(parents=True, exist_ok=True)
    path = directory / "metrics.jsonl"
    return Workspace(directory, 5, KillingMetrics(path, kill_at) if kill_at else Metrics(path))


# --- the original ----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["all", "seven", "short"])
def test_prompts_rows_losses_verdicts_and_core_are_the_originals(
    name: str, golden: dict[str, Any], golden_gpt: GPT, bundle: Path
) -> None:
    expected = golden["runs"][name]
    count, max_tokens = max(0, expected["max_per_task"]), expected["max_tokens"] or len(golden_gpt.cos)
    centered = []
    for task, theirs in zip(read_bundle(bundle).tasks, expected["tasks"], strict=True):
        items = in_order(read_items(bundle, task), count)
        whole = rows_of_items(task, items, range(len(items)), BYTES, 10**6)
        scored = score(golden_gpt, rows_of_items(task, items, range(len(items)), BYTES, max_tokens))
        verdicts = judge(task, items, golden_gpt, BYTES, max_tokens=max_tokens)
        for index, item in enumerate(theirs["items"]):
            where = f"{task.label}, item {index}"
            if "prompts" in item:
                assert prompts(task, items, index) == item["prompts"], where
            assert [zlib.crc32(str(row.ids).encode()) for row in whole[index]] == item["rows"], where
            assert [len(row.ids) for row in whole[index]] == item["ends"], where
            for row, start, loss, own in zip(
                whole[index], item["starts"], item["losses"], scored[index], strict=True
            ):
                if loss is None:  # of no tokens at all
                    assert math.isnan(own.loss), where
                else:
                    assert row.start == start, where
                    assert own.loss == pytest.approx(loss, abs=1e-5), where
            assert verdicts[index] == item["right"], where
        accuracy = sum(verdicts) / len(verdicts)
        assert accuracy == pytest.approx(theirs["accuracy"], abs=1e-6)
        centered.append(task.centered(accuracy))
        assert centered[-1] == pytest.approx(theirs["centered"], abs=1e-6)
    assert sum(centered) / len(centered) == pytest.approx(expected["core"], abs=1e-6)


# --- scoring ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_a_batch_from_shared_beginnings_equals_every_row_alone(
    kind: str, golden_gpt: GPT, monkeypatch: pytest.MonkeyPatch
) -> None:
    rng = random.Random(3)

    def text(most: int) -> str:
        return " ".join(rng.choice(["a", "two", "kitchen"]) for _ in range(rng.randint(1, most)))

    items = []
    for _ in range(6):
        shared = text(50)  # beyond the short window of 128
        options = {
            "multiple_choice": [(shared, text(3)) for _ in range(3)],
            "schema": [(f"{shared} {text(8)}", "the end") for _ in range(2)],
            "language_modeling": [(shared, text(3))],
        }[kind]
        items.append(Item(tuple(options), 0))
    task = Task("t", kind, "", 1, " ", 0.0)
    rows = rows_of_items(task, items, range(len(items)), BYTES, 300)
    alone = []
    for each in rows:
        for row in each:
            logits = golden_gpt(torch.tensor([row.ids[:-1]]))[0, row.start - 1 :]
            wanted = torch.tensor(row.ids[row.start :])
            exact = bool((logits.argmax(-1) == wanted).all())
            alone.append((F.cross_entropy(logits, wanted).item() if len(wanted) else math.nan, exact))
    for limits in ({}, {"MAX_POSITIONS": 500}, {"MAX_LOGITS": 10_000}, {"MAX_CACHE_BYTES": 10**5}):
        with monkeypatch.context() as patch:
            for name, value in limits.items():
                patch.setattr(core, name, value)
            found = [one for each in score(golden_gpt, rows) for one in each]
        for one, (loss, exact) in zip(found, alone, strict=True):
            assert one.loss == pytest.approx(loss, abs=1e-5, nan_ok=True)
            assert one.exact == exact


def test_verdicts_of_ties_and_of_nothing_are_the_first_option() -> None:
    def right(kind: str, gold: int, *losses: float) -> bool:
        return core.is_right(kind, gold, [Scored(loss, True) for loss in losses])

    assert right("multiple_choice", 1, 2.0, 1.0, 1.0)
    assert not right("schema", 2, 2.0, 1.0, 1.0)
    assert right("multiple_choice", 0, math.nan, 1.0)  # as a comparison with nan falls out in nanochat
    assert not right("multiple_choice", 0, 2.0, math.nan, 1.0)
    assert core.is_right("language_modeling", 0, [Scored(9.0, True)])


def test_what_cannot_be_scored_is_named(golden_gpt: GPT) -> None:
    def judged(kind: str, shots: int, options: list[tuple[str, str]], max_tokens: int = 50) -> list[bool]:
        items = [Item(tuple(options), 0)] * 3
        task = Task("birds", kind, "", shots, "", 0.0)
        return judge(task, items, golden_gpt, BYTES, max_tokens=max_tokens)

    with pytest.raises(BadInput, match="birds puts 3 examples in front of an item and has 3 items"):
        judged("multiple_choice", 3, [("a", "b")])
    with pytest.raises(
        BadInput, match="birds, item 0 of those judged, scores 60 tokens and the model reads 50"
    ):
        judged("multiple_choice", 0, [("a", "b" * 60), ("a", "c")])
    with pytest.raises(BadInput, match="birds, item 0 .* its continuation '' is no tokens of its own"):
        judged("language_modeling", 0, [("a", "")])
    assert len(judged("language_modeling", 2, [("a" * 60, "b")])) == 3  # its beginning is cut off


# --- reading ---------------------------------------------------------------------------------------


def change_task(bundle: Path, **fields: Any) -> None:
    plain = json.loads((bundle / "core.yaml").read_text())
    plain["icl_tasks"][0] |= fields
    (bundle / "core.yaml").write_text(json.dumps(plain))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (
            {"prompt_string": "Q: "},
            "the task 'mc' has a field 'prompt_string'; known are label, icl_task_type",
        ),
        ({"label": "unheard of"}, "'unheard of' is not in eval_meta_data.csv"),
        ({"icl_task_type": "poetry"}, "of the kind 'poetry', not multiple_choice"),
        ({"dataset_uri": "../secret.jsonl"}, r"leads out of the bundle to \.\./secret.jsonl"),
        ({"dataset_uri": "/etc/passwd"}, "leads out of the bundle"),
        ({"num_fewshot": 3}, "num_fewshot 3; it must be one number in brackets"),
        ({"num_fewshot": [True]}, "num_fewshot"),
        ({"continuation_delimiter": None}, "continuation_delimiter None"),
        ({"label": "lm few"}, "has a label twice"),
        ({"dataset_uri": 7}, "no list of tasks"),
    ],
)
def test_a_task_that_is_not_understood_is_named(bundle: Path, fields: dict[str, Any], message: str) -> None:
    change_task(bundle, **fields)
    with pytest.raises(BadInput, match=message):
        read_bundle(bundle)


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("core.yaml", "icl_tasks: []", "has no task"),
        ("core.yaml", "icl_tasks: [", "no list of tasks"),
        ("core.yaml", "!!python/object/apply:os.getcwd []", "no list of tasks"),
        ("core.yaml", "", "no list of tasks"),
        (
            "eval_meta_data.csv",
            "Eval Task,Chance\nmc,1\n",
            "needs the columns 'Eval Task' and 'Random baseline'",
        ),
        ("eval_meta_data.csv", "Eval Task,Random baseline\nmc,100\n", "from 0 to below 100"),
        ("eval_meta_data.csv", "Eval Task,Random baseline\nmc\n", "in every row"),
    ],
)
def test_a_bundle_that_is_not_understood_is_named(bundle: Path, name: str, text: str, message: str) -> None:
    (bundle / name).write_text(text)
    with pytest.raises(BadInput, match=message):
        read_bundle(bundle)


def test_yaml_as_people_write_it_is_read(bundle: Path) -> None:
    (bundle / "core.yaml").write_text(
        "icl_tasks:\n-\n  label: mc\n  dataset_uri: some/mc.jsonl # where\n  num_fewshot: [10]\n"
        '  icl_task_type: multiple_choice\n  continuation_delimiter: "\\nAnswer: "\n  has_categories: true\n'
    )
    found = read_bundle(bundle)
    assert found.name == "dclm"
    assert found.tasks == (Task("mc", "multiple_choice", "some/mc.jsonl", 10, "\nAnswer: ", 0.01 * 33.3),)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b'{"query": "a", "choices": ["b"]}', "line 9 is no item of multiple_choice .it has no 'gold'."),
        (b'{"query": "a", "choices": ["b"], "gold": 1}', "line 9 .* .gold 1 is none of its 1 options"),
        (b'{"query": "a", "choices": "bc", "gold": 1}', "line 9 .*'bc' is not a list"),
        (b'{"query": null, "choices": ["b"], "gold": 0}', "line 9 .*None is not text"),
        (b'{"query": "a", "choices": ["b"], "go', "line 9"),
        (b"[]", "line 9"),
        (b"", "line 9"),
        (b'{"query": "\xff", "choices": ["b"], "gold": 0}', "line 9 .*utf-8"),
    ],
)
def test_a_broken_line_is_named(bundle: Path, line: bytes, message: str) -> None:
    path = bundle / "eval_data" / "some" / "mc.jsonl"
    path.write_bytes(path.read_bytes() + line + b"\n")
    with pytest.raises(BadInput, match=f"{path} {message}"):
        read_items(bundle, read_bundle(bundle).tasks[0])
    path.write_bytes(b"")
    with pytest.raises(BadInput, match="mc.jsonl of mc is empty"):
        read_items(bundle, read_bundle(bundle).tasks[0])


# --- from outside ----------------------------------------------------------------------------------


def zipped(bundle: Path, target: Path, inside: str = "eval_bundle/") -> Path:
    with zipfile.ZipFile(target, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("../outside.txt", "never written")
        archive.writestr("eval_bundle/eval_data/unasked.jsonl", "never taken")
        for path in sorted(bundle.rglob("*")):
            if path.is_file():
                archive.write(path, inside + path.relative_to(bundle).as_posix())
    return target


def fetched(directory: Path, recipe: CoreBundleRecipe) -> CoreBundle:
    work = workspace(directory)
    facts = fetch_core(recipe, work=work, runtime=Runtime())
    assert set(facts) == CoreBundle.fact_names()
    handle = CoreBundle("fetch_core", "k", str(directory), "d", **facts)  # type: ignore[arg-type]
    files = hash_payload(handle.out)
    Manifest("fetch_core", "k", "CoreBundle", {}, files, facts, work.metrics.summaries, {}, {}).write(
        directory
    )
    return handle


@pytest.mark.parametrize("inside", ["", "eval_bundle/"])
def test_a_folder_and_a_zip_give_the_files_that_are_asked_for(
    tmp_path: Path, bundle: Path, inside: str
) -> None:
    archive = zipped(bundle, tmp_path / "own.zip", inside)
    folder = tmp_path / "own"
    shutil.copytree(bundle, folder / inside)
    one = fetched(tmp_path / "one", CoreBundleRecipe(place=str(archive), digest=sha256_file(archive)))
    assert (one.num_tasks, one.num_items) == (6, 54)
    assert not (tmp_path / "outside.txt").exists()
    names = [file.path for file in hash_payload(one.out)]
    assert names == [
        "core.yaml",
        *(f"eval_data/{name}.jsonl" for name in ("lm_exact", "lm_few", "mc_few", "some/mc", "some/schema")),
        "eval_meta_data.csv",
    ]
    two = fetched(tmp_path / "two", CoreBundleRecipe(place=str(folder), digest=digest_folder(folder)))
    assert hash_payload(two.out) == hash_payload(one.out)
    with pytest.raises(BadInput, match="own.zip is not what it was when the run was planned"):
        fetched(tmp_path / "three", CoreBundleRecipe(place=str(archive), digest="0" * 64))
    with pytest.raises(BadInput, match="nowhere.zip is not there"):
        fetched(tmp_path / "three", CoreBundleRecipe(place=str(tmp_path / "nowhere.zip")))


def cut_short(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def damaged(path: Path) -> None:
    content = bytearray(path.read_bytes())
    at = content.index(b"core.yaml") + 40
    content[at : at + 8] = b"\0" * 8
    path.write_bytes(content)


@pytest.mark.parametrize(
    ("harm", "message"),
    [
        (cut_short, "own.zip is not a whole zip file"),
        (damaged, "own.zip is not a whole zip file"),
        (lambda path: path.write_bytes(b"<!DOCTYPE html><html>sign in</html>"), "own.zip is a web page"),
        (lambda path: path.write_bytes(b""), "own.zip is not a whole zip file"),
        (lambda path: zipfile.ZipFile(path, "w").close(), "holds no core.yaml, nor eval_bundle/core.yaml"),
    ],
)
def test_a_zip_that_is_not_whole_is_named(
    tmp_path: Path, bundle: Path, harm: Callable[[Path], None], message: str
) -> None:
    archive = zipped(bundle, tmp_path / "own.zip")
    harm(archive)
    with pytest.raises(BadInput, match=message):
        fetched(tmp_path / "stage", CoreBundleRecipe(place=str(archive)))


def test_a_missing_task_file_and_a_bundle_without_end_are_named(
    tmp_path: Path, bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(core_bundle, "MAX_BYTES", 3000)
    with pytest.raises(BadInput, match="makes the bundle larger than"):
        fetched(tmp_path / "one", CoreBundleRecipe(place=str(zipped(bundle, tmp_path / "own.zip"))))
    monkeypatch.undo()
    (bundle / "eval_data" / "mc_few.jsonl").unlink()
    for place in (bundle, zipped(bundle, tmp_path / "own.zip")):
        with pytest.raises(BadInput, match="the bundle has no eval_data/mc_few.jsonl"):
            fetched(tmp_path / "two", CoreBundleRecipe(place=str(place)))


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[FileServer]:
    stay_at_home(monkeypatch)
    with file_server() as files:
        monkeypatch.setattr(core_bundle, "URLS", (f"{files.url}/eval_bundle.zip",))
        yield files


def test_a_download_is_pinned_and_not_repeated(
    tmp_path: Path, bundle: Path, server: FileServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    archive = zipped(bundle, tmp_path / "made.zip")
    first, lock = archive.read_bytes(), tmp_path / "stage" / "bundle.lock.json"
    server.files["/eval_bundle.zip"] = first
    server.faults["/eval_bundle.zip"] = ["cut"]
    handle = fetched(tmp_path / "stage" / "a", CoreBundleRecipe())
    assert json.loads(lock.read_text()) == {"sha256": sha256_file(archive)}
    assert handle.num_tasks == 6
    monkeypatch.setenv("OMNI_OFFLINE", "1")
    before = len(server.requests)
    again = fetched(tmp_path / "stage" / "b", CoreBundleRecipe())  # from the first, as if code had changed
    assert hash_payload(again.out) == hash_payload(handle.out)
    assert len(server.requests) == before
    with pytest.raises(BadInput, match="OMNI_OFFLINE is set"):
        fetched(tmp_path / "stage" / "c", CoreBundleRecipe(sha256="1" * 64))
    monkeypatch.delenv("OMNI_OFFLINE")
    with pytest.raises(BadInput, match="its sha256 is .*, not 1111.*; the recipe pins it to 1111"):
        fetched(tmp_path / "stage" / "c", CoreBundleRecipe(sha256="1" * 64))
    for name in "ab":
        (tmp_path / "stage" / name / "manifest.json").unlink()
    server.files["/eval_bundle.zip"] = zipped(bundle, tmp_path / "other.zip", "").read_bytes()
    with pytest.raises(BadInput, match=f"{lock} pins it to"):
        fetched(tmp_path / "stage" / "d", CoreBundleRecipe())
    server.files["/eval_bundle.zip"] = first
    assert fetched(tmp_path / "stage" / "d", CoreBundleRecipe()).num_items == 54


def test_a_server_that_has_no_bundle_is_named_and_what_is_no_bundle_is_forgotten(
    tmp_path: Path, bundle: Path, server: FileServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    archive = zipped(bundle, tmp_path / "made.zip")
    server.files["/eval_bundle.zip"] = archive.read_bytes()[:-30]
    server.faults["/eval_bundle.zip"] = ["page"]
    with pytest.raises(BadInput, match="eval_bundle.zip could not be downloaded: .*page"):
        fetched(tmp_path / "stage" / "a", CoreBundleRecipe())
    with pytest.raises(BadInput, match="eval_bundle.zip is not a whole zip file"):
        fetched(tmp_path / "stage" / "a", CoreBundleRecipe())
    assert not (tmp_path / "stage" / "bundle.lock.json").exists()
    server.files["/eval_bundle.zip"] = archive.read_bytes()
    assert fetched(tmp_path / "stage" / "a", CoreBundleRecipe()).num_tasks == 6  # the run goes on
    monkeypatch.setattr(core_bundle, "URLS", (f"{dead_url()}/eval_bundle.zip",))
    (tmp_path / "stage" / "bundle.lock.json").unlink()
    with pytest.raises(BadInput, match="nobody answers there.* or name a folder or zip that holds it"):
        fetched(tmp_path / "stage" / "b", CoreBundleRecipe())


# --- in miniature ----------------------------------------------------------------------------------


def miniature(directory: Path, seed: int = 5, items: int = 30) -> CoreBundle:
    work = dataclasses.replace(workspace(directory), seed=seed)
    facts = write_core(MiniatureCoreRecipe(items_per_task=items), work=work, runtime=Runtime())
    assert set(facts) == CoreBundle.fact_names()
    return CoreBundle("write_core", "k", str(directory), "d", **facts)  # type: ignore[arg-type]


def test_the_miniature_bundle_can_be_read_and_answered(tmp_path: Path) -> None:
    handle = miniature(tmp_path / "a")
    found = read_bundle(handle.out)
    assert found.name == "miniature"
    assert {task.kind for task in found.tasks} == set(KINDS)
    assert handle.num_items == 30 * handle.num_tasks == 30 * len(found.tasks)
    items = {task.label: read_items(handle.out, task) for task in found.tasks}
    for label in ("facts_of_stories", "facts_of_sounds"):
        for item in items[label]:  # the answer stands in what was told
            context, answer = item.options[item.gold]
            assert answer in context.split("\n")[0].lower(), label
    for item in items["which_story"]:
        assert item.options[item.gold][1] in item.options[item.gold][0].lower()
        assert len({context.split("\n")[1] for context, _ in item.options}) == 1
    for task in found.tasks:
        golds = [item.gold for item in items[task.label]]
        options = len(items[task.label][0].options)
        assert task.baseline == (1 / options if options > 1 else 0)
        assert all(len(set(item.options)) == options for item in items[task.label])
        assert set(golds) == set(range(options))
        assert max(map(golds.count, golds)) <= 30 * (0.55 if options == 4 else 0.75) or options == 1


def test_the_miniature_bundle_has_the_same_bytes_and_its_items_are_alike_in_any_number(
    tmp_path: Path,
) -> None:
    one, two, three = (miniature(tmp_path / name) for name in "abc")
    fewer, other = miniature(tmp_path / "d", items=10), miniature(tmp_path / "e", seed=6)
    assert hash_payload(one.out) == hash_payload(two.out) == hash_payload(three.out)
    for task in read_bundle(one.out).tasks:
        items = read_items(one.out, task)
        assert read_items(fewer.out, task) == items[:10]
        assert read_items(other.out, task) != items


# --- the stage -------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class World:
    gpt: GptCheckpoint
    tokenizer: TokenizerFiles
    text: TextCorpus
    core: CoreBundle


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    place = tmp_path_factory.mktemp("world")

    def made(stage: Callable[..., Any], kind: Any, recipe: Any, *inputs: Any) -> Any:
        directory = place / kind.__name__
        facts = stage(recipe, *inputs, work=workspace(directory), runtime=Runtime())
        return kind(stage.__name__, "k", str(directory), "d", **facts)

    text = made(write_corpus, TextCorpus, TextRecipe(num_documents=60, validation_documents=20))
    tokenizer = made(train_tokenizer, TokenizerFiles, TokenizerRecipe(vocab_size=320), text)
    gpt = new_gpt(SHAPE, tokenizer.vocab_size, seed=1)
    with torch.no_grad():
        with_formula_weights(gpt)
    save_gpt(gpt, place / "GptCheckpoint" / "out")
    sizes = {"num_parameters": gpt.num_params(), "steps": 1, "n_embd": 32, "vocab_size": tokenizer.vocab_size}
    checkpoint = GptCheckpoint("pretrain_gpt", "k", str(place / "GptCheckpoint"), "d", **sizes)
    return World(checkpoint, tokenizer, text, miniature(place / "core", items=6))


def evaluated(world: World, work: Workspace, recipe: BaseEvaluationRecipe = RECIPE) -> BaseScores:
    inputs = (world.gpt, world.tokenizer, world.text, world.core)
    facts = evaluate_base(recipe, *inputs, work=work, runtime=Runtime())
    assert set(facts) == BaseScores.fact_names()
    return BaseScores("evaluate_base", "k", str(work.directory), "d", **facts)  # type: ignore[arg-type]


def test_a_base_model_is_judged_and_a_killed_evaluation_ends_in_the_same_bytes(
    tmp_path: Path, world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    work = workspace(tmp_path / "straight")
    handle = evaluated(world, work)
    scores = json.loads((handle.out / "scores.json").read_text())
    assert set(scores) == {"val_bpb", "train_bpb", "core", "bundle", "tasks", "continuations"}
    assert scores["bundle"] == "miniature"
    assert (scores["val_bpb"], scores["core"]) == (handle.val_bpb, handle.core)
    assert all(0 < scores[name] < 30 for name in ("val_bpb", "train_bpb"))
    assert {name: scores[name] for name in ("val_bpb", "train_bpb", "core")} == work.metrics.summaries
    assert list(scores["tasks"]) == sorted(task.label for task in read_bundle(world.core.out).tasks)
    for task in scores["tasks"].values():
        assert set(task) == {"kind", "accuracy", "baseline", "centered", "n"}
        assert task["n"] == 4
        assert task["accuracy"] * 4 % 1 == 0
    mean = sum(task["centered"] for task in scores["tasks"].values()) / len(scores["tasks"])
    assert scores["core"] == pytest.approx(mean, abs=1e-6)
    assert all(set(each) == {"prompt", "text"} for each in scores["continuations"])

    for step in (5, 25, 60, 125):  # in the first figure, in a task, between tasks, in the last one
        with pytest.raises(Killed):
            evaluated(world, workspace(tmp_path / "killed", kill_at=step))
    computed: list[str] = []
    monkeypatch.setattr(
        "omni_model.evaluation.base_evaluation.judge",
        lambda task, *rest, **named: computed.append(task.label) or judge(task, *rest, **named),
    )
    resumed = evaluated(world, workspace(tmp_path / "killed"))
    assert len(computed) <= 1  # everything before it was kept
    assert hash_payload(resumed.out) == hash_payload(handle.out)


def test_all_items_are_judged_where_the_recipe_says_zero(tmp_path: Path, world: World) -> None:
    handle = evaluated(
        world, workspace(tmp_path), dataclasses.replace(RECIPE, core_items_per_task=0, dtype="auto")
    )
    scores = json.loads((handle.out / "scores.json").read_text())
    assert {task["n"] for task in scores["tasks"].values()} == {6}


def test_a_tokenizer_of_another_vocabulary_is_refused(tmp_path: Path, world: World) -> None:
    other = dataclasses.replace(world, gpt=dataclasses.replace(world.gpt, vocab_size=999))
    with pytest.raises(
        BadInput, match="has 999 tokens and the tokenizer in .* judge the GPT with the tokenizer"
    ):
        evaluated(other, workspace(tmp_path))


def test_bfloat16_judges_alike(world: World, tmp_path: Path) -> None:
    recipe = dataclasses.replace(RECIPE, split_tokens=128, core_items_per_task=3)
    narrow = evaluated(world, workspace(tmp_path), dataclasses.replace(recipe, dtype="bfloat16"))
    wide = evaluated(world, workspace(tmp_path / "wide"), recipe)
    assert narrow.val_bpb == pytest.approx(wide.val_bpb, rel=0.02)
