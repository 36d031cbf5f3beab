"""The shape of a GPT, and the constants that nanochat changed over time under unchanged names.

Stating the constants in the configuration lets a checkpoint of any era say what it means.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class GPTConfig:
    """Shape of the network (the first seven fields are nanochat's own) and the constants of its era.

    The defaults of the era constants are those of nanochat since 2026-03-14. `audio_value_embedding`: what
    audio rows add to v in layers with value embeddings: nothing ("zero") or the row of token 0 ("token0").
    ValueError names every field that makes no sense.
    """

    sequence_len: int = 2048
    vocab_size: int = 32768
    n_layer: int = 12
    n_head: int = 6
    n_kv_head: int = 6
    n_embd: int = 768
    window_pattern: str = "SSSL"
    rotary_base: float = 100_000.0
    qk_scale: float = 1.2
    softcap: float = 15.0
    short_window_divisor: int = 4
    ve_gate_channels: int = 12
    ve_gate_scale: float = 3.0
    smear_channels: int = 24
    audio_value_embedding: str = "zero"

    def __post_init__(self) -> None:
        problems = self._bad_sizes() or self._contradictions()
        if problems:
            raise ValueError(" ".join(problems))

    def _bad_sizes(self) -> list[str]:
        sizes = ("sequence_len", "vocab_size", "n_layer", "n_head", "n_kv_head", "n_embd")
        values = {name: getattr(self, name) for name in (*sizes, "short_window_divisor")}
        return [
            f"{name} must be a positive integer, not {value!r}."
            for name, value in values.items()
            if not isinstance(value, int) or value < 1
        ]

    def _contradictions(self) -> list[str]:
        width, heads, kv_heads, pattern = self.n_embd, self.n_head, self.n_kv_head, self.window_pattern
        channels, policy = max(self.ve_gate_channels, self.smear_channels), self.audio_value_embedding
        checks = (
            (width % heads, f"n_embd {width} must be a multiple of n_head {heads}."),
            (heads % kv_heads, f"n_head {heads} must be a multiple of n_kv_head {kv_heads}."),
            (width // heads % 2, f"n_embd / n_head = {width // heads} must be even: rotary turns pairs."),
            (not pattern or set(pattern.upper()) - set("SL"), f"window_pattern {pattern!r} must be S and L."),
            (width < channels, f"n_embd {width} must be at least {channels}: the gates read that many."),
            (not 0 < self.softcap <= 50, f"softcap {self.softcap} must lie between 0 and 50."),
            (policy not in ("zero", "token0"), f"audio_value_embedding {policy!r} is not zero or token0."),
        )
        return [sentence for wrong, sentence in checks if wrong]

    @property
    def head_dim(self) -> int:
        return self.n_embd // self.n_head

    @property
    def padded_vocab_size(self) -> int:
        """Rows of the embeddings and of the head: whole blocks of 64, which matrix units like."""
        return -(-self.vocab_size // 64) * 64

    def has_value_embedding(self, layer: int) -> bool:
        """Every other layer, the last one always."""
        return layer % 2 == (self.n_layer - 1) % 2


def window_sizes(config: GPTConfig) -> list[int]:
    """Positions each layer sees behind the current one; the last layer is always L.

    L is sequence_len, S that over short_window_divisor, rounded up to blocks of 128.
    """
    short = -(-config.sequence_len // config.short_window_divisor // 128) * 128
    pattern = config.window_pattern.upper()
    letters = [pattern[layer % len(pattern)] for layer in range(config.n_layer - 1)] + ["L"]
    return [short if letter == "S" else config.sequence_len for letter in letters]
