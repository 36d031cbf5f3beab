"""Public questions about sounds, and the recordings they are about: AudioBench's form, as JSON and parquet.

AudioBench (Wang et al. 2025) has an `instruction` about a `context` and the `answer` to it. As JSON that is a
list of objects that name their audio files. As parquet, which is how the organisation AudioLLMs publishes its
sets, rows hold the recordings' bytes; either `context` is {bytes, path} and the other two are texts, or each
of the three is {audio, text}. Where options are given, they are `choices`.

The questions about one recording become exchanges of one clip. They are about all of it, so a recording that
is longer than a clip may be is left out and not cut. Its split is what its row says, or else the most guarded
that the path of its file names (`data/test-00000-of-00001.parquet`); training where nothing is said.
"""

import itertools
import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any

from omni_model.artifacts import PayloadFile, canonical_json, sha256_text
from omni_model.audio.clips import SPLITS, Clip, ClipPlan, Dropped, ShardPlan
from omni_model.audio.folder import Known, Made, Source, clip_key, require_unchanged
from omni_model.audio.librispeech_files import damaged, refuse_page
from omni_model.audio.sound_set_layouts import Found
from omni_model.audio.unusable import Unusable
from omni_model.audio.waveform import read_recording
from omni_model.config import BadInput, SoundSetRecipe

# By which names AudioBench's own files have the three; the first is a parquet file's column.
AUDIO = ("context", "audio", "audio_path")
QUESTION = ("instruction", "question", "text")
ANSWER = ("answer", "reference")
COLUMNS = (AUDIO[0], QUESTION[0], ANSWER[0])
OPTIONAL_COLUMNS = ("choices", "other_attributes")
SPLIT_NAMES = {"test": "test", "dev": "validation", "valid": "validation", "validation": "validation"}
BATCH_ROWS = 8

Exchange = tuple[str, str]


@dataclass(frozen=True)
class Asked(Source):
    """A recording of the folder, what is asked about it, and what else the set tells."""

    exchanges: tuple[Exchange, ...]
    attributes: Mapping[str, Any]


def asking(folder: Path, max_clip_s: float) -> Callable[[Asked], Iterator[Made]]:
    """What makes the clip of one recording that lies in the folder."""

    def read(asked: Asked) -> Iterator[Made]:
        path = folder / asked.path
        require_unchanged(path, asked)
        about = {"file": asked.told_path, "file_sha256": asked.sha256, **asked.attributes}
        plan = ClipPlan(
            asked.key, asked.known.split, {}, about, licence=asked.known.licence, exchanges=asked.exchanges
        )
        yield _clip(path, asked.told_path, plan, max_clip_s)

    return read


def _clip(source: Path | bytes, name: str, plan: ClipPlan, max_clip_s: float) -> Made:
    try:
        recording = read_recording(source, name, max_duration_s=max_clip_s)
    except Unusable as unusable:
        return Dropped(name, unusable.reason)
    return plan, Clip(recording.samples, changes=recording.levels.changes)


# --- rows ----------------------------------------------------------------------------------------


def _exchange(row: Mapping[str, Any], where: str) -> Exchange | str:
    """A row's question, with its options on the next line, and answer; or why there is none."""
    question, answer = _text(row, QUESTION, where), _text(row, ANSWER, where)
    if not question or not answer:
        return "no answer" if question else "no question"
    attributes = row.get("other_attributes")
    options = row.get("choices") or (attributes.get("choices") if isinstance(attributes, Mapping) else None)
    if isinstance(options, list) and all(isinstance(option, str) for option in options):
        options = " ".join(options)
    if options and not isinstance(options, str):
        raise BadInput(f"{where} has choices that are neither a text nor a list of texts; mend them.")
    return f"{question}\n{options}" if options else question, answer


def _text(row: Mapping[str, Any], names: Sequence[str], where: str) -> str:
    value = _value(row, names, where)
    if isinstance(value, Mapping):
        value = value.get("text")
    if not isinstance(value, str | None):
        raise BadInput(f"{where} must have a text as its {names[0]}, not {value!r}.")
    return (value or "").strip()


def _value(row: Mapping[str, Any], names: Sequence[str], where: str) -> Any:
    found = [row[name] for name in names if name in row]
    if not found:
        raise BadInput(f"{where} lacks {names[0]!r}; give questions in AudioBench's form.")
    return found[0]


def _attributes(row: Mapping[str, Any]) -> dict[str, Any]:
    told = row.get("other_attributes")
    plain = {
        name: value
        for name, value in (told.items() if isinstance(told, Mapping) else ())
        if isinstance(value, str | int)
    }
    return {"other_attributes": plain} if plain else {}


def split_named(path: str) -> str:
    """The most guarded split that a path names, such as `SQA-Test/train-00000.parquet`'s test."""
    named = {SPLIT_NAMES[word] for word in re.findall(r"[a-z]+", path.lower()) if word in SPLIT_NAMES}
    return next((split for split in ("test", "validation") if split in named), "train")


# --- JSON ----------------------------------------------------------------------------------------


def read_questions(folder: Path, files: Sequence[PayloadFile], licence: str) -> Found:
    """Every recording that the folder's `*.json` ask about; paths are relative to the file or to the folder.

    Raises:
        BadInput: no such file, not UTF-8 JSON of the right form, or a recording in two splits.
    """
    there = {file.path: file for file in files}
    lists = [path for path in there if path.lower().endswith(".json")]
    if not lists:
        raise BadInput(f"{folder} holds no .json files; give questions in AudioBench's form.")
    splits: dict[str, str] = {}
    exchanges: dict[str, list[Exchange]] = {}
    attributes: dict[str, Mapping[str, Any]] = {}
    left_out: dict[str, Dropped] = {}
    for name in lists:
        for number, row in enumerate(_objects(folder / name), start=1):
            where = f"{folder / name}, object {number},"
            audio = _audio_path(row, where)
            path = next((p for p in (str(PurePosixPath(name).parent / audio), audio) if p in there), None)
            exchange = _exchange(row, where)
            split = row.get("split") or split_named(name)
            if split not in SPLITS:
                raise BadInput(f"{where} has the split {split!r}, which is none of {', '.join(SPLITS)}.")
            if path is None:
                left_out[audio] = Dropped(audio, "missing")
            elif isinstance(exchange, str):
                left_out[where] = Dropped(f"{name}, object {number}", exchange)
            elif splits.setdefault(path, split) != split:
                raise BadInput(f"{where} has {audio} for {split}, and it is for {splits[path]} already.")
            else:
                exchanges.setdefault(path, []).append(exchange)
                attributes.setdefault(path, _attributes(row))
    sources: list[Source] = [
        Asked(
            path,
            there[path].size,
            there[path].sha256,
            Known(split=splits[path], licence=licence),
            tuple(asked),
            attributes[path],
        )
        for path, asked in exchanges.items()
    ]
    return Found(sources, list(left_out.values()))


def _objects(path: Path) -> list[Mapping[str, Any]]:
    try:
        rows = json.loads(path.read_text(encoding="utf-8-sig"))
    except UnicodeDecodeError:
        raise BadInput(f"{path} is not UTF-8 text; save it as such.") from None
    except (ValueError, RecursionError):
        raise BadInput(f"{path} is not JSON; write a list of objects.") from None
    if not isinstance(rows, list) or not rows or not all(isinstance(row, Mapping) for row in rows):
        raise BadInput(
            f"{path} is no list of objects with audio, instruction and answer; "
            "give questions in AudioBench's form."
        )
    return rows


def _audio_path(row: Mapping[str, Any], where: str) -> str:
    value = _value(row, AUDIO, where)
    while isinstance(value, Mapping):
        value = value.get("audio") or value.get("path")
    if not isinstance(value, str) or not value:
        raise BadInput(f"{where} must name its audio file relative to the folder; correct {AUDIO[0]!r}.")
    return PurePosixPath(value).as_posix()


# --- parquet -------------------------------------------------------------------------------------


def plan_tables(recipe: SoundSetRecipe, folder: Path, files: Sequence[PayloadFile]) -> list[ShardPlan]:
    """Shards end where files end, so that a file that was replaced changes its own shards alone.

    Raises:
        BadInput: no parquet file, or one that is damaged, cut off or of other columns.
    """
    tables = [file for file in files if file.path.lower().endswith(".parquet")]
    if not tables:
        raise BadInput(f"{folder} holds no .parquet files; give a set as AudioLLMs publishes it.")
    num_rows = [_check_table(folder / table.path) for table in tables]
    shards = []
    for number, (table, total) in enumerate(zip(tables, num_rows, strict=True)):
        split = split_named(table.path)
        for part, first in enumerate(range(0, total, recipe.clips_per_shard)):
            size = min(recipe.clips_per_shard, total - first)
            decisive = [table.path, table.sha256, first, size, recipe.licence, recipe.max_clip_s]
            made_from = sha256_text(canonical_json(decisive))
            make = partial(_table_clips, folder, table.path, first, size, recipe)
            shards.append(ShardPlan(f"{split}-{number:03d}-{part:05d}", made_from, make))
    return shards


def _check_table(path: Path) -> int:
    """The number of rows of a file that is whole and has the columns. Its last bytes tell."""
    import pyarrow
    import pyarrow.parquet
    from pyarrow import types

    def inner(kind: Any, name: str) -> Any:
        has = types.is_struct(kind) and kind.get_field_index(name) >= 0
        return kind.field(name).type if has else None

    refuse_page(path)
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            schema, count = file.schema_arrow, int(file.metadata.num_rows)
    except (pyarrow.ArrowException, OSError) as error:
        raise damaged(path, error) from None
    for column in COLUMNS:
        if column not in schema.names:
            raise BadInput(f"{path} lacks the column {column}; give the set as AudioLLMs publishes it.")
        kind = schema.field(column).type
        if column == AUDIO[0]:
            fits = inner(inner(kind, "audio") or kind, "bytes") is not None
        else:
            text = inner(kind, "text") or kind
            fits = types.is_string(text) or types.is_large_string(text)
        if not fits:
            raise BadInput(
                f"{path} has the column {column} as {kind}; give the set as AudioLLMs publishes it."
            )
    return count


def _table_clips(folder: Path, table: str, first: int, size: int, recipe: SoundSetRecipe) -> Iterator[Made]:
    """The clips of some rows; rows that follow each other with the same bytes ask about one recording."""
    rows = enumerate(_rows(folder / table, first, size), start=first)
    for content, group in itertools.groupby(rows, key=lambda numbered: _audio(numbered[1]).get("bytes")):
        numbers, exchanges, about = [], [], {}
        for number, row in group:
            exchange = _exchange(row, f"{folder / table}, row {number},") if content else "no audio"
            if isinstance(exchange, str):
                yield Dropped(f"{table}, row {number}", exchange)
                continue
            numbers.append(number)
            exchanges.append(exchange)
            about = about or {"audio": _audio(row).get("path") or "", **_attributes(row)}
        if numbers:
            plan = ClipPlan(
                key=clip_key(f"{table}/{numbers[0]:07d}"),
                split=split_named(table),
                labels={},
                parameters={"file": table, "row": numbers[0], **about},
                licence=recipe.licence,
                exchanges=tuple(exchanges),
            )
            yield _clip(content, f"{table}, row {numbers[0]}", plan, recipe.max_clip_s)


def _audio(row: Mapping[str, Any]) -> Mapping[str, Any]:
    context = row[AUDIO[0]] or {}
    return (context["audio"] or {}) if "audio" in context else context


def _rows(path: Path, first: int, size: int) -> Iterator[dict[str, Any]]:
    """`size` rows from number `first` on; groups of rows in front of them are not read."""
    import pyarrow
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            counts = [file.metadata.row_group(number).num_rows for number in range(file.num_row_groups)]
            group = 0
            while first >= counts[group]:
                first, group = first - counts[group], group + 1
            columns = [name for name in (*COLUMNS, *OPTIONAL_COLUMNS) if name in file.schema_arrow.names]
            batches = file.iter_batches(BATCH_ROWS, list(range(group, len(counts))), columns)
            rows = (row for batch in batches for row in batch.to_pylist())
            yield from itertools.islice(rows, first, first + size)
    except (pyarrow.ArrowException, OSError) as error:
        raise damaged(path, error) from None
