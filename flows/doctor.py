"""`omni doctor`: is this machine ready, and if not, what is missing?"""

import importlib.metadata
import os
import shutil
import sys
from dataclasses import dataclass
from typing import Any

from omni_model.config import BadInput
from omni_model.storage import default_root, open_store
from tasks import prefect_server
from tasks.stage import REGISTRY

LOW_DISK_GIB = 5


@dataclass(frozen=True)
class Check:
    """One thing looked at."""

    name: str
    good: bool
    found: str


def examine() -> list[Check]:
    """Every check, in the order in which one needs the other."""
    return [_python(), *_packages(), _machine(), _store(), *_attention(), _server(), _encoder()]


def _python() -> Check:
    version = sys.version.split()[0]
    return Check("Python", sys.version_info >= (3, 11), f"{version} ({sys.executable})")


def _packages() -> list[Check]:
    names = {name for stage in REGISTRY.values() for name in (*stage.packages, *stage.exact_packages)} | {
        "prefect"
    }
    checks = []
    for name in sorted(names):
        try:
            checks.append(Check(name, True, importlib.metadata.version(name)))
        except importlib.metadata.PackageNotFoundError:
            checks.append(Check(name, False, "not installed; run make setup"))
    return checks


def _machine() -> Check:
    from omni_model.hardware import describe

    try:
        found = describe()
    except ImportError as error:
        return Check("machine", False, f"torch does not load: {error}")
    gpus = ", ".join(found["gpus"]) or "no GPU (none is needed for smoke and demo)"
    return Check("machine", True, f"{found['cpus']} cores, {found['memory_gib']} GiB memory, {gpus}")


def _store() -> Check:
    try:
        store = open_store(default_root())
    except BadInput as error:
        return Check("store", False, str(error))
    free_gib = shutil.disk_usage(store.root).free / 2**30
    where = store.url if store.url == str(store.root) else f"{store.url}, mirrored in {store.root}"
    return Check("store", free_gib > LOW_DISK_GIB, f"{where}, {free_gib:.0f} GiB free")


def _attention() -> list[Check]:
    """Which attention kernel each device would use, and why not another; the store keeps what was found."""
    from omni_model.hardware import attention_kernels

    if not _store().good:
        return []
    verdicts = open_store(default_root()).root / ".kernels" / "attention.json"
    if not verdicts.exists():
        print("trying this machine's attention kernels, which is done once ...", file=sys.stderr, flush=True)
    try:
        devices = attention_kernels(verdicts)
    except RuntimeError as error:
        return [Check("attention", False, f"no kernel could be tried: {error}")]
    return [Check(f"attention, {device['dtype']}", True, _kernels_in_words(device)) for device in devices]


def _kernels_in_words(device: dict[str, Any]) -> str:
    tried = "; ".join(f"{verdict['kernel']} {verdict['sentence']}" for verdict in device["verdicts"])
    return f"{device['chosen']} on {device['device']} ({tried})"


def _server() -> Check:
    if url := os.environ.get("PREFECT_API_URL"):
        answers = prefect_server.is_healthy(url, timeout_s=5)
        return Check("Prefect server", answers, f"{url} {'answers' if answers else 'does not answer'}")
    if _store().good and (live := prefect_server.live_ui(open_store(default_root()).root)):
        return Check("Prefect server", True, f"{live} (omni ui)")
    return Check("Prefect server", True, "none open; omni run starts one for the length of the run")


def _encoder() -> Check:
    from omni_model.hardware import network

    found = network()
    caches = f"{found.cache_model_scope}, {found.cache_hugging_face}"
    hubs = "no hub, since this machine is set to be offline"
    if not found.offline:
        hubs = "then at " + ", ".join((*found.model_scope, *found.hugging_face))
    told = f"demo teaches its own; one that a recipe names is looked for in {caches}, {hubs}"
    return Check("encoder weights", True, told)
