"""Whisper's encoder, run on each clip at its true length.

Two convolutions turn 100 mel frames a second into 50 encoder frames, learned positions are added, and layers
of attention over the whole clip and an MLP follow. transformers' own forward insists on clips padded to the
full window; padding changes every frame, because the encoder has no mask, so the layers are run here.

Axes: B windows, M mel bins, F mel frames (100 Hz), T encoder frames (50 Hz), E encoder width, H heads.
"""

import functools
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

from omni_model.audio.mel import log_mel
from omni_model.audio.pretrained import load_pretrained
from omni_model.audio.waveform import ENCODER_FRAME_RATE_HZ, FRAMES_PER_ENCODER_FRAME
from omni_model.config import BadInput


class WhisperBackbone:
    """A Whisper encoder that never learns. See `encoder.Backbone` for what its parts mean.

    Source: Radford et al. 2022, "Robust Speech Recognition via Large-Scale Weak Supervision".
    """

    stride = FRAMES_PER_ENCODER_FRAME
    frame_rate_hz = ENCODER_FRAME_RATE_HZ

    def __init__(self, directory: Path, dtype: torch.dtype, device: torch.device) -> None:
        """Raises BadInput where the directory is not a whole Whisper model."""
        from transformers import WhisperModel

        encoder = load_pretrained(WhisperModel, directory, ("encoder.",)).encoder.to(device, dtype)
        if encoder.config.activation_function != "gelu":
            raise BadInput(f"{directory} has the activation {encoder.config.activation_function}, not gelu.")
        self._convolutions: list[nn.Module] = [encoder.conv1, encoder.conv2]
        self._positions_TE: torch.Tensor = encoder.embed_positions.weight
        self._layers = [_Layer.read(layer) for layer in encoder.layers]
        self._last_norm: nn.Module = encoder.layer_norm
        self._num_heads: int = encoder.config.encoder_attention_heads
        self._num_mel_bins: int = encoder.config.num_mel_bins
        self.width: int = encoder.config.d_model
        self.depth: int = len(encoder.layers)
        self.max_frames: int = encoder.config.max_source_positions

    def spectrogram(self, samples: np.ndarray) -> torch.Tensor:
        """Log-mel (F, M), F even."""
        return log_mel(samples, self._num_mel_bins).T

    def hidden(
        self, spectra_BFM: torch.Tensor, lengths_B: torch.Tensor | None, depths: tuple[int, ...]
    ) -> list[torch.Tensor]:
        """Hidden states (B, T, E) after each of `depths` layers; after the last one Whisper's own norm."""
        hidden_BET = spectra_BFM.transpose(1, 2).to(self._positions_TE.dtype)
        for convolve in self._convolutions:
            hidden_BET = F.gelu(convolve(hidden_BET))
        num_frames = hidden_BET.shape[2]
        mask = None
        if lengths_B is not None:
            mask = torch.arange(num_frames, device=lengths_B.device) < lengths_B[:, None, None, None]
        hidden_BTE = self._positions_TE[:num_frames] + hidden_BET.transpose(1, 2)
        found: dict[int, torch.Tensor] = {}
        for number, layer in enumerate(self._layers[: max(depths)], start=1):
            hidden_BTE = layer.run(hidden_BTE, self._num_heads, mask)
            if number in depths:
                found[number] = self._last_norm(hidden_BTE) if number == self.depth else hidden_BTE
        return [found[depth] for depth in depths]


class _Linear:
    """y = x W' + b, where W is used so often that a processor's own layout of it pays.

    oneDNN rearranges a matrix before each product; here once, and GELU or a sum is done on the way out.
    Together a tenth to a fifth of the encoder's time. Elsewhere the plain operations do the same.
    """

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor) -> None:
        self._weight, self._bias = weight, bias
        self._packed = weight.device.type == "cpu" and _can_pack(weight.dtype)
        if self._packed:
            self._weight = torch.ops.mkldnn._reorder_linear_weight(weight)

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        if self._packed:
            return torch.ops.mkldnn._linear_pointwise(x, self._weight, self._bias, "none", [], "")
        return F.linear(x, self._weight, self._bias)

    def gelu(self, x: torch.Tensor) -> torch.Tensor:
        """GELU(y)."""
        if self._packed:
            return torch.ops.mkldnn._linear_pointwise(x, self._weight, self._bias, "gelu", [], "none")
        return F.gelu(self(x))

    def plus(self, x: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
        """other + y."""
        if self._packed:
            return torch.ops.mkldnn._linear_pointwise.binary(x, other, self._weight, self._bias, "add")
        return other + self(x)


@functools.cache
def _can_pack(dtype: torch.dtype) -> bool:
    """Whether this torch and processor have oneDNN's linear layers, those that torch's own compiler uses."""
    weight = torch.linspace(-1, 1, 64 * 32).sin().view(64, 32).to(dtype)
    x, bias = weight[:8, :32].contiguous(), weight[:, 0].contiguous()
    try:
        if dtype == torch.bfloat16 and not torch.ops.mkldnn._is_mkldnn_bf16_supported():
            return False  # it would compute all the same, slowly
        packed = torch.ops.mkldnn._reorder_linear_weight(weight)
        found = torch.ops.mkldnn._linear_pointwise(x, packed, bias, "gelu", [], "none")
    except (AttributeError, RuntimeError):
        return False
    expected = F.gelu(F.linear(x.float(), weight.float(), bias.float()))
    return torch.allclose(found.float(), expected, atol=0.02, rtol=0.02)


@dataclass(frozen=True)
class _Layer:
    """One layer, its three input projections side by side in one matrix."""

    attention_norm: nn.Module
    qkv: _Linear
    out: _Linear
    mlp_norm: nn.Module
    widen: _Linear
    narrow: _Linear

    @classmethod
    def read(cls, layer: Any) -> "_Layer":
        """From transformers' WhisperEncoderLayer."""
        attention = layer.self_attn
        projections = (attention.q_proj, attention.k_proj, attention.v_proj)
        no_bias = torch.zeros_like(attention.q_proj.bias)  # Whisper's keys have none
        biases = [no_bias if each.bias is None else each.bias for each in projections]
        return cls(
            attention_norm=layer.self_attn_layer_norm,
            qkv=_Linear(torch.cat([each.weight for each in projections]), torch.cat(biases)),
            out=_Linear(attention.out_proj.weight, attention.out_proj.bias),
            mlp_norm=layer.final_layer_norm,
            widen=_Linear(layer.fc1.weight, layer.fc1.bias),
            narrow=_Linear(layer.fc2.weight, layer.fc2.bias),
        )

    def run(self, hidden_BTE: torch.Tensor, num_heads: int, mask: torch.Tensor | None) -> torch.Tensor:
        """One layer's pass; `mask` (B, 1, 1, T) is true where a frame may be heard."""
        qkv = self.qkv(self.attention_norm(hidden_BTE)).unflatten(-1, (3, num_heads, -1))
        q_BHTd, k_BHTd, v_BHTd = qkv.permute(2, 0, 3, 1, 4)
        # Scores stay fp32 inside: products of bf16 matrices are faster, and thrice as far off on real speech.
        heard_BHTd = F.scaled_dot_product_attention(q_BHTd, k_BHTd, v_BHTd, attn_mask=mask)
        hidden_BTE = self.out.plus(heard_BHTd.transpose(1, 2).flatten(2), hidden_BTE)
        return self.narrow.plus(self.widen.gelu(self.mlp_norm(hidden_BTE)), hidden_BTE)
