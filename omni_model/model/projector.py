"""From encoder frames to soft tokens: stack neighbours, norm, MLP, and a learned marker at both ends.

The projector knows nothing of sound: frames of any encoder go in, rows of the GPT's width come out.

Legend: B batch, F frames, E encoder width, N = ceil(F / stack) soft tokens, C model width.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

NUM_MARKERS = 2  # one row before each clip, one after


class Projector(nn.Module):
    """Frames (B, F, E) with their counts -> rows (B, N + 2, C) with theirs.

    A clip of f frames becomes start marker, ceil(f / stack) soft tokens, end marker, then zeros; a clip of no
    frames becomes nothing, length 0. The last group of frames is filled with zeros. Padding changes nothing.
    Weights start from seed 0; `init_weights` draws others.
    """

    def __init__(self, input_width: int, width: int, stack: int, hidden: int) -> None:
        super().__init__()
        if min(input_width, width, stack, hidden) < 1:
            raise ValueError("input_width, width, stack and hidden of a projector must all be at least 1.")
        self.stack = stack
        self.norm = nn.RMSNorm(stack * input_width, eps=1e-6)
        self.rise = nn.utils.skip_init(nn.Linear, stack * input_width, hidden)
        self.fall = nn.utils.skip_init(nn.Linear, hidden, width)
        self.start_marker = nn.Parameter(torch.empty(width))
        self.end_marker = nn.Parameter(torch.empty(width))
        self.init_weights()

    @torch.no_grad()
    def init_weights(self, seed: int = 0) -> None:
        """Matrices uniform within +-1/sqrt(inputs), biases 0, markers of unit rms like a normed embedding."""
        generator = torch.Generator(self.start_marker.device).manual_seed(seed)
        nn.init.ones_(self.norm.weight)
        for linear in (self.rise, self.fall):
            bound = linear.in_features**-0.5
            nn.init.uniform_(linear.weight, -bound, bound, generator=generator)
            nn.init.zeros_(linear.bias)
        for marker in (self.start_marker, self.end_marker):
            nn.init.normal_(marker, generator=generator)

    def output_lengths(self, lengths: Tensor) -> Tensor:
        """Rows that clips of `lengths` (B,) frames become: ceil(f / stack) + 2, or 0 for no clip."""
        tokens = (lengths + self.stack - 1) // self.stack
        return torch.where(lengths > 0, tokens + NUM_MARKERS, 0)

    def forward(self, frames: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
        """frames (B, F, E), lengths (B,) real frames -> rows (B, N + 2, C), their real counts (B,)."""
        rows = self.output_lengths(lengths)
        tokens = self.fall(nn.functional.gelu(self.rise(self.norm(self._stacked(frames, lengths)))))
        tokens = nn.functional.pad(tokens, (0, 0, 1, 1))  # a place for either marker: (B, N + 2, C)
        place = torch.arange(tokens.size(1), device=frames.device).unsqueeze(0)
        last = (rows - 1).unsqueeze(1)
        tokens = torch.where((place < last).unsqueeze(-1), tokens, 0.0)
        tokens = torch.where(((place == 0) & (last > 0)).unsqueeze(-1), self.start_marker, tokens)
        return torch.where((place == last).unsqueeze(-1), self.end_marker, tokens), rows

    def _stacked(self, frames: Tensor, lengths: Tensor) -> Tensor:
        """(B, F, E) -> (B, N, stack * E), with zeros beyond each clip's last real frame."""
        batch, num_frames, width = frames.shape
        real = torch.arange(num_frames, device=frames.device) < lengths.unsqueeze(1)
        frames = torch.where(real.unsqueeze(-1), frames, 0.0)
        frames = nn.functional.pad(frames, (0, 0, 0, -num_frames % self.stack))
        return frames.reshape(batch, -1, self.stack * width)
