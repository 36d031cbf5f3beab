"""Causal attention over a sliding window, and the cache that lets it continue where it stopped.

A layer with window w lets the query at position p see the keys at p-w .. p, which are w+1 keys: the
convention of the flash-attention kernels. `Band` says who sees whom in one forward pass and builds each mask
once, however many layers share it. `attend` is the only place that calls a kernel; plain SDPA is the truth
that every later back end is compared with.

Legend: B batch, T queries, S keys, H query heads, G key/value heads, D head dim, C model width.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


class Band:
    """Who sees whom in one forward pass: row b holds T queries at positions starts[b] .. starts[b] + T - 1.

    Key j of a row sits at position j, so keys and queries of one row share their numbering.
    """

    def __init__(self, starts: list[int], num_queries: int, device: torch.device) -> None:
        self.starts = starts
        self.num_queries = num_queries
        self.device = device
        self.end = max(starts) + num_queries
        self.uniform = len(set(starts)) == 1
        self._masks: dict[int, Tensor | None] = {}

    def keys(self, window: int) -> slice:
        """The stretch of positions that at least one query can see; the others need not be read."""
        return slice(max(0, min(self.starts) - window), self.end)

    def mask(self, window: int) -> Tensor | None:
        """(B or 1, 1, T, S) bool over `keys(window)`, True = visible; None where plain causal is enough."""
        if window not in self._masks:
            self._masks[window] = None if self._is_plain(window) else self._build(window)
        return self._masks[window]

    def positions(self) -> Tensor:
        """Absolute position of every query: (B, T), or (1, T) when all rows start together."""
        starts = self.starts[:1] if self.uniform else self.starts
        first = torch.tensor(starts, device=self.device).unsqueeze(1)
        return first + torch.arange(self.num_queries, device=self.device)

    def _is_plain(self, window: int) -> bool:
        whole = self.starts[0] == 0 and window >= self.num_queries - 1
        return self.uniform and (whole or self.num_queries == 1)

    def _build(self, window: int) -> Tensor:
        keys = self.keys(window)
        key = torch.arange(keys.start, keys.stop, device=self.device)
        query = self.positions().unsqueeze(-1)  # (B, T, 1)
        return ((key <= query) & (key >= query - window)).unsqueeze(1)


def attend(q: Tensor, k: Tensor, v: Tensor, window: int, band: Band | None = None) -> Tensor:
    """Softmax attention, scale 1/sqrt(D), each query seeing itself and `window` positions before it.

    q (B, T, H, D); k, v (B, S, G, D) with G dividing H, key j at position j. Without a band the queries are
    positions 0 .. T-1 of every row (S == T). Returns (B, T, H, D).
    """
    band = band or Band([0] * q.size(0), q.size(1), q.device)
    keys, mask = band.keys(window), band.mask(window)
    y = F.scaled_dot_product_attention(
        q.transpose(1, 2),
        k[:, keys].transpose(1, 2),
        v[:, keys].transpose(1, 2),
        attn_mask=mask,
        is_causal=mask is None and q.size(1) > 1,
        enable_gqa=q.size(2) != k.size(2),
    )
    return y.transpose(1, 2)


class KVCache:
    """What a GPT remembers of each row: keys and values per layer, the position, the last text embedding.

    Rows may stand at different positions. Keys are stored after rotary, norm and scale. `prev_embedding` is
    the neighbour that smear mixes into the next text token: zeros where there is none (at the start, and
    after audio), because a zero neighbour adds nothing. A cache is for inference: it carries no gradients.
    """

    def __init__(
        self,
        *,
        num_layers: int,
        batch: int,
        capacity: int,
        num_kv_heads: int,
        head_dim: int,
        width: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        shape = (batch, capacity, num_kv_heads, head_dim)
        self.capacity = capacity
        self.keys = [torch.zeros(shape, dtype=dtype, device=device) for _ in range(num_layers)]
        self.values = [torch.zeros(shape, dtype=dtype, device=device) for _ in range(num_layers)]
        self.positions = torch.zeros(batch, dtype=torch.long, device=device)
        self.prev_embedding = torch.zeros(batch, width, dtype=dtype, device=device)  # (B, C)

    def band(self, num_queries: int) -> Band:
        """The band of a pass that continues every row by `num_queries`. ValueError when it does not fit."""
        band = Band(self.positions.tolist(), num_queries, self.positions.device)
        if band.end > self.capacity:
            raise ValueError(f"The cache has {self.capacity} positions per row; this pass needs {band.end}.")
        return band

    def write(self, layer: int, k: Tensor, v: Tensor, band: Band) -> tuple[Tensor, Tensor]:
        """Store k, v (B, T, G, D) at the band's positions; returns all of them (B, capacity, G, D)."""
        for store, fresh in ((self.keys[layer], k), (self.values[layer], v)):
            if band.uniform:
                store[:, band.starts[0] : band.end] = fresh.detach()
            else:
                rows = torch.arange(store.size(0), device=store.device).unsqueeze(1)
                store[rows, band.positions()] = fresh.detach()
        return self.keys[layer], self.values[layer]

    def advance(self, counts: Tensor | int, prev_embedding: Tensor) -> None:
        """Move each row on by its real count (B,); what padding wrote beyond it is soon overwritten."""
        self.positions = self.positions + counts
        self.prev_embedding = prev_embedding.detach()

    def select(self, rows: Tensor) -> KVCache:
        """A copy that holds the given rows (N,): repeat a row to branch it, leave rows out to drop them."""
        twin = object.__new__(KVCache)
        twin.capacity = self.capacity
        twin.keys = [keys[rows] for keys in self.keys]
        twin.values = [values[rows] for values in self.values]
        twin.positions = self.positions[rows]
        twin.prev_embedding = self.prev_embedding[rows]
        return twin
