"""A corpus of clips on disk: tars of WAV and JSON, written shard by shard, readable by anything.

A corpus is planned first: one *plan* per clip says its key, split, labels and parameters. Then a *renderer*
turns one plan into samples. Every random number of a clip comes from the stage's seed and the clip's own key,
so clips can be made in any order, one at a time, again after a kill, and come out the same.
"""

import io
import json
import os
import re
import tarfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from omni_model.artifacts import AudioCorpus, sha256_text, write_atomically
from omni_model.audio.waveform import SAMPLE_RATE_HZ, encode_wav
from omni_model.config import JSON, BadInput
from omni_model.storage import Workspace

SPLITS = ("train", "validation", "test")
KEY_PATTERN = re.compile(r"[A-Za-z0-9_-]+")
SYNTHETIC_LICENCE = "CC0-1.0"


@dataclass(frozen=True)
class ClipPlan:
    """One clip before it is made. `parameters` is what the renderer needs, in plain JSON.

    Attributes:
        labels: category -> value, only what can be heard in this clip.
        speaker: the voice's name, or "" where nobody speaks.
    """

    key: str
    split: str
    labels: dict[str, str]
    parameters: dict[str, Any]
    transcript: str = ""
    speaker: str = ""


@dataclass(frozen=True)
class Clip:
    """A clip as made: samples (N,) float32 at 16 kHz and what came to light while making it."""

    samples: np.ndarray
    provenance: dict[str, Any] = field(default_factory=dict)


def clip_rng(seed: int, key: str) -> np.random.Generator:
    """Random numbers that belong to one clip (or any other named thing) under one seed."""
    return np.random.default_rng([seed, int(sha256_text(key)[:16], 16)])


def write_corpus(
    plans: Sequence[ClipPlan],
    render: Callable[[ClipPlan], Clip],
    *,
    generator: str,
    clips_per_shard: int,
    work: Workspace,
) -> dict[str, JSON]:
    """Render every clip into `clips-NNNNN.tar` and `clips.jsonl`; finished shards of a killed run are kept.

    Returns the facts of an AudioCorpus.

    Raises:
        BadInput: nothing to write, or a key that is used twice or holds anything but [A-Za-z0-9_-].
    """
    plans = sorted(plans, key=lambda plan: plan.key)
    _check(plans, clips_per_shard)
    groups = [plans[i : i + clips_per_shard] for i in range(0, len(plans), clips_per_shard)]
    paths = [work.partial / f"clips-{number:05d}.tar" for number in range(len(groups))]
    done = 0
    for path, group in zip(paths, groups, strict=True):
        if not path.exists():
            _write_shard(path, group, render, generator, work, done, len(plans))
        done += len(group)
    rows = [metadata for path in paths for _, _, metadata in read_shard(path)]
    for path in paths:
        os.replace(path, work.out / path.name)
    lines = [json.dumps(row, sort_keys=True) + "\n" for row in rows]
    write_atomically(work.out / "clips.jsonl", "".join(lines))
    duration_s = round(sum(row["duration_s"] for row in rows), 6)
    work.metrics.summary(clips=len(rows), audio_s=duration_s)
    return {"num_clips": len(rows), "duration_s": duration_s, "sample_rate_hz": SAMPLE_RATE_HZ}


def _check(plans: Sequence[ClipPlan], clips_per_shard: int) -> None:
    if not plans or clips_per_shard < 1:
        raise BadInput("the corpus has no clips; set clips.train (and clips_per_shard) to 1 or more.")
    keys = {plan.key for plan in plans}
    if len(keys) < len(plans):
        raise BadInput(
            f"the corpus has {len(plans)} clips but {len(keys)} keys; each needs a key of its own."
        )
    for plan in plans:
        # webdataset cuts a key at its first dot, and tar members are paths.
        if not KEY_PATTERN.fullmatch(plan.key):
            raise BadInput(f"the clip key {plan.key!r} may hold only letters, digits, - and _.")
        if plan.split not in SPLITS:
            raise BadInput(f"the split {plan.split!r} of clip {plan.key} is none of {', '.join(SPLITS)}.")


def _write_shard(
    path: Path,
    plans: Sequence[ClipPlan],
    render: Callable[[ClipPlan], Clip],
    generator: str,
    work: Workspace,
    done: int,
    total: int,
) -> None:
    temporary = path.with_suffix(".tmp")
    with temporary.open("wb") as file:
        with tarfile.open(fileobj=file, mode="w", format=tarfile.USTAR_FORMAT) as tar:
            for plan in plans:
                clip = render(plan)
                _add(tar, f"{plan.key}.wav", encode_wav(clip.samples))
                row = json.dumps(_metadata(plan, clip, generator), sort_keys=True)
                _add(tar, f"{plan.key}.json", row.encode())
                done += 1
                work.metrics.log(done, total)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def _metadata(plan: ClipPlan, clip: Clip, generator: str) -> dict[str, Any]:
    return {
        "key": plan.key,
        "split": plan.split,
        "transcript": plan.transcript,
        "labels": plan.labels,
        "speaker": plan.speaker,
        "licence": SYNTHETIC_LICENCE,
        "provenance": {"generator": generator, **plan.parameters, **clip.provenance},
        "duration_s": round(len(clip.samples) / SAMPLE_RATE_HZ, 6),
    }


def _add(tar: tarfile.TarFile, name: str, content: bytes) -> None:
    member = tarfile.TarInfo(name)  # its defaults are fixed: mode 644, time 0, owner 0
    member.size = len(content)
    tar.addfile(member, io.BytesIO(content))


def read_clips(corpus: AudioCorpus) -> list[dict[str, Any]]:
    """The metadata of every clip, in key order."""
    with (corpus.out / "clips.jsonl").open() as file:
        return [json.loads(line) for line in file]


def shard_paths(corpus: AudioCorpus) -> list[Path]:
    """The corpus's tars in order."""
    return sorted(corpus.out.glob("clips-*.tar"))


def read_shard(path: Path) -> Iterator[tuple[str, bytes, dict[str, Any]]]:
    """Key, WAV bytes and metadata of each clip of one tar, in order.

    Raises:
        BadInput: the tar is cut off, or its members do not come in pairs.
    """
    try:
        with tarfile.open(path, "r:") as tar:
            members = tar.getmembers()
            for sound, text in zip(members[::2], members[1::2], strict=True):
                key = sound.name.removesuffix(".wav")
                if (sound.name, text.name) != (f"{key}.wav", f"{key}.json"):
                    raise BadInput(f"{path} holds {sound.name} and {text.name} where a pair should be.")
                yield key, _content(path, tar, sound), json.loads(_content(path, tar, text))
    except (tarfile.TarError, ValueError) as error:
        if isinstance(error, BadInput):
            raise
        raise BadInput(f"{path} is damaged ({error}); delete its artifact to have it made again.") from None


def _content(path: Path, tar: tarfile.TarFile, member: tarfile.TarInfo) -> bytes:
    file = tar.extractfile(member)
    if file is None:
        raise BadInput(
            f"{member.name} in {path} is not a plain file; delete its artifact to have it made again."
        )
    return file.read()
