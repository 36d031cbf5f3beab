"""From encoder frames to soft tokens: mix layers, stack neighbours, norm, MLP, a learned marker at both ends.

The projector knows nothing of sound: frames of any encoder go in, rows of the GPT's width come out. A soft
token sees a few neighbours; what holds for a clip as a whole (who speaks, how fast, in which room) is spread
over all of them. So the marker in front carries a summary: mean and spread of every frame of the clip. Frames
may hold several layers of the encoder side by side; then one learned weight a layer says how much of each is
read, as in weighted sums of speech encoders (SUPERB, arXiv 2105.01051).

Legend: B batch, F frames, E frame width, L layers, N = ceil(F / stack) soft tokens, C model width.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

NUM_MARKERS = 2  # one row before each clip, one after


class Projector(nn.Module):
    """Frames (B, F, E) with their counts -> rows (B, N + 2, C) with theirs; E holds `num_layers` equal parts.

    A clip of f frames becomes start marker, ceil(f / stack) soft tokens, end marker, then zeros; a clip of no
    frames becomes nothing, length 0. The last group of frames is filled with zeros. Padding changes nothing.
    Weights start from seed 0; `init_weights` draws others.
    """

    def __init__(self, input_width: int, width: int, stack: int, hidden: int, num_layers: int = 1) -> None:
        super().__init__()
        if min(input_width, width, stack, hidden, num_layers) < 1:
            raise ValueError("Sizes of a projector must all be at least 1.")
        if input_width % num_layers:
            raise ValueError(f"Frames {input_width} wide cannot hold {num_layers} layers of equal width.")
        self.input_width, self.stack, self.num_layers = input_width, stack, num_layers
        stacked = stack * input_width // num_layers
        self.layer_logits = nn.Parameter(torch.empty(num_layers)) if num_layers > 1 else None
        self.norm = nn.RMSNorm(stacked, eps=1e-6)
        self.rise = nn.utils.skip_init(nn.Linear, stacked, hidden)
        self.fall = nn.utils.skip_init(nn.Linear, hidden, width)
        self.summary_norm = nn.RMSNorm(2 * input_width // num_layers, eps=1e-6)
        self.summary_rise = nn.utils.skip_init(nn.Linear, 2 * input_width // num_layers, hidden)
        self.summary_fall = nn.utils.skip_init(nn.Linear, hidden, width)
        self.start_marker = nn.Parameter(torch.empty(width))
        self.end_marker = nn.Parameter(torch.empty(width))
        self.init_weights()

    @torch.no_grad()
    def init_weights(self, seed: int = 0) -> None:
        """Matrices uniform within +-1/sqrt(inputs), biases 0, markers of unit rms like a normed embedding."""
        generator = torch.Generator(self.start_marker.device).manual_seed(seed)
        for norm in (self.norm, self.summary_norm):
            nn.init.ones_(norm.weight)
        if self.layer_logits is not None:
            nn.init.zeros_(self.layer_logits)
        for linear in (self.rise, self.fall, self.summary_rise, self.summary_fall):
            bound = linear.in_features**-0.5
            nn.init.uniform_(linear.weight, -bound, bound, generator=generator)
            nn.init.zeros_(linear.bias)
        for marker in (self.start_marker, self.end_marker):
            nn.init.normal_(marker, generator=generator)

    @property
    def layer_weights(self) -> Tensor:
        """How much of each layer is read, (L,), in all 1."""
        if self.layer_logits is None:
            return torch.ones(1, device=self.start_marker.device)
        return self.layer_logits.softmax(dim=0)

    def output_lengths(self, lengths: Tensor) -> Tensor:
        """Rows that clips of `lengths` (B,) frames become: ceil(f / stack) + 2, or 0 for no clip."""
        tokens = (lengths + self.stack - 1) // self.stack
        return torch.where(lengths > 0, tokens + NUM_MARKERS, 0)

    def forward(self, frames: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
        """frames (B, F, E), lengths (B,) real frames -> rows (B, N + 2, C), their real counts (B,)."""
        rows = self.output_lengths(lengths)
        frames = frames.to(self.start_marker.dtype)
        if self.layer_logits is not None:
            frames = torch.einsum(
                "bfle,l->bfe", frames.unflatten(2, (self.num_layers, -1)), self.layer_weights
            )
        tokens = self.fall(nn.functional.gelu(self.rise(self.norm(self._stacked(frames, lengths)))))
        tokens = nn.functional.pad(tokens, (0, 0, 1, 1))  # a place for either marker: (B, N + 2, C)
        place = torch.arange(tokens.size(1), device=frames.device).unsqueeze(0)
        last = (rows - 1).unsqueeze(1)
        tokens = torch.where((place < last).unsqueeze(-1), tokens, 0.0)
        start = (self.start_marker + self._summary(frames, lengths)).unsqueeze(1)  # (B, 1, C)
        tokens = torch.where(((place == 0) & (last > 0)).unsqueeze(-1), start, tokens)
        return torch.where((place == last).unsqueeze(-1), self.end_marker, tokens), rows

    def _summary(self, frames: Tensor, lengths: Tensor) -> Tensor:
        """(B, F, E) -> (B, C), from mean and standard deviation over each clip's real frames."""
        real = (torch.arange(frames.size(1), device=frames.device) < lengths.unsqueeze(1)).unsqueeze(-1)
        count = lengths.clamp(min=1).view(-1, 1, 1)
        mean = torch.where(real, frames, 0.0).sum(dim=1, keepdim=True) / count
        variance = torch.where(real, frames - mean, 0.0).square().sum(dim=1, keepdim=True) / count
        whole = torch.cat([mean, (variance + 1e-6).sqrt()], dim=-1).squeeze(1)
        return self.summary_fall(nn.functional.gelu(self.summary_rise(self.summary_norm(whole))))

    def _stacked(self, frames: Tensor, lengths: Tensor) -> Tensor:
        """(B, F, E) -> (B, N, stack * E), with zeros beyond each clip's last real frame."""
        batch, num_frames, width = frames.shape
        real = torch.arange(num_frames, device=frames.device) < lengths.unsqueeze(1)
        frames = torch.where(real.unsqueeze(-1), frames, 0.0)
        frames = nn.functional.pad(frames, (0, 0, 0, -num_frames % self.stack))
        return frames.reshape(batch, -1, self.stack * width)
