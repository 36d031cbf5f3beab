"""One contender of `python -m tests.bench sound`, in a process of its own with one thread.

    python -m tests.bench.sound_worker '{"work": "ours", "folder": "...", "dtype": "float32"}'

It prepares, does its work once, and prints one line of JSON; then it does the work again for every line of
standard input, and answers each with one line: wall and CPU seconds, and what else was measured.
"""

import contextlib
import io
import json
import os
import shutil
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from omni_model.artifacts import AudioCorpus, EncoderFiles, FeatureShards
from omni_model.audio import features, whisper
from omni_model.audio.corpora import shard_paths
from omni_model.audio.encoder import Encoder
from omni_model.audio.waveform import num_encoder_frames
from omni_model.config import FeatureRecipe, Runtime
from omni_model.launch import peak_memory_bytes
from tests.small_sound import CheapEncoder, make


@dataclass(frozen=True)
class Job:
    """What one contender does, with the corpus and the encoder that lie in `folder`."""

    work: str  # "ours", "transformers" or "memory"
    folder: str
    corpus: dict[str, Any]
    encoder: dict[str, Any]
    dtype: str = "float32"
    workers: int = 1


@dataclass
class Clock:
    """Wall seconds inside one function."""

    seconds: float = 0.0

    def around(self, function: Callable[..., Any]) -> Callable[..., Any]:
        def timed(*arguments: Any) -> Any:
            began = time.perf_counter()
            try:
                return function(*arguments)
            finally:
                self.seconds += time.perf_counter() - began

        return timed


def ours(job: Job) -> Callable[[], dict[str, float]]:
    """The stage as a run would do it; the encoder is loaded once."""
    corpus, files = _handles(job)
    encoding, mel = Clock(), Clock()
    load = features.load_encoder
    loaded: list[Encoder] = []

    def load_once(*arguments: Any) -> Encoder:
        if not loaded:
            loaded.append(load(*arguments))
            loaded[0].encode_batch = encoding.around(loaded[0].encode_batch)  # type: ignore[method-assign]
        return loaded[0]

    features.load_encoder = load_once
    whisper.log_mel = mel.around(whisper.log_mel)  # type: ignore[assignment]

    def work() -> dict[str, float]:
        directory = Path(job.folder) / f"ours-{job.dtype}"
        shutil.rmtree(directory, ignore_errors=True)
        encoding.seconds = mel.seconds = 0.0
        make(FeatureShards, features.extract, directory, FeatureRecipe(dtype=job.dtype), corpus, files)
        return {"encoder": encoding.seconds - mel.seconds, "mel": mel.seconds}

    return work


def transformers(job: Job) -> Callable[[], dict[str, float]]:
    """The same by transformers as its documentation has it: padded to 30 s, one clip at a time, in fp32."""
    import soundfile
    from transformers import WhisperFeatureExtractor, WhisperModel
    from webdataset import WebDataset

    corpus, files = _handles(job)
    extractor = WhisperFeatureExtractor.from_pretrained(files.out)
    encoder = WhisperModel.from_pretrained(files.out).eval().encoder
    directory = Path(job.folder) / "theirs"
    directory.mkdir(exist_ok=True)
    paths = [str(path) for path in shard_paths(corpus)]

    @torch.inference_mode()
    def work() -> dict[str, float]:
        for clip in WebDataset(paths, shardshuffle=False):
            samples, rate_hz = soundfile.read(io.BytesIO(clip["wav"]), dtype="float32")
            mel = extractor(samples, sampling_rate=rate_hz, return_tensors="pt").input_features
            frames = encoder(mel).last_hidden_state[0, : num_encoder_frames(len(samples))]
            np.save(directory / clip["__key__"], frames.numpy().astype(np.float16))
        return {}

    return work


def memory(job: Job) -> Callable[[], dict[str, float]]:
    """The stage with an encoder that costs nothing: what is left is what grows with a corpus, if it does."""
    corpus, _ = _handles(job)
    ear = CheapEncoder(64)
    features.load_encoder = lambda *_: ear  # type: ignore[assignment,return-value]

    def work() -> dict[str, float]:
        with contextlib.suppress(OSError):  # Linux: forget the peak of the imports
            Path("/proc/self/clear_refs").write_text("5")
        before = peak_bytes()
        ear.extract(corpus, Path(job.folder) / f"memory-{corpus.num_clips}")
        shutil.rmtree(Path(job.folder) / f"memory-{corpus.num_clips}")
        return {"before_bytes": before, "peak_bytes": peak_bytes()}

    return work


def peak_bytes() -> int:
    """Peak resident memory of this program; getrusage's would begin with that of the process it came from."""
    status = Path("/proc/self/status")
    if not status.exists():
        return peak_memory_bytes()
    line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM:"))
    return int(line.split()[1]) * 1024


def divided(job: Job) -> Callable[[], dict[str, float]]:
    """The stage with so many workers, started anew each time; its own log tells when clips were done."""
    corpus, files = _handles(job)
    directory = Path(job.folder) / f"by-{job.workers}"

    def work() -> dict[str, float]:
        shutil.rmtree(directory, ignore_errors=True)
        recipe, runtime = FeatureRecipe(dtype=job.dtype), Runtime(workers=job.workers)
        made = make(FeatureShards, features.extract, directory, recipe, corpus, files, runtime=runtime)
        lines = (directory / "metrics.jsonl").read_text().splitlines()
        times = [json.loads(line)["time"] for line in lines]
        return {"clips_per_s": (len(times) - 1) / (times[-1] - times[0]), "digest": made.digest}

    return work


WORKS: dict[str, Callable[[Job], Callable[[], dict[str, float]]]] = {
    "ours": ours,
    "transformers": transformers,
    "memory": memory,
    "divided": divided,
}


def _handles(job: Job) -> tuple[AudioCorpus, EncoderFiles]:
    return AudioCorpus(**job.corpus), EncoderFiles(**job.encoder)


def timed(work: Callable[[], dict[str, float]]) -> dict[str, float]:
    """Wall and CPU seconds of one repetition, and what it measured itself."""
    wall, cpu = time.perf_counter(), time.process_time()
    measured = work()
    return {"wall": time.perf_counter() - wall, "cpu": time.process_time() - cpu, **measured}


def main(words: Sequence[str]) -> None:
    """Serve one job until standard input ends."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever the contender prints is no answer
    torch.set_num_threads(1)
    job = Job(**json.loads(words[0]))
    work = WORKS[job.work](job)
    print(json.dumps(timed(work)), file=answers, flush=True)
    for _ in sys.stdin:
        print(json.dumps(timed(work)), file=answers, flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
