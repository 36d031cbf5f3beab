"""The two sides of `python -m tests.bench gpt`: what our GPT does, and what nanochat does, for the same work.

Both have the same methods and get the same weights. Change `Ours` to change what "ours" means in the tables.

Legend: B rows, T tokens, V vocabulary.
"""

import sys
import types
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from omni_model.model.backends import equip
from omni_model.model.decode import Decoder
from omni_model.model.gpt import GPT, GPTConfig
from omni_model.training.optim import MuonAdamW, parameter_groups

VERDICTS = Path(__file__).resolve().parents[2] / "runs" / "bench" / "attention.json"
LEARNING_RATES = {"unembedding_lr": 0.004, "embedding_lr": 0.2, "matrix_lr": 0.02, "scalar_lr": 0.5}

Update = Callable[[Tensor, Tensor], Tensor]  # ids and targets (B, T) -> loss; the weights have moved
Step = Callable[[list[int]], Tensor]  # the next token of every row -> logits (B, V) after it


@dataclass(frozen=True)
class Shape:
    """The fields of the configuration, by the names that both sides use."""

    sequence_len: int = 2048
    vocab_size: int = 32768
    n_layer: int = 6
    n_head: int = 3
    n_kv_head: int = 3
    n_embd: int = 384
    window_pattern: str = "SSSL"


class Side(Protocol):
    """A model at work. `model` holds the weights, `optimizer` the state once `updates` was called."""

    model: nn.Module
    optimizer: torch.optim.Optimizer

    def updates(self, compiled: bool, optimizer: str) -> Update:
        """How a training stage makes one update, with the optimizer of one of nanochat's commits."""

    def prefill(self, prompt: Tensor) -> Tensor:
        """Read a prompt (1, T) into a new cache; the logits (V,) after its last token."""

    def decoding(self, prompt: Tensor, rows: int, new_tokens: int) -> Callable[[], Step]:
        """Read a prompt (1, T) once; the result goes back to its end, in `rows` rows, and gives the step."""

    def cache(self, context: int) -> object:
        """What is kept of one row of `context` tokens."""


class Ours(Side):
    """Our GPT. `narrow` keeps every weight in the compute dtype, as a model that only answers may."""

    def __init__(self, shape: Shape, dtype: torch.dtype, device: torch.device, narrow: bool) -> None:
        self.model = seeded_gpt(shape, dtype)
        self.model.to(device, dtype if narrow else None)

    def updates(self, compiled: bool, optimizer: str) -> Update:
        newer = optimizer != "a825e63f"  # which had neither addition to Muon, and always multiplied in bf16
        polar = self.model.compute_dtype if newer else torch.bfloat16
        groups = parameter_groups(self.model, **LEARNING_RATES)
        self.optimizer = MuonAdamW(groups, muon_eq=newer, muon_plus=newer, polar_dtype=polar)
        if self.model.cos.is_cuda:
            equip(self.model, VERDICTS)
        if compiled:
            self.model.compile_blocks()
        return _updates(self, self.model)

    def prefill(self, prompt: Tensor) -> Tensor:
        cache = self.model.new_cache(1, prompt.size(1))
        return self.model(prompt, cache=cache, logits="last")[0, -1]

    def decoding(self, prompt: Tensor, rows: int, new_tokens: int) -> Callable[[], Step]:
        read = self.model.new_cache(1, prompt.size(1) + new_tokens)
        self.model(prompt, cache=read, logits="last")
        decoder = Decoder(self.model)

        def rewind() -> Step:
            cache = read.select(torch.zeros(rows, dtype=torch.long, device=prompt.device))

            def step(column: list[int]) -> Tensor:
                return decoder.step(torch.tensor(column, device=prompt.device), cache)

            return step

        return rewind

    def cache(self, context: int) -> object:
        cache = self.model.new_cache(1, context)
        self.model(torch.zeros(1, context, dtype=torch.long, device=self.model.cos.device), cache=cache)
        return cache


class Nanochat(Side):
    """nanochat's GPT as its scripts run it; its source tree must be importable."""

    def __init__(self, shape: Shape, dtype: torch.dtype, device: torch.device) -> None:
        # The engine wants a loader of checkpoints, whose tokenizers need packages of their own.
        loader = types.ModuleType("nanochat.checkpoint_manager")
        loader.load_model = None  # type: ignore[attr-defined]
        sys.modules[loader.__name__] = loader
        from nanochat.gpt import GPT as Model  # type: ignore[import-not-found]
        from nanochat.gpt import GPTConfig as Config

        with torch.device("meta"):
            self.model = Model(Config(**asdict(shape)))
        self.model.to_empty(device=device)
        self.model.init_weights()
        self.model.load_state_dict(seeded_gpt(shape, dtype).state_dict())

    def updates(self, compiled: bool, optimizer: str) -> Update:
        self.optimizer = self.model.setup_optimizer(**LEARNING_RATES)
        return _updates(self, torch.compile(self.model, dynamic=False) if compiled else self.model)

    def prefill(self, prompt: Tensor) -> Tensor:
        return self.model(prompt, kv_cache=self._new_cache(1, prompt.size(1)))[0, -1, :]

    def decoding(self, prompt: Tensor, rows: int, new_tokens: int) -> Callable[[], Step]:
        read = self._new_cache(1, prompt.size(1))
        self.model(prompt, kv_cache=read)

        def rewind() -> Step:
            cache = self._new_cache(rows, prompt.size(1) + new_tokens)
            cache.prefill(read)

            def step(column: list[int]) -> Tensor:
                ids = torch.tensor(column, dtype=torch.long, device=prompt.device).unsqueeze(1)
                return self.model(ids, kv_cache=cache)[:, -1, :]

            return step

        return rewind

    def cache(self, context: int) -> object:
        return self._new_cache(1, context)

    def _new_cache(self, rows: int, capacity: int) -> Any:
        from nanochat.engine import KVCache  # type: ignore[import-not-found]

        config = self.model.config
        return KVCache(
            batch_size=rows,
            num_heads=config.n_kv_head,
            seq_len=capacity,
            head_dim=config.n_embd // config.n_head,
            num_layers=config.n_layer,
            device=self.model.get_device(),
            dtype=self.model.cos.dtype,
        )


@torch.no_grad()
def seeded_gpt(shape: Shape, dtype: torch.dtype) -> GPT:
    """Our GPT with seed 42's weights, of which none is zero and the logits are not tiny: all parts count."""
    gpt = GPT(GPTConfig(**asdict(shape)), dtype)
    generator = torch.Generator().manual_seed(0)
    for weight in gpt.parameters():
        if not weight.any():
            weight.normal_(std=0.02, generator=generator)
    gpt.lm_head.weight.mul_(50)
    return gpt


def _updates(side: Side, network: Callable[..., Tensor]) -> Update:
    """Forward, backward, optimizer: the order of both."""

    def update(ids: Tensor, targets: Tensor) -> Tensor:
        loss = network(ids, targets)
        loss.backward()
        side.optimizer.step()
        side.model.zero_grad(set_to_none=True)
        return loss.detach()

    return update
