"""The whole listener: a projector turns encoder frames into soft tokens, which the GPT reads before its text.

Legend: B batch, F encoder frames, E encoder width, T text tokens, V vocabulary.
"""

from __future__ import annotations

from torch import Tensor, nn

from omni_model.model.gpt import GPT
from omni_model.model.projector import Projector


class OmniModel(nn.Module):
    """GPT and projector under one roof; parameters are named gpt.* and projector.*."""

    def __init__(self, gpt: GPT, projector: Projector) -> None:
        super().__init__()
        self.gpt = gpt
        self.projector = projector

    def forward(
        self,
        frames: Tensor | None,
        frame_lengths: Tensor | None,
        ids: Tensor,
        targets: Tensor | None = None,
        logits: str = "all",
        loss_reduction: str = "mean",
        *,
        text_lengths: Tensor | None = None,
    ) -> Tensor:
        """Logits of the text (B, T, V), or its loss when targets are given; see GPT.forward.

        frames (B, F, E) with frame_lengths (B,) real frames of each row; a row of length 0 is text alone, and
        frames None means that all rows are. ValueError when frames come without lengths.
        """
        features, lengths = None, None
        if frames is not None:
            if frame_lengths is None:
                raise ValueError("frames need frame_lengths: how many of each row are real.")
            features, lengths = self.projector(frames, frame_lengths)
        return self.gpt(
            ids,
            targets,
            audio_features=features,
            audio_lengths=lengths,
            text_lengths=text_lengths,
            logits=logits,
            loss_reduction=loss_reduction,
        )
