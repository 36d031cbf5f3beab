"""What a text corpus is on disk: parquet files of documents, read a row group at a time.

`train-*.parquet` and `validation-*.parquet` have a column `text`, a document a row. Nothing here ever holds
more than one row group, so memory does not grow with the corpus.
"""

import contextlib
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from omni_model.config import BadInput

if TYPE_CHECKING:
    import pyarrow.parquet

TEXT = "text"
SPLITS = ("train", "validation")
GROUP_DOCUMENTS = 1024  # of the files we write
READ_DOCUMENTS = 256
READ_BYTES = 1 << 20


class BadShard(BadInput):
    """A parquet file cannot be used; `reason` is why, without the file's name."""

    def __init__(self, path: Path, reason: str, advice: str) -> None:
        super().__init__(f"{path} cannot be used: {reason}; {advice}")
        self.reason = reason


def shard_paths(directory: Path, split: str) -> list[Path]:
    """The parquet files of a split ("train", "validation") of a payload directory, in order.

    Raises:
        BadInput: there is none.
    """
    found = sorted(directory.glob(f"{split}-*.parquet"))
    if not found:
        raise BadInput(f"{directory} holds no {split}-*.parquet; write the text corpus again")
    return found


def group_sizes(path: Path) -> list[int]:
    """How many documents each row group of a parquet file holds.

    Raises:
        BadShard: the file is not whole, or not parquet.
    """
    with _opened(path) as file:
        metadata = file.metadata
        return [metadata.row_group(group).num_rows for group in range(metadata.num_row_groups)]


def read_group(path: Path, group: int, column: str = TEXT) -> list[str]:
    """The documents of one row group, in order; a null is an empty text.

    Raises:
        BadShard: the file is not whole, or has no such column of strings.
    """
    with _opened(path) as file:
        _require_strings(file, path, column)
        values: list[str | None] = file.read_row_group(group, [column]).column(0).to_pylist()
        return [value or "" for value in values]


def read_texts(directory: Path, split: str, column: str = TEXT) -> Iterator[str]:
    """Every document of a split, in order, one row group in memory at a time."""
    for path in shard_paths(directory, split):
        for group in range(len(group_sizes(path))):
            yield from read_group(path, group, column)


def check_shard(path: Path, column: str = TEXT) -> int:
    """Read a parquet file through; returns how many documents it holds.

    Raises:
        BadShard: the file is not whole, or has no such column of strings.
    """
    with _opened(path) as file:
        _require_strings(file, path, column)
        for group in range(file.metadata.num_row_groups):
            file.read_row_group(group, [column]).column(0).validate(full=True)
        return int(file.metadata.num_rows)


def read_column(path: Path, column: str) -> Iterator[str]:
    """Every string of a column, in order, some at a time however large the row groups; a null is empty.

    Raises:
        BadShard: the file is not whole, or has no such column of strings.
    """
    with _opened(path, pre_buffer=False, buffer_size=READ_BYTES) as file:
        _require_strings(file, path, column)
        for batch in file.iter_batches(batch_size=READ_DOCUMENTS, columns=[column]):
            for value in batch.column(0):
                yield value.as_py() or ""


def text_bytes(path: Path, column: str) -> int:
    """About how many bytes of text a column holds, as the file's metadata says.

    Raises:
        BadShard: the file is not whole, or has no such column of strings.
    """
    with _opened(path) as file:
        _require_strings(file, path, column)
        groups = [file.metadata.row_group(number) for number in range(file.metadata.num_row_groups)]
        chunks = [group.column(place) for group in groups for place in range(group.num_columns)]
        return sum(chunk.total_uncompressed_size for chunk in chunks if chunk.path_in_schema == column)


@contextlib.contextmanager
def _opened(path: Path, **how: Any) -> "Iterator[pyarrow.parquet.ParquetFile]":
    import pyarrow
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(path, **how) as file:
            yield file
    except UnicodeDecodeError:
        raise BadShard(path, "it holds text that is not UTF-8", "write it again") from None
    except (pyarrow.ArrowException, OSError) as error:
        told = (str(error).splitlines() or [type(error).__name__])[0].rstrip(".")
        raise BadShard(path, f"it is not a whole parquet file: {told}", "fetch or write it again") from None


def _require_strings(file: "pyarrow.parquet.ParquetFile", path: Path, column: str) -> None:
    import pyarrow

    names = file.schema_arrow.names
    if column not in names:
        reason = f"it has no column {column!r}, only {', '.join(names)}"
        raise BadShard(path, reason, "name the column of texts")
    found = file.schema_arrow.field(column).type
    if not (pyarrow.types.is_string(found) or pyarrow.types.is_large_string(found)):
        raise BadShard(path, f"its column {column!r} is of type {found}", "name a column of strings")


def write_shard(path: Path, columns: Mapping[str, Sequence[str | None]]) -> None:
    """Write a parquet file of string columns, whole or not at all; equal columns give equal bytes."""
    import pyarrow
    import pyarrow.parquet

    table = pyarrow.table({name: pyarrow.array(values, pyarrow.string()) for name, values in columns.items()})
    building = path.with_name(f".{path.name}.building")
    pyarrow.parquet.write_table(table, building, row_group_size=GROUP_DOCUMENTS, compression="zstd")
    os.replace(building, path)
