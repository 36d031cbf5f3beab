"""LoRA on the GPT's matrices (arXiv 2106.09685): W x becomes W x + (alpha / rank) B A x; only A, B train.

peft does the wrapping, in place: the GPT keeps its class and its forward. B starts at zero, so a fresh
adapter changes nothing. The saved adapter is an ordinary peft adapter, except that its bytes depend on its
values alone: peft itself writes Python sets in hash order and records where the base model lay.

Value gates and the head are left alone.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from omni_model.model.gpt import GPT

TARGETS = ("c_fc", "c_k", "c_proj", "c_q", "c_v")
ADAPTER = "default"  # peft's name for the only adapter
WEIGHTS_FILE = "adapter_model.safetensors"
CONFIG_FILE = "adapter_config.json"
FILE_PREFIX = "base_model.model."  # how peft's own wrapper would name the GPT


def add_lora(gpt: GPT, rank: int, alpha: float, seed: int) -> GPT:
    """Wrap the target matrices of `gpt` in place and freeze everything but the adapter; returns `gpt`.

    A is drawn from `seed` (uniform within +-1/sqrt(inputs), peft's default), B is zero. ValueError for a rank
    below 1 or a GPT that has an adapter already.
    """
    if rank < 1:
        raise ValueError(f"The rank of a LoRA adapter is at least 1, not {rank}.")
    if lora_parameters(gpt):
        raise ValueError("This GPT has a LoRA adapter already: merge it before adding another.")
    from peft import LoraConfig, inject_adapter_in_model

    config = LoraConfig(r=rank, lora_alpha=alpha, target_modules=list(TARGETS), lora_dropout=0.0, bias="none")
    with torch.random.fork_rng(devices=[]):  # peft draws from the global generator; leave that as it was
        inject_adapter_in_model(config, gpt, adapter_name=ADAPTER)
    gpt.requires_grad_(False)
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in sorted(lora_parameters(gpt).items()):
        parameter.requires_grad_(True)
        if "lora_A" in name:
            bound = parameter.size(1) ** -0.5
            values = torch.empty(parameter.shape).uniform_(-bound, bound, generator=generator)
            parameter.data.copy_(values)
    return gpt


def lora_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """The adapter's parameters by their names in `model`; empty when there is none."""
    return {name: p for name, p in model.named_parameters() if "lora_A." in name or "lora_B." in name}


def save_adapter(model: nn.Module, directory: Path) -> None:
    """Write adapter_model.safetensors and adapter_config.json; the same adapter gives the same bytes.

    ValueError when the model has no adapter.
    """
    from safetensors.torch import save_file

    parameters = lora_parameters(model)
    if not parameters:
        raise ValueError("There is no LoRA adapter to save in this model.")
    tensors = {_file_name(name): p.detach().cpu().contiguous() for name, p in sorted(parameters.items())}
    directory.mkdir(parents=True, exist_ok=True)
    save_file(tensors, directory / WEIGHTS_FILE, metadata={"format": "pt"})
    text = json.dumps(_plain_config(model), sort_keys=True, indent=2)
    (directory / CONFIG_FILE).write_text(text + "\n", encoding="utf-8")


def load_adapter(gpt: GPT, directory: Path) -> GPT:
    """Wrap `gpt` as the saved adapter says and copy its values in; returns `gpt`.

    ValueError when the adapter was made for other matrices or shapes.
    """
    from safetensors.torch import load_file

    config = json.loads((directory / CONFIG_FILE).read_text(encoding="utf-8"))
    saved = load_file(directory / WEIGHTS_FILE)
    if sorted(config["target_modules"]) != sorted(TARGETS):
        raise ValueError(f"The adapter wraps {config['target_modules']}; this GPT expects {list(TARGETS)}.")
    wrapped = add_lora(gpt, config["r"], config["lora_alpha"], seed=0)
    parameters = {_file_name(name): p for name, p in lora_parameters(wrapped).items()}
    shapes = {name: tuple(p.shape) for name, p in parameters.items()}
    if shapes != {name: tuple(value.shape) for name, value in saved.items()}:
        raise ValueError(f"The adapter in {directory.name} was made for a GPT of another shape.")
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(saved[name])
    return wrapped


@torch.no_grad()
def merged(model: GPT) -> GPT:
    """A new plain GPT whose matrices hold base + adapter; `model` stays as it is."""
    weights = {name: value for name, value in model.state_dict().items() if "lora_" not in name}
    for name, module in model.named_modules():
        if hasattr(module, "lora_A"):
            weights[f"{name}.base_layer.weight"] = _merged_weight(module)
    with torch.device(model.cos.device):
        plain = GPT(model.config, model.compute_dtype)
    plain.load_state_dict({name.replace(".base_layer.", "."): value for name, value in weights.items()})
    return plain


def _merged_weight(layer: Any) -> Tensor:
    delta = layer.lora_B[ADAPTER].weight.float() @ layer.lora_A[ADAPTER].weight.float()
    base = layer.base_layer.weight
    return (base.float() + layer.scaling[ADAPTER] * delta).to(base.dtype)


def _file_name(name: str) -> str:
    """peft's file leaves the adapter's name out of the parameters'."""
    return FILE_PREFIX + name.replace(f".{ADAPTER}.", ".")


def _plain_config(model: Any) -> dict[str, Any]:
    """peft's configuration of the adapter as sorted JSON values, without a trace of where it was made."""
    config = model.peft_config[ADAPTER].to_dict()
    config |= {"base_model_name_or_path": None, "inference_mode": True, "auto_mapping": None}
    return {key: _plain(value) for key, value in config.items() if key != "peft_version"}


def _plain(value: Any) -> Any:
    if isinstance(value, set | frozenset):
        return sorted(value)
    if isinstance(value, dict):
        return {str(key): _plain(entry) for key, entry in value.items()}
    return getattr(value, "value", value)  # peft's enumerations
