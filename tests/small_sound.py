"""Small corpora, encoders and features, and a stage run by hand, for every test about sound."""

import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from omni_model.artifacts import (
    Artifact,
    AudioCorpus,
    EncoderFiles,
    FeatureShards,
    Manifest,
    content_digest,
    hash_payload,
)
from omni_model.audio import clips, corpora, features, waveform
from omni_model.config import EncoderRecipe, FeatureRecipe, Runtime, SplitSizes, TextureRecipe
from omni_model.storage import Workspace
from omni_model.telemetry import Metrics

SEED = 11
TINY_ENCODER = EncoderRecipe(width=32, num_layers=2, num_heads=2, max_audio_s=3)
TINY_TEXTURE = TextureRecipe(clips=SplitSizes(train=10, validation=4, test=4), clips_per_shard=7)
FLOAT32 = FeatureRecipe(dtype="float32")
COMPONENTS = {"stage": "s", "code": "c", "packages": {}, "seed": 1, "recipe": {}}


def workspace(directory: Path, seed: int = SEED, components: dict[str, Any] | None = None) -> Workspace:
    """As a stage finds it: an empty payload, and what an earlier attempt left in `partial`."""
    shutil.rmtree(directory / "out", ignore_errors=True)
    (directory / "out").mkdir(parents=True)
    (directory / "partial").mkdir(exist_ok=True)
    return Workspace(directory, seed, Metrics(directory / "metrics.jsonl"), components or {})


def make(
    kind: type[Artifact],
    stage: Callable[..., dict[str, Any]],
    directory: Path,
    *args: Any,
    seed: int = SEED,
    runtime: Runtime | None = None,
    components: dict[str, Any] | None = None,
) -> Any:
    """Run a stage and hand back the handle that its caller would seal."""
    work = workspace(directory, seed, components)
    facts = stage(*args, work=work, runtime=runtime or Runtime(workers=1))
    assert set(facts) == kind.fact_names()
    digest = content_digest(hash_payload(directory / "out"))
    if components:  # finished, as others see it
        Manifest("s", "0" * 64, kind.__name__, components, [], facts, {}, {}, {}).write(directory)
        shutil.rmtree(directory / "partial")
    return kind("s", "0" * 64, str(directory), digest, **facts)


def noise(duration_s: float, seed: int = 0) -> np.ndarray:
    """Samples (N,) float32 at 16 kHz."""
    rng = np.random.default_rng(seed)
    return (rng.standard_normal(round(duration_s * waveform.SAMPLE_RATE_HZ)) * 0.1).astype(np.float32)


def noise_corpus(directory: Path, train: int, test: int = 3, per_shard: int = 3) -> AudioCorpus:
    """Clips of noise, each of its own length; more of them leave whole shards as they were."""
    plans = [
        clips.ClipPlan(f"{split}-{number:03d}", split, {}, {"number": number})
        for split, count in (("train", train), ("test", test))
        for number in range(count)
    ]

    def render(plan: clips.ClipPlan) -> clips.Clip:
        number = plan.parameters["number"]
        return clips.Clip(noise(0.5 + number % 7 * 0.1, number))

    def stage(*, work: Workspace, runtime: Runtime) -> dict[str, Any]:
        return corpora.write_corpus(plans, render, generator="noise", clips_per_shard=per_shard, work=work)

    corpus = make(AudioCorpus, stage, directory)
    assert isinstance(corpus, AudioCorpus)
    return corpus


class CheapEncoder:
    """Instead of a Whisper where only files matter: a frame is the first samples of its 20 ms."""

    def __init__(self, width: int) -> None:
        self.width, self.clips_heard = width, 0

    def encode_batch(self, batch: Sequence[np.ndarray]) -> list[np.ndarray]:
        self.clips_heard += len(batch)
        counts = [waveform.num_encoder_frames(len(samples)) for samples in batch]
        step = waveform.SAMPLE_RATE_HZ // waveform.ENCODER_FRAME_RATE_HZ
        return [
            samples[: count * step].reshape(count, step)[:, : self.width]
            for samples, count in zip(batch, counts, strict=True)
        ]

    def files(self, directory: Path) -> EncoderFiles:
        """A handle for it; nothing lies there."""
        return EncoderFiles("e", "0" * 64, str(directory), "d", "whisper", "none", self.width, 1, 50, 30.0)

    def extract(self, corpus: AudioCorpus, directory: Path, **options: Any) -> FeatureShards:
        """The features of a corpus. `features.load_encoder` must give this encoder."""
        files = self.files(directory)
        made = make(FeatureShards, features.extract, directory, FLOAT32, corpus, files, **options)
        assert isinstance(made, FeatureShards)
        return made
