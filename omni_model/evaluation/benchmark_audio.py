"""The sounds of a benchmark, frozen beside its questions, so that they can be heard as long as it lives.

They lie in one tar, as a corpus's do: `<key>.wav` and `<key>.json`.
"""

import io
import json
import tarfile
from collections.abc import Sequence
from pathlib import Path

from omni_model.artifacts import AudioCorpus, Benchmark
from omni_model.audio.corpora import read_shard, shard_paths
from omni_model.config import BadInput
from omni_model.evaluation.benchmark_item import Item

AUDIO = "clips.tar"


def write_audio(items: Sequence[Item], corpora: Sequence[AudioCorpus], path: Path) -> None:
    """Copy the clips of the items out of their corpora, in key order.

    Raises:
        BadInput: a clip's sound is in no corpus; the item is named.
    """
    wanted = {key for item in items for key in item.clips}
    found: dict[str, tuple[bytes, bytes]] = {}
    # Tars are named after the split that they hold; the others are looked at only if that is not enough.
    shards = [shard for corpus in corpora for shard in shard_paths(corpus)]
    for shard in sorted(shards, key=lambda shard: "-test-" not in shard.name):
        if len(found) == len(wanted):
            break
        for key, sound, metadata in read_shard(shard):
            if key in wanted:
                found[key] = (sound, json.dumps(metadata, sort_keys=True).encode())
    for item in items:
        for key in item.clips:
            if key not in found:
                raise BadInput(
                    f"item {item.id} asks about the clip {key}, whose sound is in none of the corpora; "
                    "delete the corpus's artifact to have it made again"
                )
    with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as tar:
        for key in sorted(found):
            for suffix, content in zip((".wav", ".json"), found[key], strict=True):
                member = tarfile.TarInfo(f"{key}{suffix}")  # its defaults are fixed: no clock, no owner
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))


def read_audio(benchmark: Benchmark) -> dict[str, bytes]:
    """WAV bytes of every clip that is asked about, by key.

    Raises:
        BadInput: the tar is missing or damaged.
    """
    path = benchmark.out / AUDIO
    if not path.exists():
        raise BadInput(f"{path} is missing; delete {benchmark.uri} to have it made again")
    return {key: sound for key, sound, _ in read_shard(path)}
