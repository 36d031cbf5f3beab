"""What a GPT remembers of a conversation, so that it can go on where it stopped.

A layer with window w never looks further back than w positions, so its keys and values live in a *ring* of
w + 1 slots: position p lies in slot p mod (w + 1), and writing a new key forgets exactly the one that nobody
will ask for again. Keys are stored after rotary, so their order in the ring means nothing to attention. A
layer whose window reaches beyond the capacity has a slot for every position and never forgets.

Rows of a batch may stand at different positions. `prev_embedding` is the neighbour that smear mixes into the
next text token: zeros where there is none (at the start, and after audio), since a zero neighbour adds
nothing. A cache is for inference: it carries no gradients.

Legend: B batch, T new rows of this pass, R slots of a layer's ring, G key/value heads, D head dim, C width.
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from omni_model.model.attention import Kernel, band, sdpa
from omni_model.model.gpt_config import GPTConfig, window_sizes


@dataclass(frozen=True)
class Snapshot:
    """A moment of a cache: where its rows stood, and the rings that will have forgotten it."""

    positions: Tensor
    prev_embedding: Tensor
    rings: dict[int, tuple[Tensor, Tensor]]  # layer -> keys, values


class KVCache:
    """Keys and values of all layers, for `batch` rows of up to `capacity` positions of audio and text."""

    def __init__(
        self,
        *,
        windows: Sequence[int],
        batch: int,
        capacity: int,
        num_kv_heads: int,
        head_dim: int,
        width: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        if batch < 1 or capacity < 1:
            raise ValueError(
                f"A cache needs a batch and a capacity of at least 1, not {batch} and {capacity}."
            )
        shapes = [(batch, min(window + 1, capacity), num_kv_heads, head_dim) for window in windows]
        self.windows = tuple(windows)
        self.capacity = capacity
        self.keys = [torch.zeros(shape, dtype=dtype, device=device) for shape in shapes]
        self.values = [torch.zeros(shape, dtype=dtype, device=device) for shape in shapes]
        self.positions = torch.zeros(batch, dtype=torch.long, device=device)
        self.prev_embedding = torch.zeros(batch, width, dtype=dtype, device=device)  # (B, C)
        self._moments: list[weakref.ref[Snapshot]] = []  # in order; nobody's moment costs nothing

    @property
    def batch(self) -> int:
        return self.positions.size(0)

    @property
    def num_bytes(self) -> int:
        """Bytes of keys and values."""
        return sum(store.nbytes for store in (*self.keys, *self.values))

    def check(self, config: GPTConfig, batch: int) -> None:
        """ValueError unless the cache was made for a model of this shape and for `batch` rows."""
        mine = (self.windows, *self.keys[0].shape[2:], self.prev_embedding.size(1))
        needs = (tuple(window_sizes(config)), config.n_kv_head, config.head_dim, config.n_embd)
        if mine != needs:
            raise ValueError(
                f"cache is of another model: windows, kv heads, head dim, width {mine}, not {needs}."
            )
        if self.batch != batch:
            raise ValueError(f"cache has {self.batch} rows; needs {batch}, one for each row of tokens.")

    def continued(self, num_rows: int, counts: Tensor) -> Continuation:
        """The pass that appends `num_rows` rows, of which the first counts (B,) of each are real.

        ValueError when the real ones do not fit; the cache is unchanged.
        """
        pass_ = Continuation(self, num_rows, counts)
        if pass_.end > self.capacity:
            raise ValueError(f"cache has {self.capacity} positions per row; this pass needs {pass_.end}.")
        return pass_

    def advance(self, counts: Tensor, prev_embedding: Tensor) -> None:
        """Move each row on by its real count (B,)."""
        self.positions = self.positions + counts
        self.prev_embedding = prev_embedding.detach()

    def select(self, rows: Tensor) -> KVCache:
        """A copy that holds the given rows (N,): repeat a row to branch it, leave rows out to drop them."""
        twin = object.__new__(KVCache)
        twin.windows, twin.capacity, twin._moments = self.windows, self.capacity, []
        twin.keys = [keys[rows] for keys in self.keys]
        twin.values = [values[rows] for values in self.values]
        twin.positions = self.positions[rows]
        twin.prev_embedding = self.prev_embedding[rows]
        return twin

    def snapshot(self) -> Snapshot:
        """Remember this moment. Only rings are copied: a layer that never forgets is cut off by position."""
        layers = [layer for layer, keys in enumerate(self.keys) if keys.size(1) < self.capacity]
        rings = {layer: (self.keys[layer].clone(), self.values[layer].clone()) for layer in layers}
        moment = Snapshot(self.positions.clone(), self.prev_embedding.clone(), rings)
        self._moments.append(weakref.ref(moment))
        return moment

    def restore(self, moment: Snapshot) -> None:
        """Go back to a moment of this cache, any number of times; later moments are void from then on.

        ValueError when the moment is not one of this cache's, or is void.
        """
        known = [index for index, mine in enumerate(self._moments) if mine() is moment]
        if not known:
            raise ValueError("moment is not of this cache, or the cache went back to before it.")
        del self._moments[known[0] + 1 :]
        self.positions, self.prev_embedding = moment.positions.clone(), moment.prev_embedding.clone()
        for layer, (keys, values) in moment.rings.items():
            self.keys[layer].copy_(keys)
            self.values[layer].copy_(values)


class Continuation:
    """One forward pass over new rows of a cache: row b's are positions starts[b] .. starts[b] + T - 1.

    Rows beyond a row's real count are padding: computed like the others, seen by no real row, never stored.
    """

    def __init__(self, cache: KVCache, num_rows: int, counts: Tensor) -> None:
        self.cache, self.counts = cache, counts
        starts = cache.positions.tolist()
        self.end = int((cache.positions + counts).max())
        self._start = starts[0] if len(set(starts)) == 1 else None  # where all rows stand together
        self._full = bool((counts == num_rows).all())  # no padding
        first = cache.positions[:1] if self._start is not None else cache.positions
        self.positions = first.unsqueeze(1) + torch.arange(num_rows, device=counts.device)  # (B or 1, T)
        self._visible: dict[int, Tensor] = {}

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, kernel: Kernel) -> Tensor:
        """Attention of the new rows, q (B, T, H, D), k and v (B, T, G, D), over themselves and the past.

        Stores k and v. Returns (B, T, H, D).
        """
        window, keys, values = self.cache.windows[layer], self.cache.keys[layer], self.cache.values[layer]
        slots, start = keys.size(1), self._start
        if start is not None and self._full and q.size(1) == 1:  # a ring holds just what one query may see
            self._store(keys, k)
            self._store(values, v)
            seen = min(start + 1, slots)
            return sdpa(q, keys[:, :seen], values[:, :seen])
        if start == 0:
            y = kernel(q, k, v, window)
        else:
            filled = slots if start is None else min(start, slots)
            past_and_new = (torch.cat(pair, 1) for pair in ((keys[:, :filled], k), (values[:, :filled], v)))
            y = sdpa(q, *past_and_new, self._band(window, slots, filled))
        self._store(keys, k)
        self._store(values, v)
        return y

    def _band(self, window: int, slots: int, filled: int) -> Tensor:
        """Who sees whom among [the first `filled` slots | the new rows]; one mask per window."""
        if window not in self._visible:
            newest = self.positions[:, :1] - 1
            slot = torch.arange(filled, device=newest.device)
            past = newest - (newest - slot) % slots  # the last position that went into each slot; < 0: none
            keys = torch.cat([past, self.positions], dim=1)
            self._visible[window] = band(self.positions, keys, window)
        return self._visible[window]

    def _store(self, ring: Tensor, new: Tensor) -> None:
        """Write the real rows of new (B, T, G, D) that a ring (B, R, G, D) can still hold, the last ones."""
        slots, num_rows = ring.size(1), new.size(1)
        if self._start is not None and self._full:
            kept = min(num_rows, slots)
            place = self.positions[0, num_rows - kept :] % slots
            ring.index_copy_(1, place, new[:, num_rows - kept :].detach())
            return
        row = torch.arange(num_rows, device=new.device)
        count = self.counts.unsqueeze(1)
        batch, row = ((row < count) & (row >= count - slots)).nonzero(as_tuple=True)
        positions = self.positions.expand(ring.size(0), -1)[batch, row]
        ring[batch, positions % slots] = new[batch, row].detach()
