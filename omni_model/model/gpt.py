"""The GPT: nanochat's architecture, written anew, with room for sound in front of the text.

What is unusual about it, in the order a token meets it: rms-normalised embeddings; *smear* (a learned
share of the previous token's embedding); per layer a learned mix of the stream and the smeared input (resid,
x0); value embeddings (every other layer looks a row up by token id and adds it to v); rotary, then norm, on q
and k; relu^2; *backout* (a share of the mid-layer stream is subtracted before the head); soft-capped logits.

Weights are kept in fp32 and cast to the activations' dtype at each use; that dtype is the rotary table's.
State dict names and shapes equal nanochat's, so its checkpoints load and give the same logits.

Legend: B batch, T text, A audio rows, S = A + T, C width, H heads, G kv heads, D head dim, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from omni_model.model.attention import Kernel
from omni_model.model.banded import banded_attention
from omni_model.model.checks import check_call
from omni_model.model.gpt_config import GPTConfig, window_sizes
from omni_model.model.kv_cache import Continuation, KVCache
from omni_model.model.layers import (
    Embedding,
    Linear,
    relu_squared,
    relu_squared_product,
    rms_norm,
    rotate,
)
from omni_model.model.layout import Layout
from omni_model.model.softcap_loss import (
    LossKernel,
    compiled_kernel,
    mean_loss,
    replace_by_grad,
    softcap_logits,
    token_losses,
)

__all__ = ["GPT", "GPTConfig", "window_sizes"]


@dataclass
class _Pass:
    """What the layers of one forward pass share; cos and sin are (B or 1, S, 1, D/2)."""

    cos: Tensor
    sin: Tensor
    kernel: Kernel
    past: Continuation | None


class Attention(nn.Module):
    """Grouped-query attention with normed q and k, and in some layers gated value embeddings."""

    def __init__(self, config: GPTConfig, layer: int, window: int) -> None:
        super().__init__()
        self.config, self.layer, self.window = config, layer, window
        width, kv_width = config.n_embd, config.n_kv_head * config.head_dim
        self.c_q = Linear(width, width)
        self.c_k = Linear(width, kv_width)
        self.c_v = Linear(width, kv_width)
        self.c_proj = Linear(width, width)
        gated = config.has_value_embedding(layer)
        self.ve_gate = Linear(config.ve_gate_channels, config.n_kv_head) if gated else None

    def forward(self, x: Tensor, value_rows: Tensor | None, run: _Pass) -> Tensor:
        heads = (*x.shape[:2], -1, self.config.head_dim)
        q, k, v = (project(x).view(heads) for project in (self.c_q, self.c_k, self.c_v))
        if self.ve_gate is not None and value_rows is not None:
            gate = torch.sigmoid(self.ve_gate(x[..., : self.config.ve_gate_channels]))  # (B, S, G)
            v = v + (self.config.ve_gate_scale * gate).unsqueeze(-1) * value_rows.view(heads)
        q, k = (rms_norm(rotate(t, run.cos, run.sin)) for t in (q, k))
        q = q * self.config.qk_scale**2  # q and k are scaled alike: one multiplication does for both
        if run.past is None:
            y = run.kernel(q, k, v, self.window)
        else:
            y = run.past.attend(self.layer, q, k, v, run.kernel)
        return self.c_proj(y.flatten(2))


class MLP(nn.Module):
    """Two matrices with relu^2 between them."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.c_fc = Linear(config.n_embd, 4 * config.n_embd)
        self.c_proj = Linear(4 * config.n_embd, config.n_embd)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.c_fc(x)
        if type(self.c_proj) is Linear:  # neither adapted nor in fp8
            return relu_squared_product(hidden, self.c_proj.matrix(x.dtype))
        return self.c_proj(relu_squared(hidden))


class Block(nn.Module):
    """Attention and MLP, each on the normed stream and added to it."""

    def __init__(self, config: GPTConfig, layer: int, window: int) -> None:
        super().__init__()
        self.attn = Attention(config, layer, window)
        self.mlp = MLP(config)

    def forward(self, x: Tensor, value_rows: Tensor | None, run: _Pass) -> Tensor:
        x = x + self.attn(rms_norm(x), value_rows, run)
        return x + self.mlp(rms_norm(x))


class GPT(nn.Module):
    """The language model. Built with seed 42's weights (on the meta device: with none); see init_weights.

    compute_dtype is the dtype of activations and rotary table. The embeddings are stored in it too, except in
    fp16, whose gradients could not be unscaled; every other weight is stored in fp32.
    """

    def __init__(self, config: GPTConfig, compute_dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.config = config
        rows, kv_width = config.padded_vocab_size, config.n_kv_head * config.head_dim
        blocks = [Block(config, layer, window) for layer, window in enumerate(window_sizes(config))]
        self.transformer = nn.ModuleDict({"wte": Embedding(rows, config.n_embd), "h": nn.ModuleList(blocks)})
        self.lm_head = Linear(config.n_embd, rows)
        self.resid_lambdas = nn.Parameter(torch.empty(config.n_layer))
        self.x0_lambdas = nn.Parameter(torch.empty(config.n_layer))
        self.smear_gate = Linear(config.smear_channels, 1)
        self.smear_lambda = nn.Parameter(torch.empty(1))
        self.backout_lambda = nn.Parameter(torch.empty(1))
        gated = [layer for layer in range(config.n_layer) if config.has_value_embedding(layer)]
        self.value_embeds = nn.ModuleDict({str(layer): Embedding(rows, kv_width) for layer in gated})
        if compute_dtype != torch.float16:
            self.transformer["wte"].to(compute_dtype)
            self.value_embeds.to(compute_dtype)
        # What a card may do in another way; backends.equip chooses.
        self.kernel: Kernel = banded_attention
        self.loss_kernel: LossKernel = replace_by_grad
        for name in ("cos", "sin"):
            self.register_buffer(name, torch.empty(0, dtype=compute_dtype), persistent=False)
        if not self.lm_head.weight.is_meta:
            self.init_weights()

    @property
    def compute_dtype(self) -> torch.dtype:
        return self.cos.dtype

    @torch.no_grad()
    def init_weights(self, seed: int = 42) -> None:
        """Draw every weight from `seed`, build the rotary table; nanochat's values in nanochat's order."""
        generator = torch.Generator(self.lm_head.weight.device).manual_seed(seed)

        def draw(weight: Tensor, fill: Callable[..., Tensor], first: float, second: float) -> None:
            values = torch.empty_like(weight, dtype=torch.float32)
            weight.copy_(fill(values, first, second, generator=generator))

        blocks: list[Block] = list(self.transformer["h"])
        spread = (3 / self.config.n_embd) ** 0.5  # a uniform draw within +-spread has std C^-1/2
        draw(self.transformer["wte"].weight, nn.init.normal_, 0.0, 0.8)
        draw(self.lm_head.weight, nn.init.normal_, 0.0, 0.001)
        for block in blocks:
            for matrix in (block.attn.c_q, block.attn.c_k, block.attn.c_v):
                draw(matrix.weight, nn.init.uniform_, -spread, spread)
            draw(block.mlp.c_fc.weight, nn.init.uniform_, -0.4 * spread, 0.4 * spread)
            block.attn.c_proj.weight.zero_()
            block.mlp.c_proj.weight.zero_()
        depth = torch.arange(self.config.n_layer, dtype=torch.float64) / max(self.config.n_layer - 1, 1)
        self.resid_lambdas.copy_(1.15 - 0.10 * depth)
        self.x0_lambdas.copy_(0.20 - 0.15 * depth)
        self.smear_lambda.zero_()
        self.backout_lambda.fill_(0.2)
        draw(self.smear_gate.weight, nn.init.uniform_, 0.0, 0.02)
        for table in self.value_embeds.values():
            draw(table.weight, nn.init.uniform_, -spread, spread)
        for block in blocks:
            if block.attn.ve_gate is not None:
                draw(block.attn.ve_gate.weight, nn.init.uniform_, 0.0, 0.02)
        self._build_rotary()

    def _build_rotary(self) -> None:
        """Rotary angles of 10 * sequence_len positions: made in fp32, stored in the compute dtype."""
        device, head_dim = self.lm_head.weight.device, self.config.head_dim
        channel = torch.arange(0, head_dim, 2, dtype=torch.float32, device=device) / head_dim
        position = torch.arange(10 * self.config.sequence_len, dtype=torch.float32, device=device)
        angle = torch.outer(position, 1.0 / self.config.rotary_base**channel)
        self.cos, self.sin = angle.cos().to(self.compute_dtype), angle.sin().to(self.compute_dtype)

    def compile_blocks(self) -> None:
        """Let torch.compile fuse what lies between the products of blocks and loss, up to rounding.

        Blocks of one kind share their code, so a deep model takes no longer to compile than a flat one.
        """
        for block in self.transformer["h"]:
            block.compile(dynamic=False)
        if self.loss_kernel is replace_by_grad:
            self.loss_kernel = compiled_kernel()

    def num_params(self) -> int:
        """All parameters."""
        return sum(p.numel() for p in self.parameters())

    def num_scaling_params(self) -> int:
        """Parameters that scaling laws count: the blocks' matrices and the head."""
        return sum(p.numel() for p in self.transformer["h"].parameters()) + self.lm_head.weight.numel()

    def flops_per_token(self) -> int:
        """Training FLOPs per token (PaLM, appendix B): 6 per matrix parameter, 12 H D reach per layer."""
        matrices = sum(module.weight.numel() for module in self.modules() if isinstance(module, Linear))
        reach = sum(min(window, self.config.sequence_len) for window in window_sizes(self.config))
        return 6 * matrices + 12 * self.config.n_embd * reach

    def new_cache(self, batch: int, capacity: int) -> KVCache:
        """An empty cache for `batch` rows of up to `capacity` positions (audio and text together)."""
        config = self.config
        return KVCache(
            windows=window_sizes(config),
            batch=batch,
            capacity=capacity,
            num_kv_heads=config.n_kv_head,
            head_dim=config.head_dim,
            width=config.n_embd,
            dtype=self.compute_dtype,
            device=self.cos.device,
        )

    def forward(
        self,
        ids: Tensor,
        targets: Tensor | None = None,
        *,
        audio_features: Tensor | None = None,
        audio_lengths: Tensor | None = None,
        audio_places: Tensor | None = None,
        text_lengths: Tensor | None = None,
        cache: KVCache | None = None,
        logits: str = "all",
        loss_reduction: str = "mean",
    ) -> Tensor:
        """Logits of the text, or its loss when targets are given.

        ids (B, T), targets (B, T) with -1 = not scored. audio_features (B, A, C), already projected, go in
        front of the text, or where audio_places (B, A) says: each row before the token of that number, in
        ascending order. audio_lengths (B,) counts the real rows of each sample (default all A), text_lengths
        (B,) the real tokens (default all T). Padding is on the right and changes no result. With a cache,
        audio and text continue each row where it stands.

        Returns fp32 logits (B, T, V); with logits="last" (B, 1, V), those of each row's last real position (a
        row without text: its last audio row); with targets the mean loss in nats per scored token, or with
        loss_reduction="none" (B * T,) losses, or with logits="scored" (M, V), the logits of the M scored
        tokens. ValueError when shapes disagree or the positions run out.
        """
        config, given = self.config, (audio_lengths, text_lengths, audio_places)
        check_call(config, ids, targets, audio_features, *given, logits, loss_reduction)
        num_audio = 0 if audio_features is None else audio_features.size(1)
        layout = Layout.of(ids, num_audio, *given)
        past = self._continue(cache, layout)
        for module in self.modules():
            if isinstance(module, Linear):
                module.refresh(self.compute_dtype)
        x, prev_embedding = self._embed(ids, audio_features, layout, cache)
        x = self._run_layers(x, ids, layout, past)
        if cache is not None:
            cache.advance(layout.lengths, prev_embedding)
        head = self.lm_head.matrix(x.dtype)
        if config.vocab_size < config.padded_vocab_size:
            head = head[: config.vocab_size]
        if targets is not None and logits == "scored":
            return softcap_logits(layout.text_of(x)[targets >= 0], head, config.softcap)
        if targets is not None:
            scored = (layout.text_of(x).flatten(0, 1), head, targets.flatten(), config.softcap)
            if loss_reduction == "mean":
                return mean_loss(*scored, self.lm_head.product(), self.loss_kernel)
            return token_losses(*scored)
        rows = layout.text_of(x) if logits == "all" else layout.last_of(x)
        return softcap_logits(rows, head, config.softcap)

    def _continue(self, cache: KVCache | None, layout: Layout) -> Continuation | None:
        """This pass as the cache sees it. ValueError when cache or rotary table cannot hold it."""
        past, end = None, layout.num_audio + layout.num_text
        if cache is not None:
            cache.check(self.config, layout.lengths.size(0))
            past = cache.continued(end, layout.lengths)
            end = past.end
        if end > self.cos.size(0):
            raise ValueError(f"ids and audio reach position {end}; the rotary table has {self.cos.size(0)}.")
        return past

    def _embed(
        self, ids: Tensor, audio_features: Tensor | None, layout: Layout, cache: KVCache | None
    ) -> tuple[Tensor, Tensor]:
        """The sequence that enters the layers (B, S, C); the neighbour of each row's next token (B, C)."""
        text = rms_norm(self.transformer["wte"](ids).to(self.compute_dtype))
        before = text.new_zeros(text.size(0), text.size(2)) if cache is None else cache.prev_embedding
        neighbours = layout.neighbours(before, text)  # smear stays within the text
        gate = torch.sigmoid(self.smear_gate(text[..., : self.config.smear_channels]))
        smeared = text + self.smear_lambda.to(text.dtype) * gate * neighbours[:, :-1]
        last = torch.take_along_dim(neighbours, layout.text_lengths.view(-1, 1, 1), dim=1).squeeze(1)
        if audio_features is None:
            return smeared, last
        audio = layout.without_padding(audio_features.to(self.compute_dtype))
        return layout.join(rms_norm(audio), smeared), last

    def _run_layers(self, x: Tensor, ids: Tensor, layout: Layout, past: Continuation | None) -> Tensor:
        """The blocks and the final norm over a sequence (B, S, C)."""
        run = self._new_pass(x, past)
        value_ids = layout.join(ids.new_zeros(ids.size(0), layout.num_audio), ids)  # audio: token 0's rows,
        is_text = layout.is_text() if self.config.audio_value_embedding == "zero" else None  # or none at all
        x0 = halfway = x
        for layer, block in enumerate(self.transformer["h"]):
            value_rows = None
            if str(layer) in self.value_embeds:
                value_rows = self.value_embeds[str(layer)](value_ids).to(x.dtype)
                value_rows = value_rows if is_text is None else value_rows * is_text.unsqueeze(-1)
            x = block(self.resid_lambdas[layer] * x + self.x0_lambdas[layer] * x0, value_rows, run)
            if layer == self.config.n_layer // 2:
                halfway = x
        return rms_norm(x - self.backout_lambda.to(x.dtype) * halfway)

    def _new_pass(self, x: Tensor, past: Continuation | None) -> _Pass:
        """Rotary rows for x (B, S, C), which starts at position 0 or where the cache stands."""
        if past is None:
            cos, sin = self.cos[None, : x.size(1)], self.sin[None, : x.size(1)]
        else:
            positions = past.positions.clamp_max(self.cos.size(0) - 1)  # only padding lies beyond
            cos, sin = self.cos[positions], self.sin[positions]
        return _Pass(cos.unsqueeze(2), sin.unsqueeze(2), self.kernel, past)
