"""LibriSpeech from a miniature of itself: the same clips from every form, and nothing from a damaged one."""

import gzip
import hashlib
import io
import json
import tarfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import soundfile

from omni_model.artifacts import AudioCorpus, content_digest, hash_payload
from omni_model.audio import librispeech, librispeech_files
from omni_model.audio.corpora import read_clips, read_index, read_shard, shard_paths
from omni_model.audio.librispeech import Part, import_librispeech, voices_of
from omni_model.audio.waveform import decode, to_pcm16
from omni_model.config import BadInput, LibriSpeechRecipe, Runtime
from omni_model.storage import Workspace
from omni_model.telemetry import Metrics
from tests.loopback import PAGE, FileServer, dead_url, file_server, stay_at_home

CHAPTERS = {"84-121123": 5, "84-121550": 2, "1272-128104": 4}
NAMES = [f"{chapter}-{number:04d}" for chapter, count in CHAPTERS.items() for number in range(count)]
SPEAKERS = """; the reader's id | sex | part | minutes | name
84   | F | tiny-100        | 25.03 | Christie | Nowlin
1272 | M | tiny-100        |  8.00 | John Rose
9    | X | other           |  1.00 | Nobody
"""
PUBLISHED = "tiny-100"


def pcm(name: str) -> np.ndarray:
    rng = np.random.default_rng(NAMES.index(name))
    return (rng.standard_normal(4_000 + 400 * NAMES.index(name)) * 3_000).astype("<i2")


def words(name: str) -> str:
    return f"IT'S THE {name.replace('-', ' ')}"


def flac(name: str) -> bytes:
    buffer = io.BytesIO()
    soundfile.write(buffer, pcm(name), 16_000, format="FLAC", subtype="PCM_16")
    return buffer.getvalue()


def members(transcripts_first: bool = False) -> list[tuple[str, bytes]]:
    """A miniature of openslr's archive, in the order of its members."""
    found = [("LibriSpeech/README.TXT", b"..."), ("LibriSpeech/SPEAKERS.TXT", SPEAKERS.encode())]
    for chapter in CHAPTERS:
        folder = f"LibriSpeech/{PUBLISHED}/{chapter.replace('-', '/')}"
        names = [name for name in NAMES if name.startswith(chapter)]
        lines = "".join(f"{name} {words(name)}\n" for name in names)
        sounds = [(f"{folder}/{name}.flac", flac(name)) for name in names]
        texts = [(f"{folder}/{chapter}.trans.txt", lines.encode())]
        found += [*texts, *sounds] if transcripts_first else [*sounds, *texts]
    return found


def tar_gz(files: list[tuple[str, bytes]], *, cut: int = 0) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        for name, content in files:
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    content = buffer.getvalue()
    return gzip.compress(content[: len(content) - cut], mtime=0)


def publish(monkeypatch: pytest.MonkeyPatch, content: bytes, num_utterances: int = len(NAMES)) -> None:
    """Declare `content` to be what openslr publishes."""
    part = Part(12, len(content), hashlib.md5(content).hexdigest(), num_utterances)
    monkeypatch.setitem(librispeech.PARTS, PUBLISHED, part)


@pytest.fixture
def archive(monkeypatch: pytest.MonkeyPatch) -> bytes:
    stay_at_home(monkeypatch)
    for name in ("OMNI_OFFLINE", "HF_HUB_OFFLINE", "OPENSLR_MIRRORS"):
        monkeypatch.delenv(name, raising=False)
    content = tar_gz(members())
    publish(monkeypatch, content)
    return content


@pytest.fixture
def server(archive: bytes) -> Iterator[FileServer]:
    with file_server() as started:
        started.files[f"/resources/12/{PUBLISHED}.tar.gz"] = archive
        yield started


@pytest.fixture
def decoded(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of what has been decoded; put "stop" in front to be interrupted after as many as it holds."""
    names: list[str] = []
    read_recording = librispeech.read_recording

    def counting(source: bytes, name: str) -> Any:
        if names[:1] == ["stop"] and len(names) > 6:
            raise KeyboardInterrupt
        names.append(name)
        return read_recording(source, name)

    monkeypatch.setattr(librispeech, "read_recording", counting)
    return names


def recipe(place: Path | str = "", **fields: Any) -> LibriSpeechRecipe:
    return LibriSpeechRecipe(**{"part": PUBLISHED, "clips_per_shard": 4, "place": str(place), **fields})


def run(directory: Path, wanted: LibriSpeechRecipe) -> AudioCorpus:
    for name in ("out", "partial"):
        (directory / name).mkdir(parents=True, exist_ok=True)
    work = Workspace(directory, 0, Metrics(directory / "metrics.jsonl"))
    facts: dict[str, Any] = import_librispeech(wanted, work=work, runtime=Runtime())
    assert set(facts) == AudioCorpus.fact_names()
    digest = content_digest(hash_payload(directory / "out"))
    return AudioCorpus("librispeech", "0" * 64, str(directory), digest, **facts)


def sounds(corpus: AudioCorpus) -> dict[str, tuple[bytes, dict[str, Any]]]:
    return {key: (wav, row) for path in shard_paths(corpus) for key, wav, row in read_shard(path)}


def stored(tmp_path: Path, content: bytes, name: str = "own.tar.gz") -> Path:
    (tmp_path / name).write_bytes(content)
    return tmp_path / name


def parquet(path: Path, names: list[str], change: Callable[[dict[str, Any]], None] | None = None) -> Path:
    columns: dict[str, Any] = {
        "file": [f"{name}.flac" for name in names],
        "audio": [{"bytes": flac(name), "path": f"{name}.flac"} for name in names],
        "text": [words(name) for name in names],
        "speaker_id": [int(name.split("-")[0]) for name in names],
        "chapter_id": [int(name.split("-")[1]) for name in names],
        "id": names,
    }
    if change:
        change(columns)
    path.parent.mkdir(exist_ok=True)
    pyarrow.parquet.write_table(pyarrow.table(columns), path, row_group_size=3)
    return path


# --- tar -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("transcripts_first", [False, True])
def test_every_utterance_arrives_sample_for_sample(
    tmp_path: Path, archive: bytes, monkeypatch: pytest.MonkeyPatch, transcripts_first: bool
) -> None:
    content = tar_gz(members(transcripts_first))
    publish(monkeypatch, content)
    corpus = run(tmp_path / "work", recipe(stored(tmp_path, content), split="validation"))
    found = sounds(corpus)
    assert sorted(found) == sorted(NAMES)
    for name, (wav, row) in found.items():
        np.testing.assert_array_equal(to_pcm16(decode(wav)), pcm(name))
        speaker, chapter, _ = name.split("-")
        assert row["transcript"] == words(name).lower()
        assert row["labels"] == {"voice": "woman" if speaker == "84" else "man"}
        assert row["speaker"] == f"librispeech-{speaker}"
        assert row["licence"] == "CC-BY-4.0"
        assert row["split"] == "validation"
        assert row["provenance"] == {"generator": "librispeech", "part": PUBLISHED, "chapter": chapter}
    assert corpus.num_clips == len(NAMES)
    assert [shard["num_clips"] for shard in read_index(corpus)["shards"]] == [4, 4, 3]


def test_a_name_may_hold_a_bar_and_a_comment_none() -> None:
    assert voices_of(SPEAKERS) == {"84": "woman", "1272": "man"}
    assert voices_of("") == {}
    assert voices_of("1 | M\nnonsense\n;2 | F | x | 1 | y") == {"1": "man"}


def test_speakers_may_come_last_or_not_at_all(
    tmp_path: Path, archive: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = members()
    for number, (order, labels) in enumerate((([*files[2:], *files[:2]], 2), (files[2:], 0))):
        publish(monkeypatch, content := tar_gz(order))
        clips = read_clips(run(tmp_path / str(number), recipe(stored(tmp_path, content))))
        assert len({clip["labels"].get("voice") for clip in clips} - {None}) == labels


def test_it_is_downloaded_from_the_first_mirror_that_has_it(
    tmp_path: Path, server: FileServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OPENSLR_MIRRORS", f"{dead_url()}, {server.url}/")
    corpus = run(tmp_path / "work", recipe())
    assert corpus.num_clips == len(NAMES)
    assert not list((tmp_path / "work" / "partial").glob("*.gz*"))
    assert server.paths() == [f"/resources/12/{PUBLISHED}.tar.gz"]


def test_a_download_that_broke_off_goes_on_in_the_next_run(
    tmp_path: Path, server: FileServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OPENSLR_MIRRORS", server.url)
    server.faults[f"/resources/12/{PUBLISHED}.tar.gz"] = ["cut", 404]
    with pytest.raises(BadInput, match="HTTP 404"):
        run(tmp_path / "work", recipe())
    assert list((tmp_path / "work" / "out").iterdir()) == []
    run(tmp_path / "work", recipe())
    assert server.requests[-1][1].startswith("bytes=")


def test_offline_asks_nobody_and_says_so(
    tmp_path: Path, server: FileServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OPENSLR_MIRRORS", server.url)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(BadInput, match="librispeech.place"):
        run(tmp_path / "work", recipe())
    assert server.requests == []


def test_after_an_interruption_finished_shards_are_passed_over(
    tmp_path: Path, server: FileServer, monkeypatch: pytest.MonkeyPatch, decoded: list[str]
) -> None:
    monkeypatch.setenv("OPENSLR_MIRRORS", server.url)
    whole = run(tmp_path / "whole", recipe())
    decoded[:] = ["stop"]
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "work", recipe())
    assert list((tmp_path / "work" / "out").iterdir()) == []
    decoded.clear()
    again = run(tmp_path / "work", recipe())
    assert again.digest == whole.digest
    assert decoded == NAMES[4:]  # the first shard was there
    assert len(server.requests) == 2  # and so was the archive


def test_a_rehearsal_makes_the_first_shards_of_the_whole(tmp_path: Path, archive: bytes) -> None:
    place = stored(tmp_path, archive)
    whole = read_index(run(tmp_path / "whole", recipe(place)))["shards"]
    some = run(tmp_path / "some", recipe(place, max_clips=6))
    assert some.num_clips == 6
    first, second = read_index(some)["shards"]
    assert first == whole[0]
    assert second["made_from"] != whole[1]["made_from"]
    assert run(tmp_path / "more", recipe(place, max_clips=99)).num_clips == len(NAMES)


def flipped(content: bytes) -> bytes:
    at = len(content) // 2
    return content[:at] + bytes([content[at] ^ 16]) + content[at + 1 :]


DAMAGES: dict[str, tuple[Callable[[bytes], bytes], str]] = {
    "cut in half": (lambda good: good[: len(good) // 2], "damaged or cut off"),
    "one bit flipped": (flipped, "damaged or cut off"),
    "without its tail": (lambda good: good[:-8], "damaged or cut off"),
    "a web page": (lambda _: PAGE, "web page"),
    "no archive at all": (lambda _: b"0" * 999, "damaged or cut off"),
    "empty": (lambda _: b"", "damaged or cut off"),
    "a recording less": (
        lambda _: tar_gz([f for f in members() if "0003.flac" not in f[0]]),
        "transcripts without",
    ),
    "a transcript less": (
        lambda _: tar_gz([f for f in members() if not f[0].endswith("121550.trans.txt")]),
        "recordings without",
    ),
    "a chapter less": (
        lambda _: tar_gz([f for f in members() if "121550" not in f[0]]),
        "9 utterances instead",
    ),
    "tar cut inside the gzip": (
        lambda _: tar_gz(members(), cut=40_000),
        "damaged or cut off|without their|instead",
    ),
    "a recording twice": (lambda _: tar_gz([*members(), members()[3]]), "without|twice"),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_a_damaged_archive_is_one_sentence_and_the_run_goes_on_after_the_repair(
    tmp_path: Path, archive: bytes, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    spoil, reason = DAMAGES[name]
    place = stored(tmp_path, bad := spoil(archive))
    with pytest.raises(BadInput, match=r"its MD5 is|web page"):
        run(tmp_path / "work", recipe(place))
    assert list((tmp_path / "work" / "partial").iterdir()) == []
    publish(monkeypatch, bad)  # were its MD5 right: what comes to light behind it
    with pytest.raises(BadInput, match=reason) as refused:
        run(tmp_path / "work", recipe(place))
    assert str(place) in str(refused.value)
    assert "\n" not in str(refused.value)
    assert list((tmp_path / "work" / "out").iterdir()) == []
    publish(monkeypatch, archive)
    repaired = run(tmp_path / "work", recipe(stored(tmp_path, archive)))
    assert repaired.digest == run(tmp_path / "fresh", recipe(place)).digest


def test_transcripts_far_from_their_recordings_do_not_fill_the_memory(
    tmp_path: Path, archive: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = sorted(members(), key=lambda file: file[0].endswith(".txt"))
    publish(monkeypatch, content := tar_gz(files))
    assert run(tmp_path / "work", recipe(stored(tmp_path, content))).num_clips == len(NAMES)
    monkeypatch.setattr(librispeech_files, "MAX_HELD_BYTES", 30_000)
    with pytest.raises(BadInput, match="too far"):
        run(tmp_path / "again", recipe(stored(tmp_path, content)))


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"part": "train-clean-99"}, "train-clean-100"),
        ({"split": "dev"}, "split"),
        ({"place": "/nowhere/a.tar.gz"}, "not a file"),
        ({"form": "parquet"}, "parquet files"),
        ({"form": "parquet", "place": "/nowhere"}, "parquet files"),
    ],
)
def test_a_wrong_recipe_is_refused(
    tmp_path: Path, archive: bytes, fields: dict[str, str], reason: str
) -> None:
    with pytest.raises(BadInput, match=reason):
        run(tmp_path / "work", recipe(**fields))


def test_the_published_parts_are_written_down_in_full() -> None:
    known = librispeech.PARTS["train-clean-100"]
    assert (known.size, known.md5) == (6_387_309_499, "2a93770f6d5c6c964bc36631d331a522")
    assert known.num_utterances == 28_539
    assert all(len(part.md5) == 32 and part.size for part in librispeech.PARTS.values())


# --- parquet -------------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path: Path, archive: bytes) -> Path:
    """The same utterances in two parquet files."""
    parquet(tmp_path / "parquet" / "0000.parquet", NAMES[:6])
    parquet(tmp_path / "parquet" / "0001.parquet", NAMES[6:])
    return tmp_path / "parquet"


def test_parquet_gives_the_same_clips_as_the_tar(tmp_path: Path, archive: bytes, folder: Path) -> None:
    (folder / "SPEAKERS.TXT").write_text(SPEAKERS)
    from_tar = run(tmp_path / "tar", recipe(stored(tmp_path, archive)))
    from_parquet = run(tmp_path / "work", recipe(folder, form="parquet"))
    assert sounds(from_parquet) == sounds(from_tar)
    assert [shard["num_clips"] for shard in read_index(from_parquet)["shards"]] == [4, 2, 4, 1]
    (folder / "SPEAKERS.TXT").unlink()
    bare = run(tmp_path / "bare", recipe(folder, form="parquet", max_clips=7))
    assert [clip["labels"] for clip in read_clips(bare)] == [{}] * 7
    first, unlabelled = (read_index(each)["shards"][0]["made_from"] for each in (from_parquet, bare))
    assert first != unlabelled


def without(column: str) -> Callable[[dict[str, Any]], None]:
    return lambda columns: columns.pop(column)


@pytest.mark.parametrize("column", ["id", "text", "audio"])
def test_a_missing_column_is_named(tmp_path: Path, folder: Path, column: str) -> None:
    path = parquet(folder / "0001.parquet", NAMES[6:], without(column))
    with pytest.raises(BadInput, match=f"0001.parquet lacks the column {column}"):
        run(tmp_path / "work", recipe(folder, form="parquet"))
    parquet(path, NAMES[6:], lambda columns: columns.update(audio=["x"] * 5))
    with pytest.raises(BadInput, match=r"lacks the column audio.bytes"):
        run(tmp_path / "work", recipe(folder, form="parquet"))
    assert list((tmp_path / "work" / "partial").iterdir()) == []


def test_a_bad_parquet_file_is_found_before_anything_is_made(tmp_path: Path, folder: Path) -> None:
    path = folder / "0001.parquet"
    good = path.read_bytes()
    for bad, reason in ((good[: len(good) // 2], "damaged or cut off"), (PAGE, "web page"), (b"", "damaged")):
        path.write_bytes(bad)
        with pytest.raises(BadInput, match=rf"0001.parquet is.*{reason}"):
            run(tmp_path / "work", recipe(folder, form="parquet"))
        assert list((tmp_path / "work" / "partial").iterdir()) == []
    path.unlink()
    with pytest.raises(BadInput, match="holds 6 utterances and tiny-100 has 11"):
        run(tmp_path / "work", recipe(folder, form="parquet"))
    path.write_bytes(good)
    assert run(tmp_path / "work", recipe(folder, form="parquet")).num_clips == len(NAMES)


def test_damage_inside_a_parquet_file_loses_no_finished_shard(
    tmp_path: Path, folder: Path, decoded: list[str]
) -> None:
    path = folder / "0001.parquet"
    good = path.read_bytes()
    path.write_bytes(good[:4] + bytes(200) + good[204:])  # its end, and so its list of columns, is whole
    with pytest.raises(BadInput, match="0001.parquet is damaged"):
        run(tmp_path / "work", recipe(folder, form="parquet"))
    assert list((tmp_path / "work" / "out").iterdir()) == []
    decoded.clear()
    path.write_bytes(good)
    run(tmp_path / "work", recipe(folder, form="parquet"))
    assert decoded == NAMES[6:]


def test_recordings_that_cannot_be_used_are_left_out_and_counted(tmp_path: Path, folder: Path) -> None:
    def spoil(columns: dict[str, Any]) -> None:
        columns["audio"][0] = {"bytes": None, "path": "only a name"}
        columns["audio"][1]["bytes"] = columns["audio"][1]["bytes"][:3_000]
        columns["audio"][2]["bytes"] = flipped(columns["audio"][2]["bytes"])
        columns["audio"][3]["bytes"] = PAGE

    parquet(folder / "0000.parquet", NAMES[:6], spoil)
    corpus = run(tmp_path / "work", recipe(folder, form="parquet"))
    index = read_index(corpus)
    assert corpus.num_clips == len(NAMES) - 4
    assert corpus.num_dropped == sum(index["dropped"].values()) == 4
    assert [name for name, _ in index["dropped_names"]] == NAMES[:4]
    assert index["dropped"]["no audio"] == 1
    assert index["dropped"]["not audio"] == 1


def test_an_id_that_is_none_of_librispeechs_is_refused(tmp_path: Path, folder: Path) -> None:
    parquet(folder / "0000.parquet", NAMES[:6], lambda columns: columns["id"].__setitem__(2, "LJ001-0001"))
    with pytest.raises(BadInput, match="LJ001-0001"):
        run(tmp_path / "work", recipe(folder, form="parquet"))


def test_the_note_of_each_shard_names_what_it_was_made_from(tmp_path: Path, archive: bytes) -> None:
    corpus = run(tmp_path / "work", recipe(stored(tmp_path, archive)))
    other = run(tmp_path / "other", recipe(stored(tmp_path, archive), split="test"))
    froms = [
        [shard["made_from"] for shard in json.loads((each.out / "index.json").read_text())["shards"]]
        for each in (corpus, other)
    ]
    assert len({*froms[0], *froms[1]}) == 6
