"""Reading features: nothing damaged is handed out, and an order that can be left and taken up anywhere."""

import itertools
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from omni_model.artifacts import FeatureShards
from omni_model.audio import reader, shards
from omni_model.audio.reader import FeatureReader, FeatureStream, StreamState
from omni_model.config import BadInput

WIDTH = 6
POLICY = {"encoder": "e", "layers": ["last"], "mix": "concat", "dtype": "float32"}


def frames_of(number: int) -> np.ndarray:
    """(T, D) float16, another T for each clip."""
    return np.random.default_rng(number).standard_normal((3 + number % 5, WIDTH)).astype(np.float16)


def write_set(
    directory: Path, sizes: tuple[int, ...] = (5, 4, 6), first: int = 0, **policy: Any
) -> FeatureShards:
    """Tars of so many clips each; every fourth clip is a test clip."""
    out = directory / "out"
    out.mkdir(parents=True)
    numbers = iter(range(first, first + sum(sizes)))

    def clip(number: int) -> tuple[str, np.ndarray, dict[str, Any]]:
        key, split = f"clip-{number:03d}", "test" if number % 4 == 3 else "train"
        return key, frames_of(number), {"key": key, "split": split, "labels": {}}

    records = [
        shards.write_shard(
            out / f"features-{place}.tar", f"source-{place}", map(clip, itertools.islice(numbers, size))
        )
        for place, size in enumerate(sizes)
    ]
    facts = {"num_layers": 1, "policy": POLICY | policy, "width": WIDTH}
    shards.write_index(out / shards.INDEX, facts, records)
    num_frames = sum(record["num_frames"] for record in records)
    return FeatureShards("s", "k", str(directory), "d", sum(sizes), num_frames, WIDTH, 1, 50)


@pytest.fixture(scope="module")
def features(tmp_path_factory: pytest.TempPathFactory) -> FeatureShards:
    return write_set(tmp_path_factory.mktemp("features"))


# --- by key --------------------------------------------------------------------------------------


def test_every_clip_of_several_sets_by_its_key(tmp_path: Path, features: FeatureShards) -> None:
    more = write_set(tmp_path / "more", (3,), first=15)
    found = FeatureReader(features, more)
    assert [clip["key"] for clip in found.clips] == [f"clip-{number:03d}" for number in range(18)]
    assert (len(found), found.width, found.policy) == (18, WIDTH, POLICY)
    assert [clip["key"] for clip in found.by_split("test")] == [f"clip-{n:03d}" for n in (3, 7, 11, 15)]
    for number in (17, 0, 9):
        frames = found.frames(f"clip-{number:03d}")
        assert frames.dtype == np.float32
        np.testing.assert_array_equal(frames, frames_of(number).astype(np.float32))
    with pytest.raises(KeyError):
        found.frames("clip-999")


def test_sets_that_do_not_belong_together_are_both_named(tmp_path: Path, features: FeatureShards) -> None:
    other = write_set(tmp_path / "other", first=20, dtype="bfloat16")
    with pytest.raises(
        BadInput, match=rf"{features.uri} and {other.uri} hold .*float32.*bfloat16.*one encoder"
    ):
        FeatureReader(features, other)
    with pytest.raises(BadInput, match="clip-000 .* keys must differ"):
        FeatureReader(features, features)
    with pytest.raises(BadInput, match="at least one set"):
        FeatureReader()


# --- damage --------------------------------------------------------------------------------------


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[700] ^= 1
    path.write_bytes(content)


def swap(path: Path) -> None:
    other, between = path.with_name("features-0.tar"), path.with_name("between")
    other.rename(between)
    path.rename(other)
    between.rename(path)


def edit(path: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    """Change the second record of the index beside a tar."""
    index = path.with_name(shards.INDEX)
    facts, *records = shards.read_index(index)
    change(records[1])
    shards.write_index(index, facts, records)


def cut_index(path: Path) -> None:
    index = path.with_name(shards.INDEX)
    index.write_text("\n".join(index.read_text().splitlines()[:3]) + "\n")


DAMAGE: dict[str, tuple[Callable[[Path], Any], str]] = {
    "flipped": (flip, r"features-1\.tar is damaged: its bytes have changed"),
    "cut": (lambda p: p.write_bytes(p.read_bytes()[:-600]), r"features-1\.tar has \d+ bytes instead of \d+"),
    "longer": (lambda p: p.write_bytes(p.read_bytes() + b"x"), r"features-1\.tar has \d+ bytes instead of"),
    "missing": (Path.unlink, r"features-1\.tar is missing;"),
    "renamed": (
        lambda p: p.rename(p.with_name("features-9.tar")),
        r"features-1\.tar is missing \(features-9\.tar is in no index: was it renamed\?\)",
    ),
    "swapped": (swap, r"features-[01]\.tar (is damaged|has \d+ bytes instead)"),
    "miscounted": (
        lambda p: edit(p, lambda r: r.update(num_clips=7)),
        r"wrong about the clips of features-1\.tar",
    ),
    "longer frames": (
        lambda p: edit(p, lambda r: r["clips"][0].update(num_frames=4_000)),
        r"wrong about the clips of features-1\.tar",
    ),
    "a clip less": (
        lambda p: edit(p, lambda r: r.update(num_clips=3, clips=r["clips"][1:])),
        r"index\.json lists 14 clips of .* where the artifact has 15",
    ),
    "half a record": (lambda p: edit(p, lambda r: r.pop("sha256")), r"index\.json is no index .*'sha256'"),
    "index cut": (cut_index, r"index\.json cannot be read \(it is cut off\)"),
    "index gone": (lambda p: p.with_name(shards.INDEX).unlink(), r"index\.json cannot be read"),
    "no index": (lambda p: p.with_name(shards.INDEX).write_text("<html>"), r"index\.json cannot be read"),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_damage_is_named_and_nothing_of_it_handed_out(tmp_path: Path, name: str) -> None:
    features = write_set(tmp_path / "set")
    damage, says = DAMAGE[name]
    damage(features.out / "features-1.tar")
    with pytest.raises(BadInput, match=f"{says}.*delete its artifact and run again"):
        FeatureReader(features).frames("clip-005")


def test_other_tars_stay_readable_and_each_is_hashed_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    features = write_set(tmp_path / "set")
    flip(features.out / "features-1.tar")
    hashed: list[str] = []
    sha256_file = reader.sha256_file
    monkeypatch.setattr(reader, "sha256_file", lambda path: (hashed.append(path.name), sha256_file(path))[1])
    found = FeatureReader(features)
    for key in ("clip-000", "clip-001", "clip-014", "clip-000"):
        found.frames(key)
    assert hashed == ["features-0.tar", "features-2.tar"]


def test_a_tar_that_changes_later_is_looked_at_again(tmp_path: Path) -> None:
    features = write_set(tmp_path / "set")
    stream = FeatureStream(FeatureReader(features), "train", seed=1)
    whole = len(list(stream))
    (features.out / "features-1.tar").touch()
    assert len(list(stream)) == whole
    flip(features.out / "features-1.tar")
    with pytest.raises(BadInput, match=r"features-1\.tar is damaged"):
        list(stream)


# --- streams -------------------------------------------------------------------------------------


def keys(stream: FeatureStream) -> list[str]:
    """The rest of an epoch."""
    return [key for key, _, _ in stream]


def test_an_epoch_is_every_clip_once_tar_by_tar(features: FeatureShards) -> None:
    found = FeatureReader(features)
    stream = FeatureStream(found, "train", seed=3)
    homes = {place.key: number for number, shard in enumerate(found.shards) for place in shard.clips}
    epochs = [keys(stream) for _ in range(6)]
    for epoch in epochs:
        assert sorted(epoch) == [clip["key"] for clip in found.by_split("train")]
        assert len(list(itertools.groupby(epoch, homes.__getitem__))) == 3
    assert len({tuple(epoch) for epoch in epochs}) == 6
    assert len({tuple(dict.fromkeys(map(homes.__getitem__, epoch))) for epoch in epochs}) > 1
    assert [keys(stream_of(found, 3)) for _ in range(2)] == [epochs[0]] * 2
    assert keys(stream_of(found, 4)) != epochs[0]


def stream_of(found: FeatureReader, seed: int, rank: int = 0, world: int = 1) -> FeatureStream:
    return FeatureStream(found, "train", seed, rank, world)


def test_frames_become_tensors_and_are_nobody_elses(features: FeatureShards) -> None:
    before = {path: path.read_bytes() for path in features.out.iterdir()}
    for key, frames, metadata in stream_of(FeatureReader(features), 3):
        number = int(key.removeprefix("clip-"))
        tensor = torch.from_numpy(frames)
        assert tensor.dtype == torch.float16
        np.testing.assert_array_equal(frames, frames_of(number))
        assert metadata == {"key": key, "split": "train", "labels": {}, "num_frames": len(frames)}
        tensor.zero_()
    assert {path: path.read_bytes() for path in features.out.iterdir()} == before


@pytest.mark.parametrize("world", [1, 2])
def test_taken_up_anywhere_it_goes_on_exactly(features: FeatureShards, world: int) -> None:
    found = FeatureReader(features)
    for rank in range(world):
        stream = stream_of(found, 7, rank, world)
        told = [(key, StreamState(*stream.state)) for _ in range(3) for key, _, _ in stream]
        for place, (_, state) in enumerate(told):
            state = StreamState(*json.loads(json.dumps(state)))  # three plain ints
            again = stream_of(FeatureReader(features), 99, rank, world)
            again.restore(state)
            rest = [key for _ in range(4) for key in keys(again)]
            assert rest[: len(told) - place - 1] == [key for key, _ in told[place + 1 :]]


@pytest.mark.parametrize("world", [2, 3, 5])
def test_ranks_are_equal_and_share_nothing(features: FeatureShards, world: int) -> None:
    found = FeatureReader(features)
    whole = keys(stream_of(found, 5))
    ranks = [stream_of(found, 5, rank, world) for rank in range(world)]
    dealt = [keys(stream) for stream in ranks]
    assert {len(each) for each in dealt} == {len(whole) // world} == {len(ranks[0])}
    assert [key for row in zip(*dealt, strict=True) for key in row] == whole[: len(whole) // world * world]
    assert {stream.state for stream in ranks} == {(5, 1, 0)}


def test_another_number_of_ranks_goes_on_in_the_same_order(features: FeatureShards) -> None:
    found = FeatureReader(features)
    whole = keys(stream_of(found, 5))
    first = stream_of(found, 5, world=2)
    for _ in itertools.islice(first, 3):
        pass
    rest = []
    for rank in range(3):
        stream = stream_of(found, 0, rank, 3)
        stream.restore(first.state)
        rest.append(keys(stream))
    assert [key for row in zip(*rest, strict=True) for key in row] == whole[6:][: (len(whole) - 6) // 3 * 3]


def test_streams_that_cannot_be_are_refused(features: FeatureShards) -> None:
    found = FeatureReader(features)
    with pytest.raises(BadInput, match="the validation split has fewer clips than the 1 ranks"):
        FeatureStream(found, "validation", seed=0)
    with pytest.raises(BadInput, match="fewer clips than the 13 ranks"):
        stream_of(found, 0, world=13)
    for state in ((0, -1, 0), (0, 0, 13), (0, 0, -1)):
        with pytest.raises(BadInput, match="lies outside these features"):
            stream_of(found, 0).restore(StreamState(*state))


def test_facts_of_the_handle_are_checked(features: FeatureShards) -> None:
    with pytest.raises(BadInput, match="where the artifact has 15 clips|has 15 of"):
        FeatureReader(replace(features, width=7))
