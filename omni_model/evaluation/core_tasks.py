"""What CORE asks: the tasks and items of a bundle, read with suspicion.

A bundle is `core.yaml` (which tasks there are and how they are put), `eval_meta_data.csv` (what guessing gets
right in each) and `eval_data/**.jsonl` (an item a line). What is not understood is refused: a field that is
passed over in silence would change what is measured.
"""

import csv
import json
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from omni_model.config import BadInput

TASKS_FILE, BASELINES_FILE, DATA = "core.yaml", "eval_meta_data.csv", "eval_data"
PUBLISHED, MINIATURE = "dclm", "miniature"
LABEL, BASELINE = "Eval Task", "Random baseline"  # the columns that are read
FIELDS = (  # of a task; the last is how the makers of the real one grouped their results
    "label",
    "icl_task_type",
    "dataset_uri",
    "num_fewshot",
    "continuation_delimiter",
    "has_categories",
)
MULTIPLE_CHOICE, SCHEMA, LANGUAGE_MODELING = "multiple_choice", "schema", "language_modeling"
KINDS = (MULTIPLE_CHOICE, SCHEMA, LANGUAGE_MODELING)


@dataclass(frozen=True)
class Task:
    """How the items of a task are put; `baseline` is the share that guessing gets right."""

    label: str
    kind: str
    dataset: str  # below eval_data/
    num_fewshot: int
    delimiter: str  # between context and continuation
    baseline: float

    def centered(self, accuracy: float) -> float:
        """0 for guessing, 1 for perfect."""
        return (accuracy - self.baseline) / (1 - self.baseline)


@dataclass(frozen=True)
class Bundle:
    """Tasks in order, and whose they are: "dclm", or "miniature" where `core.yaml` says so."""

    name: str
    tasks: tuple[Task, ...]


@dataclass(frozen=True)
class Item:
    """The options of an item, a context with a continuation each, and which of them is right.

    Those of multiple choice share the context, those of a schema the continuation; language modeling has one.
    """

    options: tuple[tuple[str, str], ...]
    gold: int


def read_bundle(directory: Path) -> Bundle:
    """What a bundle's directory asks.

    Raises:
        BadInput: `core.yaml` or `eval_meta_data.csv` is missing, or says something that is not understood.
    """
    import yaml  # Prefect brings it

    path = directory / TASKS_FILE
    baselines = _baselines(directory / BASELINES_FILE)
    try:
        plain = yaml.safe_load(path.read_bytes())
        tasks = tuple(_task(each, baselines) for each in plain["icl_tasks"])
        name = str(plain.get("bundle", PUBLISHED))
    except OSError as error:
        raise BadInput(f"{path} cannot be read ({error.strerror}); fetch the bundle again") from None
    except (yaml.YAMLError, KeyError, TypeError, AttributeError):
        raise BadInput(f"{path} is no list of tasks below `icl_tasks`; fetch the bundle again") from None
    except ValueError as error:
        raise BadInput(f"{path}: {error}") from None
    if not tasks or len({task.label for task in tasks}) < len(tasks):
        raise BadInput(f"{path} has {'a label twice' if tasks else 'no task'}; fetch the bundle again")
    return Bundle(name, tasks)


def _task(plain: Any, baselines: dict[str, float]) -> Task:
    """ValueError says what is wrong with it."""
    label = plain["label"]
    if unknown := sorted(set(plain) - set(FIELDS)):
        raise ValueError(f"the task {label!r} has a field {unknown[0]!r}; known are {', '.join(FIELDS)}")
    dataset, shots = PurePosixPath(plain["dataset_uri"]), plain["num_fewshot"]
    delimiter = plain.get("continuation_delimiter", " ")
    checks = (
        (isinstance(label, str) and label in baselines, f"is not in {BASELINES_FILE}"),
        (
            plain["icl_task_type"] in KINDS,
            f"is of the kind {plain['icl_task_type']!r}, not {', '.join(KINDS)}",
        ),
        (not dataset.is_absolute() and ".." not in dataset.parts, f"leads out of the bundle to {dataset}"),
        (
            isinstance(shots, list) and len(shots) == 1 and type(shots[0]) is int and shots[0] >= 0,
            f"has num_fewshot {shots!r}; it must be one number in brackets",
        ),
        (isinstance(delimiter, str), f"has continuation_delimiter {delimiter!r}; it must be text"),
    )
    for good, problem in checks:
        if not good:
            raise ValueError(f"the task {label!r} {problem}")
    return Task(label, plain["icl_task_type"], str(dataset), shots[0], delimiter, baselines[label])


def _baselines(path: Path) -> dict[str, float]:
    """What guessing gets right in each task; the file says it in percent."""
    try:
        with path.open(encoding="utf-8", newline="") as file:
            found = {row[LABEL]: 0.01 * float(row[BASELINE]) for row in csv.DictReader(file)}
        if all(0 <= share < 1 for share in found.values()):
            return found
    except OSError as error:
        raise BadInput(f"{path} cannot be read ({error.strerror}); fetch the bundle again") from None
    except (KeyError, TypeError, ValueError, csv.Error):
        pass
    raise BadInput(f"{path} needs the columns {LABEL!r} and {BASELINE!r}, from 0 to below 100, in every row")


def read_items(bundle: Path, task: Task) -> list[Item]:
    """The items of a task, in the file's order.

    Raises:
        BadInput: the file is missing or empty, or a line is no item of the task's kind; file and line are
            named.
    """
    path = bundle / DATA / task.dataset
    items: list[Item] = []
    try:
        with path.open("rb") as file:
            for line in file:
                items.append(_item(task.kind, json.loads(line.decode("utf-8"))))
    except OSError as error:
        raise BadInput(f"{path} of {task.label} cannot be read ({error.strerror}); fetch it again") from None
    except (ValueError, KeyError, TypeError) as error:
        problem = f"it has no {error}" if isinstance(error, KeyError) else error
        raise BadInput(
            f"{path} line {len(items) + 1} is no item of {task.kind} ({problem}); mend it"
        ) from None
    if not items:
        raise BadInput(f"{path} of {task.label} is empty; fetch it again")
    return items


def _item(kind: str, plain: Any) -> Item:
    """As JSON has it. KeyError, TypeError or ValueError say what is wrong with it."""
    if kind == LANGUAGE_MODELING:
        return Item(((_text(plain["context"]).strip(), _text(plain["continuation"])),), 0)
    if kind == MULTIPLE_CHOICE:
        options = [(_text(plain["query"]), _text(each)) for each in _list(plain["choices"])]
    else:
        options = [(_text(each), _text(plain["continuation"])) for each in _list(plain["context_options"])]
    gold = plain["gold"]
    if type(gold) is not int or not 0 <= gold < len(options):
        raise ValueError(f"gold {gold!r} is none of its {len(options)} options")
    return Item(tuple(options), gold)


def _text(value: Any) -> str:
    if not isinstance(value, (str, int, float)):
        raise TypeError(f"{value!r} is not text")
    return str(value)


def _list(value: Any) -> list[Any]:
    if not isinstance(value, list):
        raise TypeError(f"{value!r} is not a list")
    return value
