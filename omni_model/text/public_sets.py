"""Public conversations and tasks as their makers publish them: parquet files, one split in one or more.

A payload is `NAME/SPLIT-NNNNN.parquet`. A set comes from Hugging Face's servers, whose listings give every
file's sha256, or from a folder of the user's. Whole files and right columns are checked before a file counts;
every value is checked when its row is read, so whoever reads rows can trust them.
"""

import json
import os
import re
import shutil
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from omni_model import hardware
from omni_model.config import JSON, BadInput, PublicSetsRecipe, Runtime
from omni_model.outside import digest_folder
from omni_model.storage import Workspace
from omni_model.text.dataset_hub import fetch_files, list_splits

if TYPE_CHECKING:
    import pyarrow

GROUP_ROWS = 1024  # rows that are read, and of files we write stored, at once
OPTIONAL = "validation"  # a split that nothing here reads, so a user's folder may lack it

Row = dict[str, Any]


@dataclass(frozen=True)
class PublicSet:
    """Where a set is published, and the columns that are read.

    Attributes:
        folder: of the parquet files `SPLIT-NNNNN-of-NNNNN.parquet` in the repository.
        columns: name -> kind, one of text, texts, number, choices, messages.
    """

    repository: str
    folder: str
    splits: tuple[str, ...]
    columns: Mapping[str, str]


ARC_SPLITS = ("train", OPTIONAL, "test")
ARC_COLUMNS = {"question": "text", "choices": "choices", "answerKey": "text"}
MMLU_COLUMNS = {"question": "text", "subject": "text", "choices": "texts", "answer": "number"}
PROGRAM_COLUMNS = ("task_id", "prompt", "canonical_solution", "test", "entry_point")
SETS = {
    "smoltalk": PublicSet("HuggingFaceTB/smol-smoltalk", "data", ("train", "test"), {"messages": "messages"}),
    "mmlu": PublicSet("cais/mmlu", "all", ("auxiliary_train", "test"), MMLU_COLUMNS),
    "arc-easy": PublicSet("allenai/ai2_arc", "ARC-Easy", ARC_SPLITS, ARC_COLUMNS),
    "arc-challenge": PublicSet("allenai/ai2_arc", "ARC-Challenge", ARC_SPLITS, ARC_COLUMNS),
    "gsm8k": PublicSet("openai/gsm8k", "main", ("train", "test"), {"question": "text", "answer": "text"}),
    "humaneval": PublicSet(
        "openai/openai_humaneval", "openai_humaneval", ("test",), dict.fromkeys(PROGRAM_COLUMNS, "text")
    ),
}


def fetch_sets(recipe: PublicSetsRecipe, *, work: Workspace, runtime: Runtime) -> dict[str, JSON]:
    """Stage: every file of the sets in `recipe.names`, downloaded or out of `recipe.place`.

    Downloads go on where a killed attempt stopped.

    Raises:
        BadInput: an unknown name, no server has a set, or a file is missing, damaged or of other columns.
    """
    names = list(dict.fromkeys(recipe.names))
    for name in names:
        _known(name)
    if recipe.place:
        _bring(names, recipe, work)
    else:
        _download(names, work)
    rows = {
        name: sum(num_rows(work.out, name, split) for split in splits_of(work.out, name)) for name in names
    }
    total = sum(rows.values())
    work.metrics.summary(num_rows=float(total), **{f"{name}_rows": float(n) for name, n in rows.items()})
    return {"num_sets": len(names), "num_rows": total}


# --- reading and writing -------------------------------------------------------------------------


def splits_of(sets: Path, name: str) -> list[str]:
    """The splits of a set that a payload directory has."""
    return [split for split in _known(name).splits if any((sets / name).glob(f"{split}-*.parquet"))]


def num_rows(sets: Path, name: str, split: str) -> int:
    """How many rows a split has.

    Raises:
        BadInput: the payload directory has none of it, or a file is damaged.
    """
    return sum(_check_file(path, name) for path in _paths(sets, name, split))


def read_rows(sets: Path, name: str, split: str) -> Iterator[Row]:
    """Every row of a split of a set in a payload directory, in order; GROUP_ROWS are in memory at once.

    Raises:
        BadInput: the payload directory has none of it, or a file or a row is not what its set promises.
    """
    for _, row in read_numbered_rows(sets, name, split):
        yield row


def read_numbered_rows(sets: Path, name: str, split: str) -> Iterator[tuple[str, Row]]:
    """The same, each with the words that tell a person where it is: the file and the row's number in it."""
    import pyarrow
    import pyarrow.parquet

    columns = _schema(name)
    for path in _paths(sets, name, split):
        _check_file(path, name)
        number = 0
        try:
            with pyarrow.parquet.ParquetFile(path) as file:
                for batch in file.iter_batches(batch_size=GROUP_ROWS, columns=columns.names):
                    for row in batch.to_pylist():
                        yield _checked(row, columns, f"{path} row {number}")
                        number += 1
        except (pyarrow.ArrowException, OSError) as error:
            raise _damaged(path, error) from None


def write_rows(path: Path, name: str, rows: Iterable[Row]) -> None:
    """Write rows of a set as parquet, whole or not at all; equal rows give equal bytes."""
    import pyarrow
    import pyarrow.parquet

    columns = _schema(name)
    path.parent.mkdir(parents=True, exist_ok=True)
    building = path.with_name(f".{path.name}.building")
    with pyarrow.parquet.ParquetWriter(building, columns, compression="zstd") as file:
        group: list[Row] = []
        for row in rows:
            group.append(row)
            if len(group) == GROUP_ROWS:
                file.write_table(pyarrow.Table.from_pylist(group, columns))
                group.clear()
        if group:
            file.write_table(pyarrow.Table.from_pylist(group, columns))
    os.replace(building, path)


def _known(name: str) -> PublicSet:
    if name not in SETS:
        raise BadInput(f"{name!r} is no public set that is known here; one of {', '.join(SETS)}")
    return SETS[name]


def _paths(sets: Path, name: str, split: str) -> list[Path]:
    if split not in _known(name).splits:
        raise BadInput(f"{name} has no split {split!r}; one of {', '.join(SETS[name].splits)}")
    found = sorted((sets / name).glob(f"{split}-*.parquet"))
    if not found:
        raise BadInput(f"{sets} holds no {name}/{split}-*.parquet; add {name} to sets.names")
    return found


def _damaged(path: Path, error: Exception) -> BadInput:
    first = str(error).strip().splitlines()[0].rstrip(".")
    return BadInput(f"{path} is not a whole parquet file ({first}); fetch or write it again")


# --- columns -------------------------------------------------------------------------------------


def _schema(name: str) -> "pyarrow.Schema":
    import pyarrow

    text = pyarrow.string()
    texts = pyarrow.list_(text)
    message = pyarrow.struct({"role": text, "content": text})
    kinds = {
        "text": text,
        "texts": texts,
        "number": pyarrow.int64(),
        "choices": pyarrow.struct({"text": texts, "label": texts}),
        "messages": pyarrow.list_(message),
    }
    return pyarrow.schema({column: kinds[kind] for column, kind in _known(name).columns.items()})


def _check_file(path: Path, name: str) -> int:
    """The number of rows of a parquet file that is whole and has the columns of its set."""
    import pyarrow
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            found, count = file.schema_arrow, int(file.metadata.num_rows)
    except (pyarrow.ArrowException, OSError) as error:
        raise _damaged(path, error) from None
    for want in _schema(name):
        if want.name not in found.names:
            raise BadInput(f"{path} lacks the column {want.name!r}; give {name} as its makers publish it")
        have = found.field(want.name).type
        if not _fits(want.type, have):
            raise BadInput(f"{path} has the column {want.name!r} as {have} and {name} has it as {want.type}")
    if not count:
        raise BadInput(f"{path} holds no rows; give {name} as its makers publish it")
    return count


def _fits(want: "pyarrow.DataType", have: "pyarrow.DataType") -> bool:
    """Whether a column can be read as it should; wider forms and further fields do not matter."""
    from pyarrow import types

    if types.is_string(want):
        return bool(types.is_string(have) or types.is_large_string(have))
    if types.is_integer(want):
        return bool(types.is_integer(have))
    if types.is_list(want):
        is_list = types.is_list(have) or types.is_large_list(have)
        return is_list and _fits(want.value_type, have.value_type)
    return bool(types.is_struct(have)) and all(
        have.get_field_index(field.name) >= 0 and _fits(field.type, have.field(field.name).type)
        for field in want
    )


def _checked(row: Any, columns: "pyarrow.Schema", where: str) -> tuple[str, Row]:
    for column in columns:
        if not isinstance(row, dict) or column.name not in row:
            raise BadInput(f"{where} lacks the column {column.name!r}; mend it or leave it out")
        if not _holds(column.type, row[column.name]):
            raise BadInput(f"{where} has no {column.type} as its {column.name!r}; mend it or leave it out")
    return where, {column.name: row[column.name] for column in columns}


def _holds(want: "pyarrow.DataType", value: object) -> bool:
    """Whether a value is what its column promises, nothing missing anywhere in it."""
    from pyarrow import types

    if types.is_string(want):
        return isinstance(value, str)
    if types.is_integer(want):
        return isinstance(value, int) and not isinstance(value, bool) and abs(value) < 2**63
    if types.is_list(want):
        return isinstance(value, list) and all(_holds(want.value_type, each) for each in value)
    return isinstance(value, dict) and all(_holds(field.type, value.get(field.name)) for field in want)


# --- a folder of the user's ----------------------------------------------------------------------


def _bring(names: list[str], recipe: PublicSetsRecipe, work: Workspace) -> None:
    """Take the files of `recipe.place` over, once all of them have been looked at."""
    place = Path(recipe.place).expanduser()
    found = {(name, split): _lying(place, name, split) for name in names for split in SETS[name].splits}
    for (name, _), paths in found.items():
        for path in paths:
            if path.suffix == ".parquet":
                _check_file(path, name)
    if recipe.digest and digest_folder(place) != recipe.digest:
        raise BadInput(f"{place} has changed since the run was planned; run again")
    done, total = 0, sum(len(paths) for paths in found.values())
    for (name, split), paths in found.items():
        for number, path in enumerate(paths):
            target = work.out / name / f"{split}-{number:05d}.parquet"
            target.parent.mkdir(parents=True, exist_ok=True)
            if path.suffix == ".parquet":
                shutil.copyfile(path, target)
            else:
                write_rows(target, name, _read_lines(path, name))
            done += 1
            work.metrics.log(done, total)


def _lying(place: Path, name: str, split: str) -> list[Path]:
    """`SPLIT.parquet`, `SPLIT-*.parquet` or `SPLIT.jsonl` of a set in the user's folder."""
    folder = place / name
    paths = sorted(path for path in folder.glob("*.parquet") if re.fullmatch(rf"{split}(-.*)?", path.stem))
    lines = folder / f"{split}.jsonl"
    if paths and lines.exists():
        raise BadInput(f"{folder} holds both {paths[0].name} and {lines.name}; leave one of them")
    if not paths and not lines.exists() and split != OPTIONAL:
        raise BadInput(
            f"{folder} holds neither {split}.parquet nor {split}.jsonl; add it, or change sets.names"
        )
    return paths or [lines] * lines.exists()


def _read_lines(path: Path, name: str) -> Iterator[Row]:
    columns = _schema(name)
    empty = True
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            try:
                row = json.loads(line.decode("utf-8"))
                json.dumps(row, ensure_ascii=False).encode(
                    "utf-8"
                )  # half a surrogate pair is JSON, but no text
            except UnicodeError:
                raise BadInput(f"{path} line {number} is not UTF-8; save the file as UTF-8") from None
            except json.JSONDecodeError as error:
                raise BadInput(f"{path} line {number} is not JSON ({error.msg}); mend it") from None
            empty = False
            yield _checked(row, columns, f"{path} line {number}")[1]
    if empty:
        raise BadInput(f"{path} holds no rows; give {name} as its makers publish it")


# --- Hugging Face --------------------------------------------------------------------------------


def _download(names: list[str], work: Workspace) -> None:
    network = hardware.network()
    if network.offline:
        raise BadInput(
            "public sets are not asked for, because OMNI_OFFLINE or HF_HUB_OFFLINE is set; "
            "give a folder with them as sets.place"
        )
    work.partial.mkdir(parents=True, exist_ok=True)
    servers, wanted = network.hugging_face, []
    for name in names:
        known = SETS[name]
        files = list_splits(known.repository, known.folder, known.splits, servers, work.partial)
        wanted += [(file, work.partial / name / f"{file.split}-{file.number:05d}.parquet") for file in files]
    fetch_files(wanted, servers, work.metrics, lambda path: _check_file(path, path.parent.name))
    for _, path in wanted:
        (work.out / path.parent.name).mkdir(parents=True, exist_ok=True)
        work.deliver(f"{path.parent.name}/{path.name}")
