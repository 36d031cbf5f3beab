"""The five smoke clips: pure tones of five seconds, fixed for ever by the hashes in `sine_clips.json`.

They prove the plumbing. Their captions are what the smoke run teaches.
"""

import hashlib
import json
from pathlib import Path

import numpy as np

from omni_model.audio.clips import Clip, ClipPlan
from omni_model.audio.corpora import write_corpus
from omni_model.audio.waveform import PCM16_SCALE, SAMPLE_RATE_HZ
from omni_model.config import JSON, BadInput, Runtime, SineRecipe
from omni_model.storage import Workspace

MANIFEST = Path(__file__).with_name("sine_clips.json")
AMPLITUDE = 12_000  # of 32 768


def synthesize(recipe: SineRecipe, *, work: Workspace, runtime: Runtime) -> dict[str, JSON]:
    """Make the clips of `sine_clips.json`. Stage function; returns the facts of an AudioCorpus.

    Raises:
        BadInput: this machine's arithmetic gives other samples than the manifest's.
    """
    manifest = json.loads(MANIFEST.read_text())
    hashes = {clip["key"]: clip["sha256_pcm16"] for clip in manifest["clips"]}
    plans = [
        ClipPlan(
            key=clip["key"],
            split="train",
            labels={},
            transcript=clip["caption"],
            parameters={"frequency_hz": clip["frequency_hz"], "duration_s": manifest["duration_s"]},
        )
        for clip in manifest["clips"]
    ]

    def render(plan: ClipPlan) -> Clip:
        pcm = sine_pcm16(**plan.parameters)
        if sha256_pcm16(pcm) != hashes[plan.key]:
            raise BadInput(
                f"{plan.key} differs from {MANIFEST.name}: numpy's sine on this machine rounds differently; "
                "please report the processor and the numpy version."
            )
        return Clip(pcm.astype(np.float32) / PCM16_SCALE)

    return write_corpus(plans, render, generator="sine", clips_per_shard=len(plans), work=work)


def sine_pcm16(frequency_hz: int, duration_s: float) -> np.ndarray:
    """Samples (N,) int16 of a sine.

    The phase is exact integer arithmetic, and an even amplitude keeps sin = 1/2 off a rounding border; so a
    last-bit difference between two maths libraries cannot change a sample.
    """
    phase = np.arange(int(duration_s * SAMPLE_RATE_HZ)) * frequency_hz % SAMPLE_RATE_HZ
    return np.rint(AMPLITUDE * np.sin(2 * np.pi * phase / SAMPLE_RATE_HZ)).astype("<i2")


def sha256_pcm16(pcm: np.ndarray) -> str:
    """Hex sha256 of little-endian 16-bit samples."""
    return hashlib.sha256(pcm.tobytes()).hexdigest()
