"""nanochat's own checkpoints: `model_NNNNNN.pt` beside `meta_NNNNNN.json`, read and written.

The files have no version. Names and shapes of the weights tell two eras apart, and the constants that changed
between them under unchanged names come from nanochat's source: since 2026-03-14 (commit a825e63f) there is
smear and backout; from 2026-03-09 (6ed7d1d) there was neither, q and k were scaled by 1.15 and a short window
was a third of the sequence. In the earlier one the missing weights become zeros: a smear or backout of
nothing. What is older, or unknown, is refused by name.
"""

import dataclasses
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from omni_model.artifacts import TokenizerFiles
from omni_model.config import JSON, BadInput, GptImportRecipe, Runtime
from omni_model.model.gpt_config import GPTConfig
from omni_model.model.weights import CONFIG_FILE, WEIGHTS_FILE, load_gpt
from omni_model.storage import Workspace
from omni_model.text.nanochat_tokenizer import unchanged

COMPILED = "_orig_mod."  # what torch.compile puts in front of every name
SHAPE_FIELDS = ("sequence_len", "vocab_size", "n_layer", "n_head", "n_kv_head", "n_embd", "window_pattern")
ERA_CONSTANTS = {
    "rotary_base": 100_000.0,
    "qk_scale": 1.2,
    "softcap": 15.0,
    "short_window_divisor": 4,
    "ve_gate_channels": 12,
    "ve_gate_scale": 3.0,
    "smear_channels": 24,
}
CONSTANTS_BEFORE_SMEAR = ERA_CONSTANTS | {"qk_scale": 1.15, "short_window_divisor": 3}
SMEAR_AND_BACKOUT = {"smear_gate.weight": (1, 24), "smear_lambda": (1,), "backout_lambda": (1,)}
OLDEST = "only checkpoints written since 2026-03-09 (nanochat 6ed7d1d) are read"
STEP = 0  # of an export: nanochat continues its own training from a step, and this is not its own


def import_gpt(
    recipe: GptImportRecipe, tokenizer: TokenizerFiles, *, work: Workspace, runtime: Runtime
) -> dict[str, JSON]:
    """Stage: a GPT that nanochat trained, as `pretrain_gpt` leaves one; its loss curve is not in the files.

    Raises:
        BadInput: a file changed, is damaged, of an unknown era, or the tokenizer is another model's.
    """
    from safetensors.torch import save_file

    model_path, meta_path = unchanged(recipe.model), unchanged(recipe.meta)
    meta = read_meta(meta_path)
    if meta.get("step", recipe.step) != recipe.step:
        raise BadInput(f"{meta_path} is about step {meta['step']!r}, not {recipe.step}; were files renamed?")
    vocab_size = meta["model_config"]["vocab_size"]
    if vocab_size != tokenizer.vocab_size:
        raise BadInput(
            f"{meta_path} says vocab_size {vocab_size} and the tokenizer has {tokenizer.vocab_size}; "
            "give the directory of the model's own tokenizer with --tokenizer"
        )
    config, weights = read_checkpoint(model_path, meta_path)
    save_file(dict(sorted(weights.items())), work.out / WEIGHTS_FILE)
    config_text = json.dumps(dataclasses.asdict(config), sort_keys=True, indent=1)
    (work.out / CONFIG_FILE).write_text(config_text + "\n")
    (work.out / "curve.json").write_text("[]\n")
    val_bpb = meta.get("val_bpb")
    if isinstance(val_bpb, float) and math.isfinite(val_bpb):
        work.metrics.summary(val_bpb=val_bpb)
    shape = {"n_embd": config.n_embd, "vocab_size": config.vocab_size}
    num_parameters = sum(value.numel() for value in weights.values())
    return {"num_parameters": num_parameters, "steps": recipe.step, **shape}


def read_meta(path: Path) -> dict[str, Any]:
    """A meta file whose `model_config` has nanochat's seven fields and no other.

    Raises:
        BadInput: it is not such a file.
    """
    try:
        meta = json.loads(path.read_text(encoding="utf-8"))
    except ValueError:
        raise BadInput(f"{path} is not JSON; it must be a meta file of nanochat's") from None
    config = meta.get("model_config") if isinstance(meta, dict) else None
    if not isinstance(config, dict):
        raise BadInput(f"{path} has no model_config; it must be a meta file of nanochat's")
    unknown, known = sorted(set(config) - set(SHAPE_FIELDS)), ", ".join(SHAPE_FIELDS)
    if unknown:
        raise BadInput(f"{path} has the unknown field model_config.{unknown[0]}; this version knows {known}")
    missing = [name for name in SHAPE_FIELDS if name not in config]
    if missing:
        raise BadInput(f"{path} lacks model_config.{missing[0]}; {OLDEST}")
    return meta


def read_checkpoint(model_path: Path, meta_path: Path) -> tuple[GPTConfig, dict[str, Tensor]]:
    """The config, with the constants of its era, and fp32 weights that `GPT(config)` loads strictly.

    Raises:
        BadInput: the files are damaged, do not belong together, or are of an unknown era.
    """
    fields, weights = read_meta(meta_path)["model_config"], read_weights(model_path)
    _refuse_older(weights, model_path)
    smears = bool(SMEAR_AND_BACKOUT.keys() & weights.keys())
    try:
        config = GPTConfig(**fields, **(ERA_CONSTANTS if smears else CONSTANTS_BEFORE_SMEAR))
    except (TypeError, ValueError, AttributeError) as error:
        raise BadInput(f"{meta_path} does not describe a GPT: {error}") from None
    if not smears:
        weights |= {name: torch.zeros(shape) for name, shape in SMEAR_AND_BACKOUT.items()}
    _require_match(weights, config, model_path)
    return config, weights


def read_weights(path: Path) -> dict[str, Tensor]:
    """Finite fp32 tensors by name, without torch.compile's prefix; bf16 is widened. Nothing else is loaded.

    Raises:
        BadInput: the file is damaged or holds anything but such tensors.
    """
    try:
        found = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except OSError:
        raise
    except Exception as error:  # a malformed archive can raise anything
        reason = str(error).strip().split("\n")[0].split(". ")[0]
        raise BadInput(f"{path} is damaged or holds more than tensors: {reason}") from None
    if not isinstance(found, dict) or not all(isinstance(name, str) for name in found):
        raise BadInput(f"{path} holds no named tensors; it must be a model file of nanochat's")
    weights = {name.removeprefix(COMPILED): value for name, value in found.items()}
    if len(weights) < len(found):
        raise BadInput(f"{path} has tensors both with and without {COMPILED} in front of their names")
    for name, value in weights.items():
        if not isinstance(value, Tensor) or value.dtype not in (torch.float32, torch.bfloat16):
            kind = str(value.dtype) if isinstance(value, Tensor) else type(value).__name__
            raise BadInput(f"{path}: {name} is {kind}, where nanochat has float32 or bfloat16")
        if value.layout != torch.strided or not value.isfinite().all():
            raise BadInput(f"{path}: {name} has values that are not finite numbers")
    return {name: value.float().contiguous() for name, value in weights.items()}


def _refuse_older(weights: Mapping[str, Tensor], path: Path) -> None:
    """Refuse an era whose constants are not known here."""
    if "resid_lambdas" not in weights:
        raise BadInput(f"{path} has no resid_lambdas; {OLDEST}")
    for name, value in weights.items():
        if name.endswith(".ve_gate.weight") and value.shape[-1:] != (ERA_CONSTANTS["ve_gate_channels"],):
            raise BadInput(f"{path}: {name} has the shape {tuple(value.shape)} instead of (.., 12); {OLDEST}")


def _require_match(weights: Mapping[str, Tensor], config: GPTConfig, path: Path) -> None:
    """Refuse weights that are not those of the config, by the name of the first that differs."""
    num_layers = weights["resid_lambdas"].numel()
    if config.n_layer != num_layers:
        raise BadInput(f"{path} has {num_layers} layers and its meta file says n_layer {config.n_layer}")
    expected = weight_shapes(config)
    if missing := sorted(expected.keys() - weights.keys()):
        raise BadInput(f"{path} lacks the tensor {missing[0]}")
    if unknown := sorted(weights.keys() - expected.keys()):
        raise BadInput(f"{path} has the tensor {unknown[0]}, which this version does not know")
    for name, shape in expected.items():
        if weights[name].shape != shape:
            found = tuple(weights[name].shape)
            raise BadInput(f"{path}: {name} has the shape {found} and its meta file asks for {shape}")


def weight_shapes(config: GPTConfig) -> dict[str, tuple[int, ...]]:
    """Name and shape of every tensor in a model file: GPT's state dict, told without its code.

    So that a stage which only moves weights is not made again whenever the computation changes.
    """
    rows, width, kv_width = config.padded_vocab_size, config.n_embd, config.n_kv_head * config.head_dim
    shapes: dict[str, tuple[int, ...]] = {
        "transformer.wte.weight": (rows, width),
        "lm_head.weight": (rows, width),
        "resid_lambdas": (config.n_layer,),
        "x0_lambdas": (config.n_layer,),
        **SMEAR_AND_BACKOUT,
    }
    for layer in range(config.n_layer):
        block = f"transformer.h.{layer}"
        shapes |= {
            f"{block}.attn.c_q.weight": (width, width),
            f"{block}.attn.c_k.weight": (kv_width, width),
            f"{block}.attn.c_v.weight": (kv_width, width),
            f"{block}.attn.c_proj.weight": (width, width),
            f"{block}.mlp.c_fc.weight": (4 * width, width),
            f"{block}.mlp.c_proj.weight": (width, 4 * width),
        }
        if config.has_value_embedding(layer):
            shapes[f"{block}.attn.ve_gate.weight"] = (config.n_kv_head, config.ve_gate_channels)
            shapes[f"value_embeds.{layer}.weight"] = (rows, kv_width)
    return shapes


# --- writing -------------------------------------------------------------------------------------


def write_checkpoint(payload: Path, out: Path) -> Path:
    """Write a GPT's payload as `base_checkpoints/d{n_layer}/` below `out`. Returns that directory.

    `audio_value_embedding` is left out: nanochat hears nothing.

    Raises:
        BadInput: the payload is not a GPT, or has a constant that nanochat cannot be told.
    """
    gpt = load_gpt(payload)
    for name, constant in ERA_CONSTANTS.items():
        if getattr(gpt.config, name) != constant:
            raise BadInput(
                f"{payload} has {name} {getattr(gpt.config, name)}, and nanochat's code has {constant}; "
                "it cannot be exported"
            )
    config = {name: getattr(gpt.config, name) for name in SHAPE_FIELDS}
    meta = {"step": STEP, "val_bpb": None, "max_seq_len": config["sequence_len"], "model_config": config}
    directory = out / "base_checkpoints" / f"d{gpt.config.n_layer}"
    directory.mkdir(parents=True)
    torch.save(dict(gpt.state_dict()), directory / f"model_{STEP:06d}.pt")
    (directory / f"meta_{STEP:06d}.json").write_text(json.dumps(meta, indent=2) + "\n", encoding="utf-8")
    return directory


def write_token_bytes(num_bytes: list[int], path: Path) -> None:
    """Write `token_bytes.pt`: int32 (vocab_size,), how many bytes each token spells, 0 for a special one."""
    torch.save(torch.tensor(num_bytes, dtype=torch.int32), path)
