"""What `python -m tests.bench sound` works on: corpora, an encoder of whisper-base's size, tars of frames."""

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from omni_model.artifacts import AudioCorpus, EncoderFiles, FeatureShards
from omni_model.audio import encoder, shards, texture
from omni_model.audio.clips import Clip, ClipPlan
from omni_model.audio.corpora import write_corpus
from omni_model.audio.waveform import SAMPLE_RATE_HZ
from omni_model.config import EncoderRecipe, Runtime, SplitSizes, TextureRecipe
from omni_model.storage import Workspace
from tests.small_sound import SEED, make

WHISPER_BASE = EncoderRecipe(width=512, num_layers=6, num_heads=8)
WEIGHT_SCALE = 2.5


def textures(
    directory: Path, count: int, duration_s: tuple[float, float] = (2.0, 16.0), clips_per_shard: int = 300
) -> AudioCorpus:
    """Tones, noises and beeps, between so many seconds long."""
    sizes = SplitSizes(count, 1, 1)
    recipe = TextureRecipe(clips=sizes, min_duration_s=duration_s[0], max_duration_s=duration_s[1])
    plans = texture.plan_split(recipe, "train", SEED)
    return _corpus(directory, plans, lambda plan: texture.render(plan, SEED), clips_per_shard)


def _corpus(
    directory: Path,
    plans: Sequence[ClipPlan],
    render: Callable[[ClipPlan], np.ndarray],
    clips_per_shard: int = 300,
) -> AudioCorpus:
    def stage(*, work: Workspace, runtime: Runtime) -> dict[str, Any]:
        return write_corpus(
            plans,
            lambda plan: Clip(render(plan)),
            generator="bench",
            clips_per_shard=clips_per_shard,
            work=work,
        )

    corpus = make(AudioCorpus, stage, directory)
    assert isinstance(corpus, AudioCorpus)
    return corpus


def long_corpus(directory: Path, audio_h: float) -> AudioCorpus:
    """Clips of ten seconds."""
    samples = np.random.default_rng(0).standard_normal(10 * SAMPLE_RATE_HZ).astype(np.float32) * 0.1
    plans = [ClipPlan(f"clip-{number:06d}", "train", {}, {}) for number in range(int(audio_h * 360))]
    return _corpus(directory, plans, lambda plan: np.roll(samples, int(plan.key[5:])))


def whisper_base(directory: Path) -> EncoderFiles:
    """Its shape, with random weights that are larger than usual."""
    from safetensors.torch import load_file, save_file

    made = make(EncoderFiles, encoder.make_encoder, directory, WHISPER_BASE)
    path = directory / "out" / "model.safetensors"
    weights = load_file(path)
    for name, tensor in weights.items():
        if name.startswith("encoder.layers.") and tensor.ndim == 2:
            tensor *= WEIGHT_SCALE
    save_file(weights, path, metadata={"format": "pt"})
    assert isinstance(made, EncoderFiles)
    return made


def random_features(folder: Path, num_shards: int, clips_per_shard: int = 150) -> FeatureShards:
    """Tars of whisper-base's width, some 70 MB each, clips of 2 to 16 s."""
    out = folder / "features" / "out"
    out.mkdir(parents=True)
    rng = np.random.default_rng(0)
    content = rng.standard_normal((800, WHISPER_BASE.width)).astype(np.float16)

    def clips(shard: int) -> Iterator[tuple[str, np.ndarray, dict[str, Any]]]:
        for number in range(clips_per_shard):
            key = f"clip-{shard}-{number}"
            yield key, content[: rng.integers(100, 800)], {"key": key, "split": "train", "labels": {}}

    records = [
        shards.write_shard(out / f"features-{shard}.tar", str(shard), clips(shard))
        for shard in range(num_shards)
    ]
    facts = {"num_layers": 1, "policy": {}, "width": WHISPER_BASE.width}
    shards.write_index(out / shards.INDEX, facts, records)
    counts = [sum(record[name] for record in records) for name in ("num_clips", "num_frames")]
    return FeatureShards("s", "k", str(out.parent), "d", *counts, WHISPER_BASE.width, 1, 50)
