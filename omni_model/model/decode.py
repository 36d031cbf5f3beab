"""One token per row and step: the same function as GPT.forward on a cache, from weights laid out for it.

A step multiplies every weight with one vector per row, so it costs what it costs to read the weights once.
Hence everything here is about reading less and asking less often: the matrices that read the same vector lie
in one (q, k, v and the value gate), in the narrow dtype where there is one; the learned scalars are plain
numbers; on a GPU, where starting a kernel takes longer than its work, the whole step is recorded once as a
CUDA graph.

Legend: B rows, C width, H query heads, G key/value heads, D head dim, R slots of a ring, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from omni_model.model.attention import sdpa
from omni_model.model.gpt import GPT, Attention, Block
from omni_model.model.kv_cache import KVCache
from omni_model.model.layers import rms_norm
from omni_model.model.lora import lora_parameters, merged
from omni_model.model.thin import ThinProduct

WARMUP_STEPS = 3  # before a CUDA graph is recorded: kernels load and libraries allocate on first use


@dataclass(frozen=True)
class _Layer:
    """What one block multiplies with. `joined` maps C to q, k, v (and the gate of each kv head)."""

    joined: ThinProduct
    proj: ThinProduct
    rise: ThinProduct
    fall: ThinProduct
    value_rows: Tensor | None  # (V, G D)
    resid: float
    x0: float


class Decoder:
    """Single-token steps of a GPT, with its weights as they are now (an adapter is merged in).

    weight_dtype narrows the matrices (default: the compute dtype): half the bytes are nearly twice the speed
    where the machine multiplies bf16, at about 1e-2 of difference in the logits.
    """

    @torch.no_grad()
    def __init__(self, gpt: GPT, weight_dtype: torch.dtype | None = None) -> None:
        gpt = merged(gpt) if lora_parameters(gpt) else gpt
        self.config = gpt.config
        self.dtype, self.weight_dtype = gpt.compute_dtype, weight_dtype or gpt.compute_dtype
        self.table = gpt.transformer["wte"].weight.detach()
        self.smear_gate = gpt.smear_gate.weight.detach().to(self.dtype)
        self.smear, self.backout = gpt.smear_lambda.item(), gpt.backout_lambda.item()
        self.head = ThinProduct(gpt.lm_head.weight[: gpt.config.vocab_size].to(self.weight_dtype))
        # Both halves of a head are turned with one pair of rows: y = x [cos cos] + swapped(x) [sin -sin].
        self.cos = torch.cat([gpt.cos, gpt.cos], dim=1)
        self.sin = torch.cat([gpt.sin, -gpt.sin], dim=1)
        self.layers = [self._lay_out(gpt, layer) for layer in range(gpt.config.n_layer)]
        self._recorded: _Recorded | None = None

    def _lay_out(self, gpt: GPT, layer: int) -> _Layer:
        block: Block = gpt.transformer["h"][layer]
        attn: Attention = block.attn
        parts, value_rows = [attn.c_q.weight, attn.c_k.weight, attn.c_v.weight], None
        if attn.ve_gate is not None:
            gate = attn.ve_gate.weight
            parts.append(F.pad(gate, (0, self.config.n_embd - gate.size(1))))  # it reads the first channels
            value_rows = gpt.value_embeds[str(layer)].weight.detach()
        return _Layer(
            joined=ThinProduct(torch.cat(parts).to(self.weight_dtype)),
            proj=ThinProduct(attn.c_proj.weight.to(self.weight_dtype)),
            rise=ThinProduct(block.mlp.c_fc.weight.to(self.weight_dtype)),
            fall=ThinProduct(block.mlp.c_proj.weight.to(self.weight_dtype)),
            value_rows=value_rows,
            resid=gpt.resid_lambdas[layer].item(),
            x0=gpt.x0_lambdas[layer].item(),
        )

    @torch.no_grad()
    def step(self, tokens: Tensor, cache: KVCache) -> Tensor:
        """Append one token (B,) to every row of the cache. Returns fp32 logits (B, V) of what comes next.

        ValueError for a cache of another model, of another batch, or full; then nothing has changed.
        """
        cache.check(self.config, tokens.size(0))
        if cache.positions.is_cuda:
            return self._replay(tokens, cache)
        starts = cache.positions.tolist()
        self._check_room(max(starts) + 1, cache)
        low, high = (int(value) for value in torch.aminmax(tokens))
        if low < 0 or high >= self.config.vocab_size:
            raise ValueError(f"tokens {tuple(tokens.shape)} must lie in 0 .. {self.config.vocab_size - 1}.")
        return self._step(tokens, cache, starts[0] if len(set(starts)) == 1 else None)

    def _check_room(self, needed: int, cache: KVCache) -> None:
        room = min(cache.capacity, self.cos.size(0))
        if needed > room:
            raise ValueError(f"cache has room for {room} positions per row; this step needs {needed}.")

    def _step(self, tokens: Tensor, cache: KVCache, start: int | None) -> Tensor:
        """`start`: where all rows stand, or None when they differ or may not be asked."""
        config, positions = self.config, cache.positions
        embedding = rms_norm(F.embedding(tokens, self.table).to(self.dtype))
        gate = torch.sigmoid(F.linear(embedding[:, : config.smear_channels], self.smear_gate))
        x = torch.addcmul(embedding, gate, cache.prev_embedding, value=self.smear)
        rows = slice(start, start + 1) if start is not None else positions
        turn = self.cos[rows].unsqueeze(1), self.sin[rows].unsqueeze(1)  # (B or 1, 1, D)
        visible: dict[int, Tensor] = {}
        x0 = halfway = x
        for number, layer in enumerate(self.layers):
            x = torch.add(x * layer.resid, x0, alpha=layer.x0)
            q, k, v = self._project(layer, rms_norm(x), tokens, turn)
            keys, values = cache.keys[number], cache.values[number]
            y = _attend(q, k, v, keys, values, positions, start, visible)
            x = x + layer.proj(y.flatten(1))
            hidden = layer.rise(rms_norm(x)).relu_().square_()
            x = x + layer.fall(hidden)
            if number == config.n_layer // 2:
                halfway = x
        cache.advance(torch.ones_like(positions), embedding)
        z = self.head(rms_norm(torch.sub(x, halfway, alpha=self.backout))).float()
        return z.div_(config.softcap).tanh_().mul_(config.softcap)

    def _project(
        self, layer: _Layer, x: Tensor, tokens: Tensor, turn: tuple[Tensor, Tensor]
    ) -> tuple[Tensor, Tensor, Tensor]:
        """q (B, H, D), k and v (B, G, D) of normed rows x (B, C)."""
        config = self.config
        heads, kv_heads, dim = config.n_head, config.n_kv_head, config.head_dim
        joined = layer.joined(x)
        split = (heads + kv_heads) * dim
        qk = joined[:, :split].view(-1, heads + kv_heads, dim)
        v = joined[:, split : split + kv_heads * dim].view(-1, kv_heads, dim)
        if layer.value_rows is not None:
            gate = torch.sigmoid(joined[:, split + kv_heads * dim :]).unsqueeze(-1)
            rows = F.embedding(tokens, layer.value_rows).to(self.dtype).view_as(v)
            v = torch.addcmul(v, gate, rows, value=config.ve_gate_scale)
        first, second = qk.chunk(2, dim=-1)
        qk = rms_norm(torch.addcmul(qk * turn[0], torch.cat([second, first], dim=-1), turn[1]))
        return qk[:, :heads] * config.qk_scale**2, qk[:, heads:], v

    def _replay(self, tokens: Tensor, cache: KVCache) -> Tensor:
        """The step as a CUDA graph, recorded once per cache."""
        if self._recorded is None or self._recorded.cache is not cache:
            self._recorded = _Recorded(self, cache)
        self._recorded.catch_up(self._check_room)
        return self._recorded.replay(tokens)


class _Recorded:
    """A step of one cache as a CUDA graph, whose inputs and outputs keep their addresses."""

    def __init__(self, decoder: Decoder, cache: KVCache) -> None:
        self.cache, self.decoder = cache, decoder
        self.tokens = torch.zeros_like(cache.positions)
        self.positions, self.previous = cache.positions.clone(), cache.prev_embedding.clone()
        before = cache.positions, cache.prev_embedding
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(WARMUP_STEPS):  # the same position each time: the real step writes over it
                self._run()
        torch.cuda.current_stream().wait_stream(side)
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph):
            self.logits, self.next_positions, self.next_previous = self._run()
        cache.positions, cache.prev_embedding = before
        self.end = 0

    def _run(self) -> tuple[Tensor, Tensor, Tensor]:
        cache = self.cache
        cache.positions, cache.prev_embedding = self.positions, self.previous
        logits = self.decoder._step(self.tokens, cache, None)
        return logits, cache.positions, cache.prev_embedding

    def catch_up(self, check_room: Callable[[int, KVCache], None]) -> None:
        """Where the cache stands now. The card is asked only if someone else has moved the cache."""
        if self.cache.positions is not self.next_positions:
            self.end = int(self.cache.positions.max())
        check_room(self.end + 1, self.cache)
        self.positions.copy_(self.cache.positions)
        self.previous.copy_(self.cache.prev_embedding)

    def replay(self, tokens: Tensor) -> Tensor:
        """The step; the cache's position and neighbour are the graph's outputs from now on."""
        self.tokens.copy_(tokens)
        self.graph.replay()
        self.cache.positions, self.cache.prev_embedding = self.next_positions, self.next_previous
        self.end += 1
        return self.logits.clone()


def _attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    keys: Tensor,
    values: Tensor,
    positions: Tensor,
    start: int | None,
    visible: dict[int, Tensor],
) -> Tensor:
    """Store k, v (B, G, D) in their rings (B, R, G, D) and let q (B, H, D) look at what they hold."""
    slots = keys.size(1)
    if start is not None:
        keys[:, start % slots], values[:, start % slots] = k, v
        seen = min(start + 1, slots)
        return sdpa(q.unsqueeze(1), keys[:, :seen], values[:, :seen]).squeeze(1)
    row = torch.arange(q.size(0), device=q.device)
    place = positions % slots
    keys[row, place], values[row, place] = k, v
    if slots not in visible:  # slots fill from 0; once the ring has come round, all of them count
        visible[slots] = (torch.arange(slots, device=q.device) <= positions.unsqueeze(1))[:, None, None]
    return sdpa(q.unsqueeze(1), keys, values, visible[slots]).squeeze(1)
