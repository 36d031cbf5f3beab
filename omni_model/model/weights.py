"""Trained weights on disk: `model.safetensors` beside the `config.json` that says what they are.

Loading is strict. A file that does not match its config names the difference instead of guessing.
"""

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from omni_model.artifacts import AdapterCheckpoint, GptCheckpoint
from omni_model.config import BadInput, GptShape
from omni_model.model.gpt import GPT, GPTConfig
from omni_model.model.lora import load_adapter
from omni_model.model.omni import OmniModel
from omni_model.model.projector import Projector

WEIGHTS_FILE = "model.safetensors"
CONFIG_FILE = "config.json"


def new_gpt(shape: GptShape, vocab_size: int, seed: int, compute_dtype: torch.dtype = torch.float32) -> GPT:
    """A GPT of this shape with weights drawn from `seed`, on the CPU.

    Raises:
        BadInput: the shape contradicts itself.
    """
    try:
        gpt = GPT(GPTConfig(**dataclasses.asdict(shape), vocab_size=vocab_size), compute_dtype)
    except ValueError as error:
        raise BadInput(f"the recipe's gpt shape is not possible: {error}") from None
    gpt.init_weights(seed % 2**63)
    return gpt


def save_gpt(gpt: GPT, directory: Path) -> None:
    """Write the weights and the config of a GPT without an adapter."""
    _save(gpt.state_dict(), dataclasses.asdict(gpt.config), directory)


def load_gpt(directory: Path, compute_dtype: torch.dtype = torch.float32) -> GPT:
    """The GPT in a payload directory, on the CPU, computing in `compute_dtype`.

    Raises:
        BadInput: a file is missing, or the weights do not match the config.
    """
    config = _read_config(directory)
    try:
        gpt = GPT(GPTConfig(**config), compute_dtype)
    except (TypeError, ValueError) as error:
        raise BadInput(f"{directory / CONFIG_FILE} does not describe a GPT: {error}") from None
    _load_into(gpt, directory)
    return gpt


def save_projector(projector: Projector, directory: Path) -> None:
    """Write the weights and the shape of a projector."""
    shape = {
        "hidden": projector.rise.out_features,
        "input_width": projector.input_width,
        "num_layers": projector.num_layers,
        "stack": projector.stack,
        "width": projector.fall.out_features,
    }
    _save(projector.state_dict(), shape, directory)


def load_projector(directory: Path) -> Projector:
    """The projector in a payload directory.

    Raises:
        BadInput: a file is missing, or the weights do not match the config.
    """
    config = _read_config(directory)
    try:
        projector = Projector(**config)
    except (TypeError, ValueError) as error:
        raise BadInput(f"{directory / CONFIG_FILE} does not describe a projector: {error}") from None
    _load_into(projector, directory)
    return projector


def load_listener(gpt: GptCheckpoint, adapter: AdapterCheckpoint) -> OmniModel:
    """GPT with its LoRA adapter, behind the projector that was trained with it; in evaluation mode.

    Raises:
        BadInput: a file is missing, or the adapter was made for another GPT.
    """
    model = load_gpt(gpt.out)
    try:
        load_adapter(model, adapter.out / "adapter")
    except (FileNotFoundError, ValueError) as error:
        raise BadInput(f"the adapter in {adapter.uri} does not fit the GPT in {gpt.uri}: {error}") from None
    return join(model, load_projector(adapter.out / "projector")).eval()


def join(gpt: GPT, projector: Projector) -> OmniModel:
    """A listener of both.

    Raises:
        BadInput: the projector makes rows of another width than the GPT's.
    """
    if projector.fall.out_features != gpt.config.n_embd:
        raise BadInput(
            f"the projector makes rows {projector.fall.out_features} wide and the GPT reads "
            f"{gpt.config.n_embd}; train the projector with this GPT"
        )
    return OmniModel(gpt, projector)


def _save(weights: Mapping[str, Tensor], config: Mapping[str, Any], directory: Path) -> None:
    from safetensors.torch import save_file

    directory.mkdir(parents=True, exist_ok=True)
    tensors = {name: weights[name].detach().cpu().contiguous() for name in sorted(weights)}
    save_file(tensors, directory / WEIGHTS_FILE)
    (directory / CONFIG_FILE).write_text(json.dumps(config, sort_keys=True, indent=1) + "\n")


def _read_config(directory: Path) -> dict[str, Any]:
    path = directory / CONFIG_FILE
    try:
        return dict(json.loads(path.read_text()))
    except (FileNotFoundError, ValueError):
        raise BadInput(f"{path} is missing or not JSON; train these weights again") from None


def _load_into(module: torch.nn.Module, directory: Path) -> None:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    path = directory / WEIGHTS_FILE
    try:
        weights = load_file(path)
        module.load_state_dict(weights, strict=True)
    except (FileNotFoundError, SafetensorError):
        raise BadInput(f"{path} is missing or damaged; train these weights again") from None
    except RuntimeError as error:
        raise BadInput(
            f"{path} does not match {CONFIG_FILE} beside it: {' '.join(str(error).split())}"
        ) from None
