"""Frames of an encoder that never learned: what is heard with the ear's shape and without its skill."""

import dataclasses
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from omni_model.artifacts import EncoderFiles
from omni_model.audio.encoder import load_encoder
from omni_model.audio.features import encode_samples
from omni_model.audio.waveform import decode
from omni_model.config import BadInput

WEIGHTS = "model.safetensors"


def untrained_frames(
    encoder: EncoderFiles, policy: Mapping[str, Any], wavs: Mapping[str, bytes], scratch: Path, seed: int
) -> dict[str, np.ndarray]:
    """Frames (F, E) float32 of WAV files, as features of this policy have them, with weights drawn anew.

    Args:
        encoder: whose architecture is taken.
        policy: of the features that the listener knows (`FeatureReader.policy`).
        scratch: a directory that is written to and removed again.

    Raises:
        BadInput: the features were made by another encoder.
    """
    if policy["encoder"] != encoder.digest:
        raise BadInput(
            f"the features were made by another encoder than {encoder.uri}; give the one that they are of"
        )
    shape = scratch / "out"
    shutil.rmtree(scratch, ignore_errors=True)  # a killed attempt leaves it
    shutil.copytree(encoder.out, shape, ignore=shutil.ignore_patterns("*.safetensors", "*.bin"))
    try:
        _write_untrained(shape, seed)
        files = dataclasses.replace(encoder, uri=str(scratch))
        deaf = load_encoder(files, tuple(policy["layers"]), policy["mix"], policy["dtype"])
    finally:
        shutil.rmtree(scratch)
    return {key: encode_samples(decode(wav, key), deaf).astype(np.float32) for key, wav in wavs.items()}


def _write_untrained(directory: Path, seed: int) -> None:
    """Weights for the config in a model directory, drawn as for a new model."""
    from safetensors.torch import save_file
    from transformers import AutoConfig, AutoModel

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed % 2**63)
        model = AutoModel.from_config(AutoConfig.from_pretrained(directory))
    weights = {name: tensor.detach().float().contiguous() for name, tensor in model.state_dict().items()}
    save_file(weights, directory / WEIGHTS, metadata={"format": "pt"})
