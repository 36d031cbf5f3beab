"""Checkpoints: three files, written so that a crash at any moment leaves a complete one.

A checkpoint is a directory with model.safetensors, optimizer.safetensors and state.json. It is built beside
its place, forced to disk and renamed into it; rename is atomic, so the name exists if and only if the content
is whole. The same values give the same bytes: sorted names, no metadata, no clock. Nothing is ever pickled.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

MODEL_FILE = "model.safetensors"
OPTIMIZER_FILE = "optimizer.safetensors"
STATE_FILE = "state.json"


@dataclass(frozen=True)
class Saved:
    """What a checkpoint holds; tensors on the CPU, state as JSON gave it back."""

    model: dict[str, Tensor]
    optimizer: dict[str, Tensor]
    state: dict[str, Any]


def save(
    directory: Path,
    model_state: Mapping[str, Tensor],
    optimizer_state: Mapping[str, Tensor],
    state: Mapping[str, Any],
) -> None:
    """Write a checkpoint at `directory`, atomically. One that is there is replaced once the new one is whole.

    ValueError when the state is not plain JSON (nan and infinity are not).
    """
    building, replaced = _sibling(directory, "building"), _sibling(directory, "replaced")
    for leftover in (building, replaced):
        shutil.rmtree(leftover, ignore_errors=True)
    building.mkdir(parents=True)
    _write_tensors(building / MODEL_FILE, model_state)
    _write_tensors(building / OPTIMIZER_FILE, optimizer_state)
    _write_bytes(building / STATE_FILE, _json_bytes(state))
    _sync(building)
    if directory.exists():
        directory.rename(replaced)
    building.rename(directory)
    _sync(directory.parent)
    shutil.rmtree(replaced, ignore_errors=True)


def load(directory: Path) -> Saved:
    """Read a checkpoint. FileNotFoundError when one of its files is missing."""
    from safetensors.torch import load_file

    state = json.loads((directory / STATE_FILE).read_bytes())
    return Saved(load_file(directory / MODEL_FILE), load_file(directory / OPTIMIZER_FILE), state)


def copy_into(tensors: Mapping[str, Tensor], saved: Mapping[str, Tensor]) -> None:
    """Copy saved values into the storage of existing tensors, so their memory alignment stays what it was.

    Alignment matters: matrix kernels pick another order of summation for it, which changes the last bits.
    ValueError when names or shapes differ.
    """
    missing, unknown = sorted(tensors.keys() - saved.keys()), sorted(saved.keys() - tensors.keys())
    if missing or unknown:
        raise ValueError(f"The checkpoint does not fit: it lacks {missing[:5]}, has unknown {unknown[:5]}.")
    with torch.no_grad():
        for name, tensor in tensors.items():
            if tensor.shape != saved[name].shape:
                shapes = f"{tuple(saved[name].shape)}, wanted {tuple(tensor.shape)}"
                raise ValueError(f"The checkpoint does not fit: {name} has shape {shapes}.")
            tensor.copy_(saved[name])


def step_directory(partial: Path, step: int) -> Path:
    """The checkpoint after `step` updates."""
    return partial / f"step-{step:08d}"


def latest(partial: Path) -> Path | None:
    """The checkpoint with most updates in `partial`, or None. Unfinished ones do not count."""
    if not partial.is_dir():
        return None
    whole = [path for path in partial.iterdir() if re.fullmatch(r"step-\d+", path.name)]
    return max(whole, default=None)


def keep_only(directory: Path) -> None:
    """Remove the other checkpoints, whole or unfinished, beside this one."""
    for path in directory.parent.iterdir():
        if path != directory and re.fullmatch(r"\.?step-\d+(\.\w+)?", path.name):
            shutil.rmtree(path)


def flatten_optimizer(optimizer: torch.optim.Optimizer) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """An optimizer's tensors, named "{parameter index}.{entry}", and its scalars named likewise."""
    entries = {
        f"{index}.{name}": value
        for index, state in optimizer.state_dict()["state"].items()
        for name, value in state.items()
    }
    tensors = {name: value for name, value in entries.items() if isinstance(value, Tensor)}
    return tensors, {name: value for name, value in entries.items() if name not in tensors}


def restore_optimizer(
    optimizer: torch.optim.Optimizer, tensors: Mapping[str, Tensor], scalars: Mapping[str, Any]
) -> None:
    """Take back what `flatten_optimizer` gave. Groups keep their settings: the schedule sets them anew."""
    state: dict[int, dict[str, Any]] = {}
    for name, value in {**tensors, **scalars}.items():
        index, entry = name.split(".", 1)
        state.setdefault(int(index), {})[entry] = value.clone() if isinstance(value, Tensor) else value
    groups = optimizer.state_dict()["param_groups"]
    optimizer.load_state_dict({"state": state, "param_groups": groups})


def _sibling(directory: Path, role: str) -> Path:
    return directory.with_name(f".{directory.name}.{role}")


def _write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    from safetensors.torch import save_file

    save_file({name: tensors[name].detach().cpu().contiguous() for name in sorted(tensors)}, path)
    _sync(path)


def _json_bytes(value: Mapping[str, Any]) -> bytes:
    return json.dumps(value, sort_keys=True, indent=1, allow_nan=False).encode() + b"\n"


def _write_bytes(path: Path, content: bytes) -> None:
    path.write_bytes(content)
    _sync(path)


def _sync(path: Path) -> None:
    """Force a file's content, or a directory's names, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
