"""Where a model may be had by its name: what other programs have brought to this machine, then two hubs.

Hubs list their files with sizes and, for large ones, sha256; both are held against what arrives. Their own
libraries are not used to fetch: one waits long for a dead host, the other keeps a wrong file without a word,
and neither knows an order of servers.
"""

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any
from urllib.parse import quote, urlencode

from omni_model.audio.pretrained import CONFIG, WEIGHTS, WEIGHTS_INDEX
from omni_model.config import BadInput
from omni_model.downloads import fetch
from omni_model.hardware import Network

PREPROCESSOR = "preprocessor_config.json"
TIMEOUT_S = 10.0
RETRIES = 2
MODEL_SCOPE_OWNERS = {"openai": "openai-mirror"}  # owners that are called otherwise there
MODEL_NAME = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Place:
    """Somewhere a model may be.

    Attributes:
        bring: the directory it is in afterwards, given the sha256 its weights must have (or empty); raises
            BadInput where it is not to be had there.
    """

    name: str
    bring: Callable[[str], Path]


def places(model: str, network: Network, downloads: Path, progress: Progress) -> list[Place]:
    """Every place to look for `model`, best first.

    Args:
        model: `owner/name`, as Hugging Face has it.
        downloads: a directory for what is fetched; an attempt that was killed there is continued.
        progress: told (bytes so far, bytes in all) while a file is fetched.

    Raises:
        BadInput: that is no name of a model.
    """
    if not MODEL_NAME.fullmatch(model):
        raise BadInput(f"the model {model!r} must be named owner/name, as at Hugging Face")
    there = _model_scope_id(model, network)
    caches = [
        Place(f"ModelScope's cache {network.cache_model_scope}", partial(_model_scope_cache, there, network)),
        Place(
            f"Hugging Face's cache {network.cache_hugging_face}", partial(_hugging_face_cache, model, network)
        ),
    ]
    if network.offline:
        return [*caches, Place("the network", _not_asked)]
    hubs: list[_HuggingFace | _ModelScope] = [_ModelScope(base, there) for base in network.model_scope]
    hubs += [_HuggingFace(base, model) for base in network.hugging_face]
    return [*caches, *(Place(hub.name, partial(_bring, hub, downloads, progress)) for hub in hubs)]


def weight_names(directory: Path) -> list[str]:
    """The files of a directory that hold weights as safetensors: one, or an index and what it names.

    Raises:
        BadInput: there are none, or the index cannot be read.
    """
    if (directory / WEIGHTS).exists():
        return [WEIGHTS]
    index = directory / WEIGHTS_INDEX
    if not index.exists():
        raise BadInput(f"{directory} has no {WEIGHTS}")
    try:
        names = sorted(set(json.loads(index.read_text())["weight_map"].values()))
    except (ValueError, KeyError, TypeError, AttributeError):
        names = []
    if not names or any(Path(str(name)).name != name for name in names):
        raise BadInput(f"{index} names no files beside it")
    return [WEIGHTS_INDEX, *names]


def _not_asked(sha256: str) -> Path:
    raise BadInput("not asked, because OMNI_OFFLINE or HF_HUB_OFFLINE is set")


# --- caches --------------------------------------------------------------------------------------


def _model_scope_id(model: str, network: Network) -> str:
    owner, name = model.split("/")
    if network.whisper_id and "whisper" in name.lower():
        return network.whisper_id
    return f"{MODEL_SCOPE_OWNERS.get(owner, owner)}/{name}"


def _model_scope_cache(there: str, network: Network, sha256: str) -> Path:
    root = network.cache_model_scope
    layouts = (
        f"models/{there.replace('/', '--')}/snapshots/master",
        f"models/{there}",
        f"hub/models/{there}",
    )
    for directory in (root / layout for layout in layouts):
        if (directory / CONFIG).exists():
            return directory
    raise BadInput(f"no {there} there")


def _hugging_face_cache(model: str, network: Network, sha256: str) -> Path:
    from huggingface_hub import try_to_load_from_cache

    found = try_to_load_from_cache(model, CONFIG, cache_dir=network.cache_hugging_face)
    if not isinstance(found, str):
        raise BadInput(f"no {model} there")
    return Path(found).parent


# --- hubs ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _HubFile:
    size: int
    sha256: str  # empty where the hub does not tell


@dataclass(frozen=True)
class _HuggingFace:
    base: str
    model: str

    @property
    def name(self) -> str:
        return f"Hugging Face {self.base}"

    @property
    def listing_url(self) -> str:
        return f"{self.base}/api/models/{quote(self.model)}/tree/main"

    def file_url(self, name: str) -> str:
        return f"{self.base}/{quote(self.model)}/resolve/main/{quote(name)}"

    def files(self, listing: Any) -> dict[str, _HubFile]:
        """Small files are in git and have only its own kind of digest."""
        return {
            each["path"]: _HubFile(int(each["size"]), str((each.get("lfs") or {}).get("oid", "")))
            for each in listing
        }


@dataclass(frozen=True)
class _ModelScope:
    base: str
    model: str

    @property
    def name(self) -> str:
        return f"ModelScope {self.base}"

    @property
    def listing_url(self) -> str:
        return f"{self.base}/api/v1/models/{quote(self.model)}/repo/files?Revision=master"

    def file_url(self, name: str) -> str:
        asked = urlencode({"Revision": "master", "FilePath": name})
        return f"{self.base}/api/v1/models/{quote(self.model)}/repo?{asked}"

    def files(self, listing: Any) -> dict[str, _HubFile]:
        return {
            each["Path"]: _HubFile(int(each["Size"]), str(each.get("Sha256") or ""))
            for each in listing["Data"]["Files"]
        }


def _bring(hub: _HuggingFace | _ModelScope, downloads: Path, progress: Progress, sha256: str) -> Path:
    """Fetch a model's description and weights."""
    files = _list(hub, downloads)
    if WEIGHTS not in files and WEIGHTS_INDEX not in files:
        raise BadInput(f"its {hub.model} has no {WEIGHTS}")
    whole = WEIGHTS in files
    if whole and sha256 and files[WEIGHTS].sha256 not in ("", sha256):
        raise BadInput(f"its weights have the sha256 {files[WEIGHTS].sha256}, not {sha256}")
    for name in (CONFIG, PREPROCESSOR, WEIGHTS_INDEX):  # small: always anew, all from one hub
        (downloads / name).unlink(missing_ok=True)
    for name in (CONFIG, *({PREPROCESSOR} & set(files)), WEIGHTS if whole else WEIGHTS_INDEX):
        _fetch(hub, name, files, downloads, progress, sha256 if name == WEIGHTS else "")
    if not whole:
        (downloads / WEIGHTS).unlink(missing_ok=True)
        for name in weight_names(downloads)[1:]:
            _fetch(hub, name, files, downloads, progress)
    return downloads


def _fetch(
    hub: _HuggingFace | _ModelScope,
    name: str,
    files: Mapping[str, _HubFile],
    downloads: Path,
    progress: Progress,
    sha256: str = "",
) -> None:
    if name not in files:
        raise BadInput(f"its {hub.model} has no {name}")
    fetch(
        [hub.file_url(name)],
        downloads / name,
        size=files[name].size,
        sha256=sha256 or files[name].sha256,
        progress=progress,
        timeout_s=TIMEOUT_S,
        retries=RETRIES,
    )


def _list(hub: _HuggingFace | _ModelScope, downloads: Path) -> dict[str, _HubFile]:
    listing = downloads / "listing.json"
    listing.unlink(missing_ok=True)
    fetch([hub.listing_url], listing, timeout_s=TIMEOUT_S, retries=RETRIES)
    try:
        return hub.files(json.loads(listing.read_text()))
    except (ValueError, KeyError, TypeError, AttributeError):
        raise BadInput(f"what it says about {hub.model} cannot be read") from None
