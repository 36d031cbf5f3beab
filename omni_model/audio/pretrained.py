"""A model directory in Hugging Face's layout, loaded strictly: every weight of the encoder, or one refusal.

transformers fills a missing weight with random numbers and prints a table; a frozen encoder with one random
matrix still gives frames, only worthless ones. Here what is missing, cut off or of another kind is refused.
"""

import json
from pathlib import Path
from typing import Any

import torch

from omni_model.config import BadInput

CONFIG, WEIGHTS, WEIGHTS_INDEX = "config.json", "model.safetensors", "model.safetensors.index.json"


def load_pretrained(model_class: Any, directory: Path, needed: tuple[str, ...]) -> Any:
    """The transformers model of a directory, float32, in eval mode.

    Args:
        needed: prefixes of the weights that must be there; others may be missing.

    Raises:
        BadInput: no such model, of another family, or its weights are missing, cut off or of other shapes.
    """
    from transformers.utils import logging

    _check_config(directory, model_class.config_class.model_type)
    for path in _weight_files(directory):
        _check_safetensors(path)
    logging.disable_progress_bar()  # a load takes less time than its bar
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()  # what its table would say is said below
    try:
        model, found = model_class.from_pretrained(
            directory,
            use_safetensors=True,
            local_files_only=True,
            attn_implementation="sdpa" if model_class._supports_sdpa else "eager",
            dtype=torch.float32,
            output_loading_info=True,
        )
    except (OSError, ValueError, RuntimeError) as error:
        first = str(error).strip().splitlines()[0]
        raise BadInput(f"{directory} cannot be loaded as a {model_class.__name__}: {first}") from None
    finally:
        logging.set_verbosity(verbosity)
    missing = sorted(name for name in found["missing_keys"] if name.startswith(needed))
    if missing:
        raise BadInput(f"{directory} lacks {len(missing)} weights of the encoder, such as {missing[0]}.")
    return model.eval().requires_grad_(False)


def _check_config(directory: Path, family: str) -> None:
    try:
        found = json.loads((directory / CONFIG).read_text())["model_type"]
    except OSError:
        raise BadInput(f"{directory} is not a model directory: it has no {CONFIG}.") from None
    except (ValueError, KeyError, TypeError):
        raise BadInput(f"{directory / CONFIG} is not the description of a model.") from None
    if found != family:
        raise BadInput(f"{directory} holds a model of the family {found!r}, not {family!r}.")


def _weight_files(directory: Path) -> list[Path]:
    if not (directory / WEIGHTS_INDEX).exists():
        return [directory / WEIGHTS]
    try:
        names = set(json.loads((directory / WEIGHTS_INDEX).read_text())["weight_map"].values())
    except (ValueError, KeyError, TypeError, AttributeError):
        raise BadInput(f"{directory / WEIGHTS_INDEX} cannot be read; fetch the model again.") from None
    return [directory / str(name) for name in sorted(names)]


def _check_safetensors(path: Path) -> None:
    from safetensors import SafetensorError, safe_open

    if not path.exists():
        raise BadInput(f"{path} is missing; give a model with all its weights as safetensors.")
    try:
        with safe_open(path, framework="pt"):
            pass
    except SafetensorError as error:
        raise BadInput(f"{path} is damaged or cut off ({error}); fetch the model again.") from None
