"""Frames of the frozen encoder, extracted once, stored in tars that webdataset reads.

One feature tar belongs to one tar of the corpus. `index.json` says where each clip's array lies, so training
reads any clip in any order with one seek; the tars are ordinary webdataset shards too. Features are only as
good as the way they were made, so the index carries the *policy* (encoder, layer, precision), and a model
taught on one policy refuses another.

Axes: T encoder frames (50 Hz), D feature width.
"""

import io
import json
import os
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from omni_model.artifacts import AudioCorpus, EncoderFiles, FeatureShards, sha256_file, write_atomically
from omni_model.audio.corpora import read_shard, shard_paths
from omni_model.audio.encoder import FrozenEncoder, load_encoder
from omni_model.audio.mel import log_mel
from omni_model.audio.waveform import ENCODER_FRAME_RATE_HZ, decode
from omni_model.config import JSON, BadInput, FeatureRecipe, Runtime
from omni_model.storage import Workspace

INDEX = "index.json"
ARRAY_SUFFIX, METADATA_SUFFIX = ".feat.npy", ".json"
TAR_OWNER = "omni"


def extract(
    recipe: FeatureRecipe, corpus: AudioCorpus, encoder: EncoderFiles, *, work: Workspace, runtime: Runtime
) -> dict[str, JSON]:
    """Encode every clip of a corpus. Stage function; returns the facts of FeatureShards.

    Raises:
        BadInput: an unknown layer or dtype, a damaged corpus, or frames that 16 bits cannot hold.
    """
    ear = load_encoder(encoder, recipe.dtype, recipe.layer)
    shards, done = [], 0
    for source in shard_paths(corpus):
        target = work.partial / source.name.replace("clips-", "features-")
        if not target.exists():
            _extract_shard(source, target, ear, work, done, corpus.num_clips)
        shards.append(_index_shard(target))
        done += shards[-1]["num_clips"]
    if done != corpus.num_clips:
        raise BadInput(
            f"{corpus.uri} holds {done} of {corpus.num_clips} clips; delete it to have it made again."
        )
    for shard in shards:
        os.replace(work.partial / shard["name"], work.out / shard["name"])
    index = {"policy": policy(recipe, encoder), "width": ear.width, "shards": shards}
    write_atomically(work.out / INDEX, json.dumps(index, sort_keys=True, separators=(",", ":")) + "\n")
    num_frames = sum(clip["num_frames"] for shard in shards for clip in shard["clips"])
    work.metrics.summary(clips=done, frames=num_frames, width=ear.width)
    return {
        "num_clips": done,
        "num_frames": num_frames,
        "width": ear.width,
        "frame_rate_hz": ENCODER_FRAME_RATE_HZ,
    }


def policy(recipe: FeatureRecipe, encoder: EncoderFiles) -> dict[str, str]:
    """What must be equal for two sets of features to mean the same."""
    return {"encoder": encoder.digest, "layer": recipe.layer, "dtype": recipe.dtype}


def encode_samples(samples: np.ndarray, encoder: FrozenEncoder) -> np.ndarray:
    """Frames (T, D) float16 of samples (N,) at 16 kHz: the one way from sound to features, taught or served.

    Raises:
        BadInput: too short, silent, or frames that 16 bits cannot hold.
    """
    frames_TD = encoder.encode(log_mel(samples, encoder.num_mel_bins)).numpy().astype(np.float16)
    if not np.isfinite(frames_TD).all():
        raise BadInput("the encoder's frames do not fit 16-bit floats; choose features.layer=last.")
    return frames_TD


def _extract_shard(
    source: Path, target: Path, encoder: FrozenEncoder, work: Workspace, done: int, total: int
) -> None:
    """Write one feature tar under a temporary name, read it back, and only then give it its name."""
    from webdataset.writer import TarWriter

    temporary, written = target.with_suffix(".tmp"), 0
    with temporary.open("wb") as file:
        # Time and owner are fixed: the same features must be the same bytes.
        with TarWriter(file, user=TAR_OWNER, group=TAR_OWNER, mtime=0, encoder=False, compress=False) as tar:
            for key, sound, metadata in read_shard(source):
                frames_TD = encode_samples(decode(sound, f"{source.name}/{key}"), encoder)
                row = json.dumps({**metadata, "num_frames": len(frames_TD)}, sort_keys=True)
                sample = {ARRAY_SUFFIX[1:]: _npy(frames_TD), METADATA_SUFFIX[1:]: row.encode()}
                tar.write({"__key__": key, **sample})
                written += 1
                work.metrics.log(done + written, total)
        file.flush()
        os.fsync(file.fileno())
    if (found := _index_shard(temporary)["num_clips"]) != written:
        raise OSError(f"{temporary} holds {found} clips after {written} were written; is the disk sound?")
    os.replace(temporary, target)


def _npy(array: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, array, allow_pickle=False)
    return buffer.getvalue()


def _index_shard(path: Path) -> dict[str, Any]:
    """Name, sha256, size and clips of one feature tar; per clip where its array lies, and its metadata."""
    clips = []
    with tarfile.open(path, "r:") as tar:
        members = tar.getmembers()
        for array, row in zip(members[::2], members[1::2], strict=True):
            key = array.name.removesuffix(ARRAY_SUFFIX)
            if row.name != key + METADATA_SUFFIX:
                raise OSError(f"{path} holds {array.name} and {row.name} where one clip's pair should be")
            file = tar.extractfile(row)
            assert file is not None
            metadata = json.loads(file.read())
            place = {"offset": array.offset_data, "size": array.size, "num_frames": metadata["num_frames"]}
            clips.append({"key": key, **place, "metadata": metadata})
    file_facts = {"name": path.name, "sha256": sha256_file(path), "bytes": path.stat().st_size}
    return {**file_facts, "num_clips": len(clips), "clips": clips}


# --- reading -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Place:
    """Where one clip's array lies."""

    path: Path
    sha256: str
    offset: int
    size: int


class FeatureReader:
    """Every clip of one or more feature sets, by key, in any order.

    Attributes:
        clips: metadata of every clip (with `num_frames`), in key order.
        width: D.
        policy: how the frames were made.
    """

    def __init__(self, *sets: FeatureShards) -> None:
        """Raises BadInput where sets were made in different ways, share a key, or are damaged."""
        if not sets:
            raise BadInput("no features were given; give at least one set.")
        indexes = [_read_index(each) for each in sets]
        self.policy: dict[str, str] = indexes[0]["policy"]
        self.width: int = indexes[0]["width"]
        self.clips: list[dict[str, Any]] = []
        self._places: dict[str, _Place] = {}
        self._verified: set[Path] = set()
        for each, index in zip(sets, indexes, strict=True):
            if (index["policy"], index["width"]) != (self.policy, self.width):
                raise BadInput(
                    f"{sets[0].uri} and {each.uri} hold different features "
                    f"({self.width} wide, {self.policy}; {index['width']} wide, {index['policy']}); "
                    "extract both with one encoder, layer and dtype."
                )
            for clip, place in _places(each, index):
                if clip["key"] in self._places:
                    raise BadInput(
                        f"the clip {clip['key']} of {each.uri} is in another set too; keys must differ."
                    )
                self.clips.append(clip)
                self._places[clip["key"]] = place
        self.clips.sort(key=lambda clip: clip["key"])

    def __len__(self) -> int:
        return len(self.clips)

    def by_split(self, split: str) -> list[dict[str, Any]]:
        """Metadata of the clips of one split, in key order."""
        return [clip for clip in self.clips if clip["split"] == split]

    def frames(self, key: str) -> np.ndarray:
        """Frames (T, D) float32 of one clip. A shard is hashed once, when it is first touched.

        Raises:
            KeyError: no such clip.
            BadInput: the shard's bytes are not those that were written.
        """
        place = self._places[key]
        if place.path not in self._verified:
            if not place.path.exists() or sha256_file(place.path) != place.sha256:
                raise BadInput(f"{place.path} is missing or damaged; delete its artifact and run again.")
            self._verified.add(place.path)
        with place.path.open("rb") as file:
            file.seek(place.offset)
            array = np.load(io.BytesIO(file.read(place.size)), allow_pickle=False)
        return array.astype(np.float32)


def _read_index(features: FeatureShards) -> dict[str, Any]:
    try:
        return dict(json.loads((features.out / INDEX).read_text()))
    except (OSError, ValueError):
        raise BadInput(f"{features.out / INDEX} cannot be read; delete its artifact and run again.") from None


def _places(features: FeatureShards, index: dict[str, Any]) -> Iterator[tuple[dict[str, Any], _Place]]:
    for shard in index["shards"]:
        for clip in shard["clips"]:
            path = features.out / shard["name"]
            yield clip["metadata"], _Place(path, shard["sha256"], clip["offset"], clip["size"])
