"""From sound to features: extraction beside transformers, the mel, reading beside webdataset, memory.

Contenders that compute are processes of their own with one thread each, and take turns. An encoder of
whisper-base's shape stands for the real one, with random weights 2.5 times as large as usual, so that its
layers are not almost linear: its cost is the same, its sense is not.
"""

import argparse
import io
import json
import os
import statistics
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from omni_model import hardware
from omni_model.artifacts import AudioCorpus
from omni_model.audio.corpora import read_shard, shard_paths
from omni_model.audio.mel import log_mel
from omni_model.audio.reader import FeatureReader, FeatureStream
from omni_model.audio.waveform import SAMPLE_RATE_HZ, decode
from tests.bench import sound_material as material
from tests.bench.measure import Companion, columns, interleave
from tests.bench.sound_worker import Job

MIN_COSINE = 0.9999


@dataclass(frozen=True)
class Row:
    """One line of the table: what was measured, of what, and what it is to reach."""

    work: str
    value: str
    ratio: str = ""
    bar: str = ""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `python -m tests.bench sound`."""
    parser.add_argument("--rounds", type=int, default=5, help="how often every contender is timed")
    parser.add_argument("--quick", action="store_true", help="fewer clips and hours: does it run at all?")
    parser.add_argument("--only", default=",".join(PARTS), help="of " + ", ".join(PARTS))


def measure(options: argparse.Namespace) -> list[dict[str, Any]]:
    """Print the table, part by part; everything measured, as JSON."""
    names = options.only.split(",")
    if not set(names) <= set(PARTS):
        sys.exit(f"--only {options.only}: choose among {', '.join(PARTS)}.")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    found = []
    with tempfile.TemporaryDirectory() as folder:
        for name in names:
            print(f"preparing {name}", file=sys.stderr)
            (Path(folder) / name).mkdir()
            rows, record = PARTS[name](options, Path(folder) / name)
            lines = [(row.work, row.value, row.ratio, row.bar) for row in rows]
            print(columns([(name, "median", "ratio", "bar"), *lines]), end="\n\n", flush=True)
            found.append({"part": name, "rows": [asdict(row) for row in rows], **record})
    torch.set_num_threads(threads)
    return found


Part = tuple[list[Row], dict[str, Any]]


# --- extraction ----------------------------------------------------------------------------------


def extraction(options: argparse.Namespace, folder: Path) -> Part:
    """Whole extraction from a corpus's tars to files of frames, and where its time goes."""
    corpus = material.textures(folder / "corpus", 5 if options.quick else 14)
    dtype = hardware.fast_dtype()
    jobs = {
        "transformers, padded to 30 s, fp32": _job(folder, "transformers", corpus),
        "ours, float32": _job(folder, "ours", corpus),
        f"ours, {dtype}": _job(folder, "ours", corpus, dtype=dtype),
    }
    seconds = _turns(jobs, options.rounds)
    paces = {name: corpus.duration_s / _median(told, "cpu") for name, told in seconds.items()}
    first = next(iter(paces.values()))
    fastest = list(paces)[-1]
    cosine = _min_cosine(folder / "ours-float32", folder / f"ours-{dtype}")
    rows = [
        Row(
            f"{name}: audio-s per CPU-s",
            f"{pace:.1f}",
            f"{pace / first:.2f}x",
            ">= 6x" if name == fastest else "",
        )
        for name, pace in paces.items()
    ]
    rows.append(
        Row(f"cosine per frame, {dtype} with float32: least", f"{cosine:.6f}", "", f">= {MIN_COSINE}")
    )
    for name in list(paces)[1:]:
        outside = [1 - round_["encoder"] / round_["wall"] for round_ in seconds[name]]
        mel = [round_["mel"] / round_["wall"] for round_ in seconds[name]]
        value = f"{statistics.median(outside):.1%} (mel {statistics.median(mel):.1%})"
        rows.append(Row(f"{name}: wall outside the encoder", value, "", "<= 10%" if name == fastest else ""))
    return rows, {"audio_s": corpus.duration_s, "seconds": seconds, "min_cosine": cosine}


def _job(folder: Path, work: str, corpus: AudioCorpus, **fields: Any) -> Job:
    return Job(work, str(folder), asdict(corpus), asdict(material.whisper_base(folder / "encoder")), **fields)


def _turns(jobs: Mapping[str, Job], rounds: int) -> dict[str, list[dict[str, float]]]:
    """What each contender tells of every round; the first, with which it greets, does not count."""
    told: dict[str, list[dict[str, float]]] = {name: [] for name in jobs}
    companions: dict[str, Companion] = {}
    try:
        for name, job in jobs.items():
            words = [sys.executable, "-m", "tests.bench.sound_worker", json.dumps(asdict(job))]
            companions[name] = Companion(words, dict(os.environ, OMP_NUM_THREADS="1"))
        for _ in range(rounds):
            for name, companion in companions.items():
                told[name].append(companion.ask("again"))
    finally:
        for companion in companions.values():
            companion.close()
    return told


def _median(told: Sequence[Mapping[str, float]], name: str) -> float:
    return statistics.median(each[name] for each in told)


def _min_cosine(one: Path, other: Path) -> float:
    """The least cosine of any frame of two sets of features."""
    readers = [_frames(directory) for directory in (one, other)]
    least = 1.0
    for (key, a), (other_key, b) in zip(*readers, strict=True):
        assert key == other_key
        cosines = (a * b).sum(1) / np.linalg.norm(a, axis=1) / np.linalg.norm(b, axis=1)
        least = min(least, float(cosines.min()))
    return least


def _frames(directory: Path) -> Iterator[tuple[str, np.ndarray]]:
    """Key and frames (T, D) float64 of every clip of a payload, as any program would read it."""
    from webdataset import WebDataset

    paths = sorted(str(path) for path in (directory / "out").glob("*.tar"))
    for sample in WebDataset(paths, shardshuffle=False):
        yield sample["__key__"], np.load(io.BytesIO(sample["feat.npy"])).astype(np.float64)


# --- mel -----------------------------------------------------------------------------------------


def mel(options: argparse.Namespace, folder: Path) -> Part:
    """The log-mel spectrogram beside transformers' own with torch, on clips of 2 to 16 s."""
    from transformers import WhisperFeatureExtractor

    corpus = material.textures(folder / "corpus", 14)
    sounds = [decode(sound) for path in shard_paths(corpus) for _, sound, _ in read_shard(path)]
    extractor = WhisperFeatureExtractor()

    def theirs(samples: np.ndarray) -> torch.Tensor:
        spectra = extractor(
            samples, sampling_rate=SAMPLE_RATE_HZ, padding="longest", truncation=False, return_tensors="pt"
        )
        return spectra.input_features[0]

    def ours(samples: np.ndarray) -> torch.Tensor:
        return log_mel(samples, 80)

    def all_by(hear: Callable[[np.ndarray], torch.Tensor]) -> Callable[[], None]:
        def run() -> None:
            for samples in sounds:
                hear(samples)

        return run

    apart = 0.0
    for samples in sounds:
        own = ours(samples)
        apart = max(apart, float((own - theirs(samples)[:, : own.shape[1]]).abs().max()))
    found = interleave({"transformers": all_by(theirs), "ours": all_by(ours)}, 4 * options.rounds)
    rows = [
        Row(f"{row.name}: audio-s per s", f"{corpus.duration_s / row.median_s:,.0f}", f"{1 / row.ratio:.2f}x")
        for row in found
    ]
    rows[-1] = Row(rows[-1].work, rows[-1].value, rows[-1].ratio, ">= 1.4x")
    rows.append(Row("largest difference", f"{apart:.1e}", "", "<= 1e-6"))
    return rows, {"seconds": {row.name: row.seconds for row in found}, "largest_difference": apart}


# --- reading -------------------------------------------------------------------------------------


def reading(options: argparse.Namespace, folder: Path) -> Part:
    """From tars to float32 tensors: plain webdataset, our first epoch, which hashes all, and later ones."""
    from webdataset import WebDataset

    features = material.random_features(folder, num_shards=2 if options.quick else 4)
    paths = [str(path) for path in sorted(features.out.glob("*.tar"))]
    warm = FeatureReader(features)

    def plain() -> None:
        for sample in WebDataset(paths, shardshuffle=False):
            torch.from_numpy(np.load(io.BytesIO(sample["feat.npy"]), allow_pickle=False)).float()

    def ours(reader: FeatureReader) -> None:
        for _, frames, _ in FeatureStream(reader, "train", seed=0):
            torch.from_numpy(frames).float()

    ours(warm)
    contenders: dict[str, Callable[[], None]] = {
        "plain webdataset": plain,
        "ours, first epoch (every byte hashed)": lambda: ours(FeatureReader(features)),
        "ours, later epochs": lambda: ours(warm),
    }
    found = interleave(contenders, 2 * options.rounds)
    size_mb = sum(Path(path).stat().st_size for path in paths) / 1e6
    bars = ("", ">= 1x", ">= 2x")
    rows = [
        Row(f"{row.name}: MB/s", f"{size_mb / row.median_s:,.0f}", f"{1 / row.ratio:.2f}x", bar)
        for row, bar in zip(found, bars, strict=True)
    ]
    return rows, {"megabytes": size_mb, "seconds": {row.name: row.seconds for row in found}}


# --- memory and workers --------------------------------------------------------------------------


def memory(options: argparse.Namespace, folder: Path) -> Part:
    """Peak memory of a process that extracts an hour, and twenty, with an encoder that costs nothing."""
    hours = (0.25, 4) if options.quick else (1, 20)
    peaks = {}
    for audio_h in hours:
        corpus = material.long_corpus(folder / f"corpus-{audio_h}", audio_h)
        job = _job(folder, "memory", corpus)
        words = [sys.executable, "-m", "tests.bench.sound_worker", json.dumps(asdict(job))]
        companion = Companion(words, dict(os.environ, OMP_NUM_THREADS="1"))
        companion.close()
        peaks[audio_h] = companion.greeting
    short, long = (peaks[audio_h]["peak_bytes"] for audio_h in hours)
    rows = [
        Row(
            f"{audio_h:g} h: peak of the process (before it began)",
            f"{told['peak_bytes'] / 2**20:.0f} MiB ({told['before_bytes'] / 2**20:.0f})",
        )
        for audio_h, told in peaks.items()
    ]
    rows[-1] = Row(rows[-1].work, rows[-1].value, f"{long / short:.3f}x", "<= 1.1x")
    return rows, {"peaks": {str(audio_h): told for audio_h, told in peaks.items()}}


def workers(options: argparse.Namespace, folder: Path) -> Part:
    """Clips per second by one process and by two, from the first clip that is done to the last."""
    corpus = material.textures(folder / "corpus", 24 if options.quick else 72, (9.0, 9.0), clips_per_shard=6)
    jobs = {
        f"{number} worker{'s' * (number > 1)}": _job(
            folder, "divided", corpus, dtype=hardware.fast_dtype(), workers=number
        )
        for number in (1, 2)
    }
    told = _turns(jobs, max(1, options.rounds // 2))
    digests = {each["digest"] for rounds in told.values() for each in rounds}
    if len(digests) > 1:
        sys.exit("two workers made other bytes than one.")
    paces = {name: _median(rounds, "clips_per_s") for name, rounds in told.items()}
    one, two = paces.values()
    rows = [Row(f"{name}: clips per s", f"{pace:.2f}") for name, pace in paces.items()]
    rows[-1] = Row(rows[-1].work, rows[-1].value, f"{two / one:.2f}x", ">= 1.8x")
    wall_s = [_median(rounds, "wall") for rounds in told.values()]
    rows.append(Row("whole run, with loading: s", f"{wall_s[0]:.1f} and {wall_s[1]:.1f}"))
    return rows, {"told": told}


PARTS: dict[str, Callable[[argparse.Namespace, Path], Part]] = {
    "extraction": extraction,
    "mel": mel,
    "reading": reading,
    "memory": memory,
    "workers": workers,
}
