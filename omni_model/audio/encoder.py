"""The frozen ear: a Whisper encoder, run on each clip at its true length.

On disk it is an ordinary Whisper directory, so `openai/whisper-base` and a tiny random one are loaded by the
same lines. transformers insists on clips padded to the full window; padding changes every frame, because the
encoder has no mask, so the layers are called here one by one. Audio longer than the window goes through
consecutive windows whose frames are joined.

Axes: M mel bins, F mel frames (100 Hz), T encoder frames (50 Hz), E encoder width.
"""

import json
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional as F

from omni_model.artifacts import EncoderFiles, write_atomically
from omni_model.audio.waveform import (
    ENCODER_FRAME_RATE_HZ,
    FRAMES_PER_ENCODER_FRAME,
    HOP_SAMPLES,
    SAMPLE_RATE_HZ,
    WINDOW_SAMPLES,
)
from omni_model.config import JSON, BadInput, EncoderRecipe, Runtime
from omni_model.storage import Workspace

MLP_FACTOR = 4  # every Whisper size has it
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def make_encoder(recipe: EncoderRecipe, *, work: Workspace, runtime: Runtime) -> dict[str, JSON]:
    """A Whisper directory of this shape with random weights. Stage function; returns EncoderFiles' facts.

    Raises:
        BadInput: the width does not divide into the heads.
    """
    from transformers import WhisperModel

    if recipe.width % recipe.num_heads:
        raise BadInput(
            f"encoder.width {recipe.width} is no multiple of encoder.num_heads {recipe.num_heads}."
        )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(work.seed)
        model = WhisperModel(whisper_config(recipe)).eval()
    write_whisper(model, recipe.num_mel_bins, recipe.max_audio_s, work.out)
    work.metrics.summary(parameters=sum(p.numel() for p in model.encoder.parameters()))
    return {
        "weights": "random",
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


class FrozenEncoder:
    """A Whisper encoder that never learns.

    Attributes:
        width: E, of each frame.
        num_mel_bins: M, what `log_mel` must be asked for.
        max_frames: encoder frames in one window.
    """

    def __init__(self, encoder: Any, dtype: str = "float32", layer: str = "last") -> None:
        if dtype not in DTYPES:
            raise BadInput(f"features.dtype {dtype!r} is not known; choose from {', '.join(DTYPES)}.")
        layers = {str(count): count for count in range(1, len(encoder.layers))} | {
            "last": len(encoder.layers)
        }
        if layer not in layers:
            raise BadInput(f"features.layer {layer!r} is not one of this encoder's: {', '.join(layers)}.")
        self._encoder: Any = encoder.to(DTYPES[dtype]).eval().requires_grad_(False)
        self._dtype = DTYPES[dtype]
        self._depth = layers[layer]
        self.width: int = encoder.config.d_model
        self.num_mel_bins: int = encoder.config.num_mel_bins
        self.max_frames: int = encoder.config.max_source_positions

    @torch.no_grad()
    def encode(self, mel_MF: torch.Tensor) -> torch.Tensor:
        """Frames (T, E) float32 of a log-mel spectrogram (M, F) with F = 2 T.

        The last layer's frames carry Whisper's own final norm; those of an earlier layer are normalised
        without weights, since the residual stream grows with depth.

        Raises:
            BadInput: another number of mel bins than the encoder's, or no whole frame.
        """
        num_mel_bins, num_mel_frames = mel_MF.shape
        if num_mel_bins != self.num_mel_bins or num_mel_frames < FRAMES_PER_ENCODER_FRAME:
            raise BadInput(
                f"a spectrogram of {num_mel_bins} x {num_mel_frames} was given; "
                f"this encoder wants {self.num_mel_bins} bins and {FRAMES_PER_ENCODER_FRAME} frames or more."
            )
        whole = mel_MF[:, : num_mel_frames // FRAMES_PER_ENCODER_FRAME * FRAMES_PER_ENCODER_FRAME]
        windows = whole.to(self._dtype).split(self.max_frames * FRAMES_PER_ENCODER_FRAME, dim=1)
        return torch.cat([self._encode_window(window) for window in windows]).float()

    def _encode_window(self, mel_MF: torch.Tensor) -> torch.Tensor:
        encoder = self._encoder
        hidden_BET = F.gelu(encoder.conv2(F.gelu(encoder.conv1(mel_MF[None]))))
        hidden_BTE = hidden_BET.permute(0, 2, 1) + encoder.embed_positions.weight[: hidden_BET.shape[2]]
        for layer in encoder.layers[: self._depth]:
            hidden_BTE = layer(hidden_BTE, None)
            if isinstance(hidden_BTE, tuple):  # transformers 4
                hidden_BTE = hidden_BTE[0]
        if self._depth == len(encoder.layers):
            return encoder.layer_norm(hidden_BTE)[0]
        return F.layer_norm(hidden_BTE, (self.width,))[0]


def load_encoder(files: EncoderFiles, dtype: str = "float32", layer: str = "last") -> FrozenEncoder:
    """The encoder of a Whisper directory.

    Args:
        dtype: what it computes in, `float32` or `bfloat16`.
        layer: `last`, or the number of layers to go through.

    Raises:
        BadInput: the directory is not a Whisper model, or dtype or layer is unknown.
    """
    return load_whisper(files.out, dtype, layer)


def load_whisper(directory: Path, dtype: str = "float32", layer: str = "last") -> FrozenEncoder:
    """`load_encoder` for a plain directory."""
    from transformers import WhisperModel
    from transformers.utils import logging

    logging.disable_progress_bar()  # a load takes less time than its bar
    loader: Any = WhisperModel
    try:
        # WhisperEncoder.from_pretrained would leave every weight random: the names start with "encoder.".
        model, report = loader.from_pretrained(
            directory,
            use_safetensors=True,
            local_files_only=True,
            attn_implementation="sdpa",
            dtype=torch.float32,
            output_loading_info=True,
        )
    except (OSError, ValueError) as error:
        raise BadInput(
            f"{directory} is not a Whisper model with config.json and safetensors: {error}"
        ) from None
    missing = sorted(name for name in report["missing_keys"] if name.startswith("encoder."))
    if missing:
        raise BadInput(f"{directory} lacks {len(missing)} weights of the encoder, such as {missing[0]}.")
    return FrozenEncoder(model.encoder, dtype, layer)
