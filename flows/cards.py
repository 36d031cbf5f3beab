"""Cards that runs are planned for, and how fast they train.

A card does its peak of floating-point operations times the share of it that a training reaches (MFU). That
share is measured by every training on a card; until there was one in the store, it is assumed.
"""

import contextlib
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from omni_model import hardware
from omni_model.artifacts import Manifest
from omni_model.config import BadInput, GptShape
from omni_model.config.depth import GptSize
from omni_model.plain import from_plain, nearest

GIB = 2**30
CONTEXT_BYTES = int(0.8 * GIB)  # CUDA and its libraries, beside all tensors


@dataclass(frozen=True)
class Card:
    """What can be known of a card without having it.

    Attributes:
        model: as its driver names it, without the maker.
        gpu_bytes: what torch finds on it.
        assumed_mfu: share of the dense bf16 peak that training reaches, where none was measured.
    """

    name: str
    model: str
    gpu_bytes: int
    assumed_mfu: float

    @property
    def peak_flops(self) -> float | None:
        """Operations a second at most; None for a processor."""
        return hardware.peak_flops(self.model)

    @property
    def usable_bytes(self) -> int:
        """What tensors may take."""
        return max(0, self.gpu_bytes - CONTEXT_BYTES)

    def is_called(self, driver_name: Any) -> bool:
        """Whether a driver's name, as metrics record it, means this very model."""
        return str(driver_name).removeprefix("NVIDIA ").removeprefix("GeForce ") == self.model

    def computed(self, manifest: Manifest) -> bool:
        """Whether it was computed on a machine with such a card; without cards: on this very machine."""
        machine = manifest.versions.get("machine", "")
        if self.peak_flops is None:
            return machine == hardware.machine()
        return any(self.is_called(part) for part in machine.split(", "))


# No card has been measured yet, so these are careful. nanochat's users report 45 % for a 3090 at depth 12
# and, with older code in microbatches of 4 rows, 13 % for a 4090; its own record of 1.65 h for depth 24 on 8
# H100 is 59 % of their bf16 peak, in fp8.
CARDS = {
    card.name: card
    for card in (
        Card("5090", "RTX 5090", int(31.3 * GIB), 0.35),
        Card("4090", "RTX 4090", int(23.6 * GIB), 0.35),
        Card("h100", "H100 80GB HBM3", int(79.1 * GIB), 0.40),
        Card("h200", "H200", int(139.8 * GIB), 0.40),
        Card("cpu", "cpu", 0, 0.0),
    )
}


def find_card(name: str) -> Card:
    """The card of this name.

    Raises:
        BadInput: none is called so.
    """
    if name.lower() not in CARDS:
        known = ", ".join(CARDS)
        raise BadInput(f"--card {name!r} is not known{nearest(name.lower(), CARDS)}; one of {known}")
    return CARDS[name.lower()]


@dataclass(frozen=True)
class Speed:
    """Operations a second in training on one card, and how that is known; None: it is not."""

    flops: float | None
    told: str


def speed(card: Card, earlier: Iterable[Manifest], layers: int) -> Speed:
    """How fast `card` trains: as the earlier training nearest in depth did on such a card, else assumed.

    `earlier` are finished trainings of this store. Of a processor nothing is assumed.
    """
    measured = []
    for manifest in earlier:
        rate = _measured(card, manifest)
        depth = manifest.components.get("recipe", {}).get("gpt", {}).get("n_layer", 0)
        if rate is not None and depth:
            measured.append((abs(depth - layers), depth, rate))
    if measured:
        _, depth, rate = min(measured)
        share = f"MFU {rate / card.peak_flops:.0%}" if card.peak_flops else f"{rate / 1e9:.0f} GFLOP/s"
        return Speed(rate, f"{share}, measured at depth {depth}")
    if card.peak_flops is None:
        return Speed(None, "no earlier training on a processor in this store")
    return Speed(card.peak_flops * card.assumed_mfu, f"MFU {card.assumed_mfu:.0%}, assumed: not measured yet")


def _measured(card: Card, manifest: Manifest) -> float | None:
    figures = manifest.metrics
    if not (card.is_called(figures.get("card")) and card.computed(manifest)):
        return None
    if card.peak_flops is not None:
        return card.peak_flops * figures["mfu"] if "mfu" in figures else None
    if "tokens_per_s" not in figures:
        return None
    with contextlib.suppress(BadInput, TypeError):  # a shape with other fields than ours have now
        shape = from_plain(GptShape, manifest.components["recipe"]["gpt"])
        size = GptSize.of(shape, manifest.facts["vocab_size"])
        return float(figures["tokens_per_s"] * size.flops_per_token)
    return None


@dataclass(frozen=True)
class Machine:
    """What a run is planned for: `gpus` of one card, how fast they train, and rows at once (0: what fits)."""

    card: Card
    speed: Speed
    gpus: int = 1
    microbatch_rows: int = 0
