"""What a forward pass refuses, before anything has changed: one sentence with argument and both shapes."""

from __future__ import annotations

import torch
from torch import Tensor

from omni_model.model.gpt_config import GPTConfig

INTEGERS = (torch.int32, torch.int64)


def check_call(
    config: GPTConfig,
    ids: Tensor,
    targets: Tensor | None,
    audio_features: Tensor | None,
    audio_lengths: Tensor | None,
    text_lengths: Tensor | None,
    audio_places: Tensor | None,
    logits: str,
    loss_reduction: str,
) -> None:
    """ValueError on the first argument of GPT.forward that does not fit the model or the others.

    Values are looked at where that is free or worth it: not on a GPU while gradients are on, where every look
    makes the processor wait for the card.
    """
    audio = None if audio_features is None else tuple(audio_features.shape)
    if ids.dim() != 2 or ids.dtype not in INTEGERS:
        raise ValueError(f"ids {tuple(ids.shape)} {ids.dtype} must be integers of shape (batch, tokens).")
    batch, num_text = ids.shape
    num_audio = 0 if audio is None else audio[1] if len(audio) == 3 else -1
    if batch == 0 or num_text + num_audio == 0:
        raise ValueError(f"ids {tuple(ids.shape)} must have a row, with tokens or audio to read.")
    if targets is not None and targets.shape != ids.shape:
        raise ValueError(f"targets {tuple(targets.shape)} must have the shape of ids, {tuple(ids.shape)}.")
    if audio is not None and (len(audio) != 3 or audio[0] != batch or audio[2] != config.n_embd):
        raise ValueError(f"audio_features must be ({batch}, rows, {config.n_embd}), not {audio}.")
    if audio_lengths is not None and audio is None:
        raise ValueError("audio_lengths were given without audio_features.")
    if audio_places is not None and tuple(audio_places.shape) != (batch, num_audio):
        places = tuple(audio_places.shape)
        raise ValueError(f"audio_places {places} must be ({batch}, {num_audio}), one for each audio row.")
    for name, lengths in (("audio_lengths", audio_lengths), ("text_lengths", text_lengths)):
        if lengths is not None and tuple(lengths.shape) != (batch,):
            raise ValueError(f"{name} {tuple(lengths.shape)} must be ({batch},), one count for each row.")
    if logits not in ("all", "last", "scored") or (logits == "scored" and targets is None):
        raise ValueError(f"logits must be 'all' or 'last', or with targets 'scored', not {logits!r}.")
    if loss_reduction not in ("mean", "none"):
        raise ValueError(f"loss_reduction must be 'mean' or 'none', not {loss_reduction!r}.")
    if ids.device.type == "cpu" or not torch.is_grad_enabled():
        _check_range("ids", ids, 0, config.vocab_size - 1)
        _check_range("targets", targets, -1, config.vocab_size - 1)
        _check_range("audio_lengths", audio_lengths, 0, num_audio)
        _check_range("text_lengths", text_lengths, 0, num_text)
        if audio_features is not None:
            _check_finite(audio_features, audio_lengths)
        if audio_places is not None:
            _check_places(audio_places, audio_lengths, text_lengths, num_text)


def _check_range(name: str, values: Tensor | None, least: int, most: int) -> None:
    if values is None or values.numel() == 0:
        return
    low, high = (int(value) for value in torch.aminmax(values))
    if low < least or high > most:
        wrong = low if low < least else high
        raise ValueError(f"{name} {tuple(values.shape)} holds {wrong}; it must lie in {least} .. {most}.")


def _check_finite(features: Tensor, lengths: Tensor | None) -> None:
    """Padding may hold anything; a real row may not hold nan or infinity."""
    broken = ~torch.isfinite(features).all(dim=-1)  # (B, A)
    if lengths is not None:
        place = torch.arange(features.size(1), device=features.device)
        broken &= place < lengths.to(features.device).unsqueeze(1)
    if broken.any():
        sample, row = (int(index) for index in broken.nonzero()[0])
        raise ValueError(
            f"audio_features {tuple(features.shape)} are not finite at sample {sample}, row {row}; "
            "every real row must be."
        )


def _check_places(
    places: Tensor, audio_lengths: Tensor | None, text_lengths: Tensor | None, num_text: int
) -> None:
    """Of real audio rows: in ascending order, and none behind the row's last real token."""
    batch, num_audio = places.shape
    ends = torch.full((batch,), num_text) if text_lengths is None else text_lengths.cpu()
    counts = torch.full((batch,), num_audio) if audio_lengths is None else audio_lengths.cpu()
    real = torch.arange(num_audio) < counts.unsqueeze(1)
    places = torch.where(real, places.cpu(), ends.unsqueeze(1))
    steps = torch.diff(places, dim=1, prepend=torch.zeros_like(places[:, :1]))
    if bool((steps < 0).any()) or bool((places > ends.unsqueeze(1)).any()):
        raise ValueError(
            f"audio_places {tuple(places.shape)} must ascend in each row from 0 to its number of real tokens."
        )
