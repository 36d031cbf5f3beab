"""w2v-BERT 2.0: a Conformer taught without text, so it keeps more of how things are said.

It reads 80 Kaldi filter-bank values every 10 ms, two such frames side by side, each bin scaled to mean 0 and
variance 1 over the clip.

Axes: B windows, T encoder frames (50 Hz), C = 160 values of a pair of filter-bank frames, E encoder width.
"""

from pathlib import Path
from typing import Any

import numpy as np
import torch

from omni_model.audio.pretrained import load_pretrained
from omni_model.audio.waveform import ENCODER_FRAME_RATE_HZ, SAMPLE_RATE_HZ, checked
from omni_model.config import BadInput


class W2vBertBackbone:
    """A w2v-BERT encoder that never learns. See `encoder.Backbone` for what its parts mean."""

    stride = 1
    frame_rate_hz = ENCODER_FRAME_RATE_HZ

    def __init__(self, directory: Path, dtype: torch.dtype, device: torch.device, max_audio_s: float) -> None:
        """Raises BadInput where the directory is not a whole w2v-BERT model, or holds one with an adapter."""
        from transformers import SeamlessM4TFeatureExtractor, Wav2Vec2BertModel

        model = load_pretrained(Wav2Vec2BertModel, directory, ("feature_projection.", "encoder."))
        if model.adapter is not None or model.intermediate_ffn is not None:
            raise BadInput(f"{directory} holds a w2v-BERT with an adapter; give one without.")
        self._model: Any = model.to(device, dtype)
        self._features: Any = SeamlessM4TFeatureExtractor()
        self.width: int = model.config.hidden_size
        self.depth: int = model.config.num_hidden_layers
        self.max_frames = round(max_audio_s * self.frame_rate_hz)

    def spectrogram(self, samples: np.ndarray) -> torch.Tensor:
        """Pairs of filter-bank frames (T, C); a last frame without a partner is dropped."""
        read = self._features(checked(samples), sampling_rate=SAMPLE_RATE_HZ, return_tensors="np")
        return torch.from_numpy(read["input_features"][0][read["attention_mask"][0] == 1]).float()

    def hidden(
        self, spectra_BTC: torch.Tensor, lengths_B: torch.Tensor | None, depths: tuple[int, ...]
    ) -> list[torch.Tensor]:
        """Hidden states (B, T, E) after each of `depths` layers; each ends in a norm of its own."""
        mask = None
        if lengths_B is not None:
            mask = torch.arange(spectra_BTC.shape[1], device=lengths_B.device) < lengths_B[:, None]
        read = self._model(spectra_BTC.to(self._model.dtype), attention_mask=mask, output_hidden_states=True)
        return [read.hidden_states[depth] for depth in depths]
