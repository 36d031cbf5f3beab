"""Frames of the frozen encoder, extracted once, stored in tars that webdataset reads.

One feature tar belongs to one tar of the corpus: that keeps identity simple, and clips that are added to a
corpus cost only the tars they come in. An hour of sound is 180 MB of whisper-base frames (512 wide, 50 a
second), so a corpus tar of 20 to 80 minutes gives one of 64 to 256 MB; more or less is right as well, only
less convenient to move about.

Features are only as good as the way they were made, so the index carries the *policy* (encoder, layers, mix,
precision), and a model taught on one policy refuses another.

Axes: N samples, T encoder frames, D frame width.
"""

import contextlib
import itertools
import json
import os
import threading
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch

from omni_model import hardware, workers
from omni_model.artifacts import Artifact, AudioCorpus, EncoderFiles, sha256_file
from omni_model.audio import corpora, shards
from omni_model.audio.encoder import Encoder, load_encoder
from omni_model.audio.waveform import decode
from omni_model.config import JSON, BadInput, FeatureRecipe, Runtime
from omni_model.storage import Workspace

CLIPS_PER_BATCH = {"cpu": 1, "cuda": 64}
WORTH_A_WORKER_FLOP = 1e12  # some ten seconds of a core: a worker takes a few to start

Named = tuple[str, np.ndarray, dict[str, Any]]
T = TypeVar("T")


def extract(
    recipe: FeatureRecipe, corpus: AudioCorpus, encoder: EncoderFiles, *, work: Workspace, runtime: Runtime
) -> dict[str, JSON]:
    """Encode every clip of a corpus. Stage function; returns the facts of FeatureShards.

    Finished tars of a killed attempt are kept, and those of earlier features of a like corpus are taken over.

    Raises:
        BadInput: an unknown layer or dtype, a damaged corpus, a full disk, or frames too large for 16 bits.
        RuntimeError: a worker failed or was killed.
    """
    num_layers = len(recipe.layers) if recipe.mix == "concat" else 1
    facts: dict[str, JSON] = {
        "num_layers": num_layers,
        "policy": dict(policy(recipe, encoder)),
        "width": num_layers * encoder.width,
    }
    sources = [shard for shard in corpora.read_index(corpus)["shards"] if shard["num_clips"]]
    with shards.full_disk_told(work.partial):
        _make_shards(recipe, corpus, encoder, facts, sources, work, runtime)
        num_clips, num_frames = _publish(facts, [_target(source, work.partial) for source in sources], work)
    if num_clips != corpus.num_clips:
        raise BadInput(
            f"{corpus.uri} holds {num_clips} of {corpus.num_clips} clips; delete it to have it made again."
        )
    work.metrics.summary(clips=num_clips, frames=num_frames, width=num_layers * encoder.width)
    return {
        "num_clips": num_clips,
        "num_frames": num_frames,
        "width": num_layers * encoder.width,
        "num_layers": num_layers,
        "frame_rate_hz": encoder.frame_rate_hz,
    }


def policy(recipe: FeatureRecipe, encoder: EncoderFiles) -> dict[str, Any]:
    """What must be equal for two sets of features to mean the same; an open dtype is this machine's."""
    dtype = hardware.fast_dtype() if recipe.dtype == "auto" else recipe.dtype
    return {"encoder": encoder.digest, "layers": list(recipe.layers), "mix": recipe.mix, "dtype": dtype}


def encode_samples(samples: np.ndarray, encoder: Encoder) -> np.ndarray:
    """Frames (T, D) float16 of samples (N,) at 16 kHz: the one way from sound to features, taught or served.

    Raises:
        BadInput: too short, silent, or frames that 16 bits cannot hold.
    """
    return encode_clips([samples], encoder)[0]


def encode_clips(clips: Sequence[np.ndarray], encoder: Encoder) -> list[np.ndarray]:
    """`encode_samples` of several clips at once."""
    with np.errstate(over="ignore"):
        frames = [frames_TD.astype(np.float16) for frames_TD in encoder.encode_batch(clips)]
    if not all(np.isfinite(frames_TD).all() for frames_TD in frames):
        raise BadInput("the encoder's frames do not fit 16-bit floats; choose features.layers=last.")
    return frames


# --- the stage's parts ---------------------------------------------------------------------------


def _target(source: Mapping[str, Any], partial: Path) -> Path:
    return partial / f"features-{source['name'].removeprefix('clips-')}"


def _make_shards(
    recipe: FeatureRecipe,
    corpus: AudioCorpus,
    encoder: EncoderFiles,
    facts: Mapping[str, Any],
    sources: Sequence[Mapping[str, Any]],
    work: Workspace,
    runtime: Runtime,
) -> None:
    """Bring every tar into `partial`: kept, borrowed, or made."""
    missing = [s for s in sources if shards.finished(_target(s, work.partial), s["sha256"]) is None]
    wanted = {source["sha256"]: _target(source, work.partial).name for source in missing}
    borrowed = shards.borrow(work.kin() if wanted else [], facts, wanted, work.partial)
    missing = [source for source in missing if _target(source, work.partial).name not in borrowed]
    work.metrics.summary(shards=len(sources), shards_borrowed=len(borrowed))
    if not missing:
        return
    device = "cuda" if torch.cuda.is_available() else "cpu"
    setup: dict[str, Any] = {
        "encoder": encoder.to_json(),
        "policy": facts["policy"],
        "device": device,
        "corpus": str(corpus.out),
        "partial": str(work.partial),
    }
    told = _progress(work, corpus.num_clips - sum(s["num_clips"] for s in missing), corpus.num_clips)
    jobs = [{name: source[name] for name in ("name", "sha256", "num_clips")} for source in missing]
    num_workers = _num_workers(runtime, corpus, encoder, len(jobs), device)
    if num_workers > 1:
        workers.spread(__name__, setup, jobs, num_workers, told)
        return
    extract_shard = _extractor(setup)
    for job in jobs:
        extract_shard(job, told)


def _progress(work: Workspace, done: int, total: int) -> workers.Told:
    lock, count = threading.Lock(), itertools.count(done + 1)

    def told(steps: int) -> None:
        with lock:
            for _ in range(steps):
                work.metrics.log(next(count), total)

    return told


def _num_workers(
    runtime: Runtime, corpus: AudioCorpus, encoder: EncoderFiles, num_shards: int, device: str
) -> int:
    """As many as were asked for, else as many as have enough to do; a card is fed by one."""
    if device != "cpu":
        return 1
    if runtime.workers:
        return min(runtime.workers, num_shards)
    # A layer has 12 E^2 weights, used twice (multiply, add) in every frame.
    flop_per_s = 24 * encoder.num_layers * encoder.width**2 * encoder.frame_rate_hz
    worthwhile = int(corpus.duration_s * flop_per_s / WORTH_A_WORKER_FLOP)
    cores = (os.cpu_count() or 1) // runtime.parallel_stages
    return max(1, min(cores, num_shards, worthwhile))


def _publish(facts: Mapping[str, Any], targets: Sequence[Path], work: Workspace) -> tuple[int, int]:
    """Write the index, and put every tar into the payload. Returns the numbers of clips and frames."""
    num_clips = num_frames = 0

    def records() -> Iterator[shards.Record]:
        nonlocal num_clips, num_frames
        for target in targets:
            record = json.loads(shards.record_path(target).read_text())
            num_clips, num_frames = num_clips + record["num_clips"], num_frames + record["num_frames"]
            yield record

    shards.write_index(work.out / shards.INDEX, facts, records())
    for target in targets:
        work.deliver(target.name)
    return num_clips, num_frames


@contextlib.contextmanager
def _one_thread() -> Iterator[None]:
    """One torch thread, as each worker has: bytes may not depend on how many there are."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


# --- one shard -----------------------------------------------------------------------------------


def _extractor(setup: Mapping[str, Any]) -> workers.Work:
    """What encodes one tar of the corpus, in the stage's process or a worker's."""
    files = Artifact.from_json(setup["encoder"])
    assert isinstance(files, EncoderFiles)
    way, device, batch = setup["policy"], setup["device"], CLIPS_PER_BATCH[setup["device"]]
    corpus, partial = Path(setup["corpus"]), Path(setup["partial"])
    encoder = load_encoder(files, tuple(way["layers"]), way["mix"], way["dtype"], device)

    def extract_shard(job: Mapping[str, Any], told: workers.Told) -> None:
        decoded = _ahead(_decoded(corpus / job["name"], job["sha256"], job["num_clips"]), 2 * batch)
        encoded = _ahead(_encoded(decoded, encoder, batch), 2 * batch)
        with shards.full_disk_told(partial), _one_thread():
            shards.write_shard(_target(job, partial), job["sha256"], _counted(encoded, told))

    return extract_shard


def _decoded(source: Path, sha256: str, num_clips: int) -> Iterator[Named]:
    """Key, samples (N,) and metadata of every clip of a corpus tar, if they are those that were written."""
    damaged = BadInput(
        f"{source} is not what its corpus's index says; delete that artifact to have it made again."
    )
    if not source.exists():
        raise damaged
    before = _stamp(source)
    if sha256_file(source) != sha256:
        raise damaged
    count = 0
    for key, sound, metadata in corpora.read_shard(source):
        yield key, decode(sound, f"{source.name}/{key}"), metadata
        count += 1
    if count != num_clips or _stamp(source) != before:  # changed while it was read
        raise damaged


def _stamp(path: Path) -> tuple[int, int, int]:
    stat = path.stat()
    return stat.st_size, stat.st_mtime_ns, stat.st_ino


def _encoded(clips: Iterator[Named], encoder: Encoder, batch: int) -> Iterator[Named]:
    """The same with frames (T, D) float16 in place of samples."""
    while group := list(itertools.islice(clips, batch)):
        frames = encode_clips([samples for _, samples, _ in group], encoder)
        for (key, _, metadata), frames_TD in zip(group, frames, strict=True):
            yield key, frames_TD, metadata


def _counted(clips: Iterator[Named], told: workers.Told) -> Iterator[Named]:
    for clip in clips:
        yield clip
        told(1)


def _ahead(items: Iterator[T], count: int) -> Iterator[T]:
    """The same items, computed in a thread of their own, up to `count` ahead of whoever takes them."""
    end = object()
    with ThreadPoolExecutor(1) as thread:
        waiting = deque(thread.submit(next, items, end) for _ in range(count))
        try:
            while (item := waiting.popleft().result()) is not end:
                waiting.append(thread.submit(next, items, end))
                yield item  # type: ignore[misc]
        finally:
            for each in waiting:
                each.cancel()


def _work() -> None:
    """A worker of `extract`, in a process of its own."""

    def prepare(setup: Mapping[str, Any]) -> workers.Work:
        hardware.prepare_torch(Runtime(threads=1), seed=0)
        return _extractor(setup)

    workers.serve(prepare)


if __name__ == "__main__":
    _work()
