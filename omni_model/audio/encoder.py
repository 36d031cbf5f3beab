"""The frozen ear: a pretrained encoder that turns sound into frames and never learns.

On disk it is an ordinary model directory of Whisper's or w2v-BERT's family, so `openai/whisper-base` and a
tiny random one are loaded by the same lines. Every clip is read at its true length; audio longer than the
encoder's window goes through consecutive windows whose frames are joined. One layer may be read, or several:
early layers know more of the sound, late ones more of the words.

Axes: N samples, T encoder frames, E encoder width, D frame width (k E for k layers side by side), B windows.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch.nn import functional as F

from omni_model.artifacts import EncoderFiles, write_atomically
from omni_model.audio.w2v_bert import W2vBertBackbone
from omni_model.audio.waveform import (
    ENCODER_FRAME_RATE_HZ,
    HOP_SAMPLES,
    SAMPLE_RATE_HZ,
    WINDOW_SAMPLES,
)
from omni_model.audio.whisper import WhisperBackbone
from omni_model.config import JSON, BadInput, EncoderRecipe, Runtime
from omni_model.storage import Workspace

MLP_FACTOR = 4  # every Whisper size has it
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
MIXES = ("concat", "mean")
LAST = "last"
CARD_BATCH_FRAMES = 24_000  # encoder frames that go to a card at once, padding included


class Backbone(Protocol):
    """What a family of encoders is to `Encoder`.

    Attributes:
        width: E.
        depth: how many layers there are.
        stride: rows of the spectrogram per encoder frame.
        max_frames: encoder frames in one window.
    """

    width: int
    depth: int
    stride: int
    frame_rate_hz: int
    max_frames: int

    def spectrogram(self, samples: np.ndarray) -> torch.Tensor:
        """What the network reads of samples (N,): (T stride, C) float32 on the CPU."""

    def hidden(
        self, spectra_BFC: torch.Tensor, lengths_B: torch.Tensor | None, depths: tuple[int, ...]
    ) -> list[torch.Tensor]:
        """Hidden states (B, T, E), one tensor per depth. `lengths_B`: real frames, or None where all are."""


class Encoder:
    """An encoder as the features want it read.

    Attributes:
        width: D, of each frame.
        num_layers: how many layers lie side by side in a frame.
        frame_rate_hz: frames per second.
        max_frames: frames in one window; longer audio goes through several.
    """

    def __init__(
        self,
        backbone: Backbone,
        layers: Sequence[str] = (LAST,),
        mix: str = "concat",
        device: str = "cpu",
        batch_frames: int = 0,
    ) -> None:
        """`batch_frames`: padded frames per batch; 0 runs every window alone.

        Raises:
            BadInput: an unknown layer or mix.
        """
        known = {str(number): number for number in range(1, backbone.depth)} | {LAST: backbone.depth}
        if not layers or not set(layers) <= set(known):
            raise BadInput(
                f"features.layers {', '.join(layers) or 'is empty'}: choose from {', '.join(known)}."
            )
        if mix not in MIXES:
            raise BadInput(f"features.mix {mix!r} is not known; choose from {', '.join(MIXES)}.")
        self._backbone, self._device, self._batch_frames = backbone, torch.device(device), batch_frames
        self._depths, self._mix = tuple(known[layer] for layer in layers), mix
        self.num_layers: int = len(layers) if mix == "concat" else 1
        self.width: int = self.num_layers * backbone.width
        self.frame_rate_hz: int = backbone.frame_rate_hz
        self.max_frames: int = backbone.max_frames

    def encode(self, samples: np.ndarray) -> np.ndarray:
        """Frames (T, D) float32 of samples (N,) at 16 kHz.

        Raises:
            BadInput: shorter than 0.1 s, silent, or not finite.
        """
        return self.encode_batch([samples])[0]

    @torch.no_grad()
    def encode_batch(self, clips: Sequence[np.ndarray]) -> list[np.ndarray]:
        """`encode` for each clip, in order. Batched on a card; on a CPU one by one, which is faster there."""
        cut = [self._windows(samples) for samples in clips]
        frames = self._encode_windows([window for windows in cut for window in windows])
        found, begin = [], 0
        for windows in cut:
            found.append(np.concatenate(frames[begin : begin + len(windows)]))
            begin += len(windows)
        return found

    def _windows(self, samples: np.ndarray) -> Sequence[torch.Tensor]:
        return self._backbone.spectrogram(samples).split(self.max_frames * self._backbone.stride)

    def _encode_windows(self, windows: Sequence[torch.Tensor]) -> list[np.ndarray]:
        """Frames of each window. Windows of like length share a batch; padding is masked."""
        found: list[np.ndarray] = [np.empty(0)] * len(windows)
        for batch in self._buckets([len(window) // self._backbone.stride for window in windows]):
            frames = self._encode_together([windows[place] for place in batch])
            for place, each in zip(batch, frames, strict=True):
                found[place] = each
        return found

    def _buckets(self, lengths: Sequence[int]) -> list[list[int]]:
        """Places of windows, longest first, cut so that no padded batch exceeds the budget."""
        buckets: list[list[int]] = []
        for place in sorted(range(len(lengths)), key=lambda place: -lengths[place]):
            if buckets and lengths[buckets[-1][0]] * (len(buckets[-1]) + 1) <= self._batch_frames:
                buckets[-1].append(place)
            else:
                buckets.append([place])
        return buckets

    def _encode_together(self, windows: Sequence[torch.Tensor]) -> list[np.ndarray]:
        lengths = [len(window) // self._backbone.stride for window in windows]
        spectra_BFC = torch.nn.utils.rnn.pad_sequence(list(windows), batch_first=True)
        lengths_B = torch.tensor(lengths, device=self._device) if min(lengths) < max(lengths) else None
        states = self._backbone.hidden(spectra_BFC.to(self._device), lengths_B, self._depths)
        frames_BTD = self._mixed([state.float() for state in states]).cpu().numpy()
        return [frames_TD[:length] for frames_TD, length in zip(frames_BTD, lengths, strict=True)]

    def _mixed(self, states: list[torch.Tensor]) -> torch.Tensor:
        # The residual stream grows with depth: unnormalised, late layers would drown the early ones.
        normed = [
            state if depth == self._backbone.depth else F.layer_norm(state, (self._backbone.width,))
            for depth, state in zip(self._depths, states, strict=True)
        ]
        return torch.cat(normed, dim=-1) if self._mix == "concat" else torch.stack(normed).mean(0)


def load_encoder(
    files: EncoderFiles,
    layers: tuple[str, ...] = (LAST,),
    mix: str = "concat",
    dtype: str = "float32",
    device: str = "cpu",
) -> Encoder:
    """The encoder of a model directory.

    Args:
        layers: `last`, or numbers of layers to go through; those of a number are normalised without weights.
        mix: several layers side by side (`concat`), or averaged (`mean`).
        dtype: what it computes in, `float32` or `bfloat16`; spectrogram and frames are float32.

    Raises:
        BadInput: the directory is not a whole model of `files.family`, or an argument is unknown.
    """
    if dtype not in DTYPES:
        raise BadInput(f"features.dtype {dtype!r} is not known; choose from {', '.join(DTYPES)}.")
    where = torch.device(device)
    backbone: Backbone
    if files.family == "whisper":
        backbone = WhisperBackbone(files.out, DTYPES[dtype], where)
    elif files.family == "w2v-bert":
        backbone = W2vBertBackbone(files.out, DTYPES[dtype], where, files.max_audio_s)
    else:
        raise BadInput(
            f"{files.uri} is of the unknown family {files.family!r}; whisper and w2v-bert are read."
        )
    return Encoder(backbone, layers, mix, device, 0 if where.type == "cpu" else CARD_BATCH_FRAMES)


# --- making one ----------------------------------------------------------------------------------


def make_encoder(recipe: EncoderRecipe, *, work: Workspace, runtime: Runtime) -> dict[str, JSON]:
    """A Whisper directory of this shape with random weights. Stage function; returns EncoderFiles' facts.

    Raises:
        BadInput: the width does not divide into the heads.
    """
    model = new_whisper(recipe, work.seed)
    write_whisper(model, recipe.num_mel_bins, recipe.max_audio_s, work.out)
    work.metrics.summary(parameters=sum(p.numel() for p in model.encoder.parameters()))
    return whisper_facts(recipe, "random")


def new_whisper(recipe: EncoderRecipe, seed: int) -> Any:
    """A WhisperModel of this shape with random weights, in fp32.

    Raises:
        BadInput: the width does not divide into the heads.
    """
    from transformers import WhisperModel

    if recipe.width % recipe.num_heads:
        raise BadInput(f"the encoder's width {recipe.width} is no multiple of its {recipe.num_heads} heads.")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return WhisperModel(whisper_config(recipe)).eval()


def whisper_facts(recipe: EncoderRecipe, weights: str) -> dict[str, JSON]:
    """The facts of EncoderFiles for an encoder of this shape."""
    return {
        "family": "whisper",
        "weights": weights,
        "width": recipe.width,
        "num_layers": recipe.num_layers,
        "frame_rate_hz": ENCODER_FRAME_RATE_HZ,
        "max_audio_s": float(recipe.max_audio_s),
    }


def whisper_config(recipe: EncoderRecipe) -> Any:
    """The WhisperConfig of a recipe. The decoder is never used and as small as the format allows."""
    from transformers import WhisperConfig

    return WhisperConfig(
        d_model=recipe.width,
        encoder_layers=recipe.num_layers,
        encoder_attention_heads=recipe.num_heads,
        encoder_ffn_dim=MLP_FACTOR * recipe.width,
        num_mel_bins=recipe.num_mel_bins,
        max_source_positions=recipe.max_audio_s * ENCODER_FRAME_RATE_HZ,
        decoder_layers=1,
        decoder_attention_heads=1,
        decoder_ffn_dim=8,
        max_target_positions=8,
        vocab_size=8,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        decoder_start_token_id=1,
        suppress_tokens=None,
        begin_suppress_tokens=None,
    )


def write_whisper(model: Any, num_mel_bins: int, max_audio_s: int, directory: Path) -> None:
    """Write a WhisperModel as transformers reads it: the same bytes for the same weights."""
    from safetensors.torch import save_file

    # Not save_pretrained: it records the version of transformers, which is no property of the weights.
    weights = {name: tensor.detach().float().contiguous() for name, tensor in model.state_dict().items()}
    save_file(weights, directory / "model.safetensors", metadata={"format": "pt"})
    config = {**model.config.to_dict(), "architectures": ["WhisperModel"], "dtype": "float32"}
    config.pop("transformers_version", None)
    config.pop("_name_or_path", None)
    write_atomically(directory / "config.json", json.dumps(config, sort_keys=True, indent=1) + "\n")
    preprocessor = {
        "feature_extractor_type": "WhisperFeatureExtractor",
        "feature_size": num_mel_bins,
        "sampling_rate": SAMPLE_RATE_HZ,
        "hop_length": HOP_SAMPLES,
        "n_fft": WINDOW_SAMPLES,
        "chunk_length": max_audio_s,
        "padding_value": 0.0,
        "padding_side": "right",
        "return_attention_mask": False,
    }
    write_atomically(
        directory / "preprocessor_config.json", json.dumps(preprocessor, sort_keys=True, indent=1) + "\n"
    )
