"""Reading features: any clip by its key, or all of a split in a shuffled order that can be taken up again.

Nothing is handed out of a tar before its bytes have been hashed, once in a run; from then on it is mapped
into memory, so that a clip costs no more than touching it.

The order of an epoch is a permutation of the tars and, inside each, of its clips; both follow from the seed
and the epoch alone. So three numbers say where a training run stands, and nothing is replayed to get there.

Axes: T encoder frames, D frame width.
"""

import mmap
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from omni_model.artifacts import FeatureShards, canonical_json, sha256_file, sha256_text
from omni_model.audio.shards import INDEX, Record, read_index
from omni_model.config import BadInput

NPY_MAGIC = b"\x93NUMPY"
FLOAT16_BYTES = 2
AGAIN = "delete its artifact and run again."


class Place(NamedTuple):
    """Where one clip's array lies in its tar."""

    key: str
    offset: int
    size: int
    num_frames: int
    metadata: dict[str, Any]


class Shard:
    """One tar of features, with its clips in order."""

    def __init__(self, path: Path, record: Record, width: int) -> None:
        """Raises BadInput where the tar is missing, of another size, or its record is wrong."""
        self._path, self._sha256, self._bytes, self._width = path, record["sha256"], record["bytes"], width
        self.clips = [Place(**clip) for clip in record["clips"]]
        if len(self.clips) != record["num_clips"] or not all(map(self._fits, self.clips)):
            raise BadInput(f"{path.with_name(INDEX)} is wrong about the clips of {path.name}; {AGAIN}")
        self._verified: tuple[int, ...] = ()
        self._map: mmap.mmap | None = None
        self._stamp()

    def frames(self, place: Place) -> np.ndarray:
        """Frames (T, D) float16 of one clip, as they lie in the mapped file; what is written to them is lost.

        Raises:
            BadInput: the tar's bytes are not those that were written.
        """
        mapped = self._map or self._open()
        count = place.num_frames * self._width
        begin = place.offset + place.size - count * FLOAT16_BYTES
        return np.frombuffer(mapped, "<f2", count, begin).reshape(place.num_frames, self._width)

    def close(self) -> None:
        """Unmap the file as soon as no array lies in it any more; the next touch maps it again."""
        self._map = None

    def _open(self) -> mmap.mmap:
        stamp = self._stamp()
        if stamp != self._verified:
            if sha256_file(self._path) != self._sha256:
                raise BadInput(f"{self._path} is damaged: its bytes have changed; {AGAIN}")
            self._verified = stamp
        with self._path.open("rb") as file:
            # A private copy, page by page and only where written to: torch wants arrays that can be written.
            self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
        return self._map

    def _fits(self, place: Place) -> bool:
        """Whether a whole array and the header before it lie inside the file."""
        header = place.size - place.num_frames * self._width * FLOAT16_BYTES
        return len(NPY_MAGIC) < header <= 512 and 0 <= place.offset <= self._bytes - place.size

    def _stamp(self) -> tuple[int, ...]:
        try:
            stat = self._path.stat()
        except FileNotFoundError:
            raise BadInput(f"{self._path} is missing{self._perhaps_renamed()}; {AGAIN}") from None
        if stat.st_size != self._bytes:
            raise BadInput(f"{self._path} has {stat.st_size} bytes instead of {self._bytes}; {AGAIN}")
        return stat.st_size, stat.st_mtime_ns, stat.st_ino

    def _perhaps_renamed(self) -> str:
        indexed = {record["name"] for record in [*read_index(self._path.with_name(INDEX))][1:]}
        strangers = sorted(p.name for p in self._path.parent.glob("*.tar") if p.name not in indexed)
        return f" ({', '.join(strangers)} is in no index: was it renamed?)" if strangers else ""


class FeatureReader:
    """Every clip of one or more feature sets, by key, in any order.

    Attributes:
        clips: metadata of every clip (with `num_frames`), in key order.
        shards: the tars of all sets, in order.
        width: D.
        policy: how the frames were made.
    """

    def __init__(self, *sets: FeatureShards) -> None:
        """Raises BadInput where sets were made in different ways, share a key, or are damaged."""
        if not sets:
            raise BadInput("no features were given; give at least one set.")
        self.shards: list[Shard] = []
        self._places: dict[str, tuple[Shard, Place]] = {}
        facts: Mapping[str, Any] = {}
        for each in sets:
            found, shards = _read_set(each)
            facts = facts or found
            if found != facts:
                raise BadInput(
                    f"{sets[0].uri} and {each.uri} hold different features ({facts}; {found}); "
                    "extract both with one encoder, layers, mix and dtype."
                )
            for shard in shards:
                self._add(shard, each)
        self.policy: dict[str, Any] = facts["policy"]
        self.width: int = facts["width"]
        self.clips = [place.metadata for _, (_, place) in sorted(self._places.items())]

    @property
    def policy_digest(self) -> str:
        """One text for the way the frames were made; what was taught on it is worth nothing on another."""
        return sha256_text(canonical_json(self.policy))

    def _add(self, shard: Shard, features: FeatureShards) -> None:
        for place in shard.clips:
            if place.key in self._places:
                raise BadInput(
                    f"the clip {place.key} of {features.uri} is in another set too; keys must differ."
                )
            self._places[place.key] = (shard, place)
        self.shards.append(shard)

    def __len__(self) -> int:
        return len(self.clips)

    def by_split(self, split: str) -> list[dict[str, Any]]:
        """Metadata of the clips of one split, in key order."""
        return [clip for clip in self.clips if clip["split"] == split]

    def frames(self, key: str) -> np.ndarray:
        """Frames (T, D) float32 of one clip.

        Raises:
            KeyError: no such clip.
            BadInput: the tar's bytes are not those that were written.
        """
        shard, place = self._places[key]
        return shard.frames(place).astype(np.float32)


def _read_set(features: FeatureShards) -> tuple[dict[str, Any], list[Shard]]:
    """What all frames of a set have in common, and its tars."""
    path = features.out / INDEX
    records = read_index(path)
    try:
        facts = next(records)
        shards = [Shard(features.out / record["name"], record, facts["width"]) for record in records]
        found = {"policy": facts["policy"], "width": facts["width"]}
    except (KeyError, TypeError) as error:
        raise BadInput(f"{path} is no index of features (it lacks {error}); {AGAIN}") from None
    places = [place for shard in shards for place in shard.clips]
    counted = (len(places), sum(place.num_frames for place in places), found["width"])
    if counted != (features.num_clips, features.num_frames, features.width):
        raise BadInput(
            f"{path} lists {counted[0]} clips of {counted[1]} frames, {counted[2]} wide, where the artifact "
            f"has {features.num_clips} of {features.num_frames}, {features.width} wide; {AGAIN}"
        )
    return found, shards


class StreamState(NamedTuple):
    """Where a stream stands: `cursor` clips of this epoch have been taken by all ranks together."""

    seed: int
    epoch: int
    cursor: int


class FeatureStream:
    """The clips of one split, epoch after epoch, dealt out to ranks.

    Each `for` goes through the rest of an epoch and yields key, frames (T, D) float16 and metadata. Of every
    `world` clips in the epoch's order, rank r gets the r-th; the last few, if they are too few for all, are
    left out of this epoch, so that every rank takes the same number of steps.

    Attributes:
        state: to go on later exactly here, on every rank, keep it (it is equal on all) and `restore` it.
    """

    def __init__(self, reader: FeatureReader, split: str, seed: int, rank: int = 0, world: int = 1) -> None:
        """Raises BadInput where the split has fewer clips than there are ranks."""
        own = [
            (shard, [place for place in shard.clips if place.metadata["split"] == split])
            for shard in reader.shards
        ]
        self._shards = [(shard, places) for shard, places in own if places]
        self._num_clips = sum(len(places) for _, places in self._shards)
        self._rank, self._world = rank, world
        self.state = StreamState(seed, 0, 0)
        if len(self) < 1:
            raise BadInput(f"the {split} split has fewer clips than the {world} ranks; raise its size.")

    def __len__(self) -> int:
        """Clips per rank and epoch."""
        return self._num_clips // self._world

    def restore(self, state: StreamState) -> None:
        """Go on where `state` was kept, perhaps with another number of ranks.

        Raises:
            BadInput: no epoch of these features has such a place.
        """
        state = StreamState(*state)
        if not (state.epoch >= 0 and 0 <= state.cursor <= self._num_clips):
            raise BadInput(f"{state} lies outside these features; continue with the features it began with.")
        self.state = state

    def __iter__(self) -> Iterator[tuple[str, np.ndarray, dict[str, Any]]]:
        seed, epoch, begin = self.state
        end = begin + (self._num_clips - begin) // self._world * self._world
        mine, first = begin + self._rank, 0  # the next place in the epoch's order; where the tar begins in it
        for number in np.random.default_rng([seed, epoch]).permutation(len(self._shards)):
            shard, places = self._shards[number]
            last = first + len(places)
            order = np.random.default_rng([seed, epoch, number]).permutation(len(places))
            while mine < min(last, end):
                place = places[order[mine - first]]
                mine += self._world
                self.state = StreamState(seed, epoch, mine - self._rank)
                yield place.key, shard.frames(place), place.metadata
            shard.close()
            first = last
        self.state = StreamState(seed, epoch + 1, 0)
