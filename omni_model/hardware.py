"""The machine a stage runs on. The other module that reads the environment.

Results may not depend on how many threads or which machine computed them more than floating point forces
them to, so everything that does is set here, once, before a stage touches a tensor.
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from omni_model.artifacts import write_atomically
from omni_model.config import BadInput, Runtime

if TYPE_CHECKING:
    import torch

# One thread per process is the fastest use of a few cores here: stages run side by side, and OpenMP's
# spinning at barriers costs several times the work when another process wants the same core.
THREAD_VARIABLES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "VECLIB_MAXIMUM_THREADS")

DTYPES = ("bfloat16", "float16", "float32")
BF16_FLAGS = frozenset({"avx512_bf16", "amx_bf16"})  # of a processor that multiplies bfloat16
BF16_CAPABILITY = 8.0  # of a card that does
WORTH_A_SWITCH = 1.1  # times as fast

HUGGING_FACE = "https://huggingface.co"
MODEL_SCOPE = "https://modelscope.cn"
OPENSLR = "https://www.openslr.org https://us.openslr.org https://openslr.elda.org"


@dataclass(frozen=True)
class Network:
    """Where downloads come from, best first, and whether there may be any. No address ends in a slash.

    Attributes:
        openslr: servers that have openslr's `/resources`.
        whisper_id: the ModelScope id of the Whisper model asked for; empty means the usual mirror's.
        cache_hugging_face: where its own library keeps what it has fetched; `cache_model_scope` likewise.
    """

    offline: bool
    hugging_face: tuple[str, ...]
    model_scope: tuple[str, ...]
    openslr: tuple[str, ...]
    whisper_id: str
    cache_hugging_face: Path
    cache_model_scope: Path


def network() -> Network:
    """The settings of this machine; `infra/README.md` lists the variables."""
    get = os.environ.get
    caches = Path(get("XDG_CACHE_HOME") or "~/.cache")
    home = Path(get("HF_HOME") or caches / "huggingface")
    hugging_face = f"{get('HF_ENDPOINT') or ''} {get('HF_MIRRORS') or HUGGING_FACE}"
    return Network(
        offline=_offline(),
        hugging_face=_addresses(hugging_face),
        model_scope=_addresses(get("MODELSCOPE_ENDPOINT") or MODEL_SCOPE),
        openslr=_addresses(get("OPENSLR_MIRRORS") or OPENSLR),
        whisper_id=get("WHISPER_MS_ID") or "",
        cache_hugging_face=Path(get("HF_HUB_CACHE") or home / "hub").expanduser(),
        cache_model_scope=Path(get("MODELSCOPE_CACHE") or "~/.cache/modelscope").expanduser(),
    )


def _offline() -> bool:
    wish = os.environ.get("OMNI_OFFLINE") or os.environ.get("HF_HUB_OFFLINE") or ""
    return wish.lower() in ("1", "true", "yes", "on")


def _addresses(text: str) -> tuple[str, ...]:
    """Addresses separated by spaces or commas, each once, `https://` where none is named."""
    found = [each.rstrip("/") for each in text.replace(",", " ").split()]
    return tuple(dict.fromkeys(each if "://" in each else f"https://{each}" for each in found))


def fix_environment(runtime: Runtime) -> None:
    """Fix what libraries read at import, in a stage's own process: threads, BLAS, no calls to any hub."""
    os.environ.update({name: str(runtime.threads) for name in THREAD_VARIABLES})
    os.environ.update(
        OMNI_OFFLINE=str(int(_offline())),  # what the person wants, before libraries are told otherwise
        CUBLAS_WORKSPACE_CONFIG=":4096:8",
        HF_HUB_OFFLINE="1",
        TOKENIZERS_PARALLELISM="false",
        MPLBACKEND="Agg",
    )


def prepare_torch(runtime: Runtime, seed: int) -> None:
    """Set threads, determinism, matmul precision and the seed for a stage that computes with torch."""
    import torch

    torch.set_num_threads(runtime.threads)
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = False  # nothing reads it, and filling takes time
    # On a CPU "medium" may speed large products up (see speed_up_products) and slows small models by half.
    torch.set_float32_matmul_precision("high" if torch.cuda.is_available() else "highest")
    torch.manual_seed(seed)


def compute_dtype(device: torch.device) -> torch.dtype:
    """dtype of the GPT's activations: NANOCHAT_DTYPE, else bf16 on cards that multiply it, fp32 elsewhere.

    Raises:
        BadInput: NANOCHAT_DTYPE is none of bfloat16, float16, float32.
    """
    import torch

    named = os.environ.get("NANOCHAT_DTYPE")
    if named and named not in DTYPES:
        raise BadInput(f"NANOCHAT_DTYPE is {named!r}; set it to {', '.join(DTYPES)}, or to nothing")
    if not named:
        multiplies = device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 0)
        named = "bfloat16" if multiplies else "float32"
    dtype: torch.dtype = getattr(torch, named)
    return dtype


def fast_dtype() -> str:
    """The dtype in which this machine reads a frozen encoder fastest: bfloat16 where it multiplies it.

    Asked before a run is planned, hence without torch. Emulated, bfloat16 would be slower than float32.
    """
    with contextlib.suppress(OSError, subprocess.SubprocessError, ValueError):
        asked = ["nvidia-smi", "--query-gpu=compute_cap", "--format=csv,noheader"]
        told = subprocess.run(asked, capture_output=True, text=True, timeout=10, check=True)
        if capabilities := [float(each) for each in told.stdout.split()]:
            return "bfloat16" if min(capabilities) >= BF16_CAPABILITY else "float32"
    with contextlib.suppress(OSError):
        if not BF16_FLAGS.isdisjoint(Path("/proc/cpuinfo").read_text().split()):
            return "bfloat16"
    return "float32"


def speed_up_products(kept: Path) -> str:
    """Let large fp32 products on a CPU go the faster of torch's two ways, where that is as exact; returns it.

    "medium" hands them to oneDNN. Depending on the processor that is up to twice as fast with the same
    rounding, slower, or computed in bf16. What it is here is measured once and kept in the file `kept`, so
    that a stage which was killed goes on as it began. Small products gain nothing: ask for wide models only.
    """
    import torch

    if torch.cuda.is_available():
        return torch.get_float32_matmul_precision()
    if not kept.exists():
        kept.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(kept, json.dumps(_measured_precision()))
    choice: str = json.loads(kept.read_text())
    torch.set_float32_matmul_precision(choice)
    return choice


def _measured_precision() -> str:
    import torch

    before = torch.get_float32_matmul_precision()
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randn(shape, generator=generator) for shape in ((1024, 512), (4096, 512)))
    exact = a.double() @ b.double().T
    errors: dict[str, float] = {}
    times: dict[str, list[float]] = {"highest": [], "medium": []}
    for number in range(8):
        for way, taken in times.items():
            torch.set_float32_matmul_precision(way)
            began = time.perf_counter()
            product = a @ b.T
            if number:  # the first is a warm-up
                taken.append(time.perf_counter() - began)
            errors[way] = (product - exact).abs().max().item()
    torch.set_float32_matmul_precision(before)
    faster = min(times["medium"]) * WORTH_A_SWITCH < min(times["highest"])
    return "medium" if faster and errors["medium"] < 4 * errors["highest"] else "highest"


def join_ranks() -> tuple[int, int]:
    """This process's rank and their number, once all that torchrun started have met; (0, 1) without torchrun.

    Tensors on the CPU travel by gloo, those on cards by NCCL; each process takes the card of its local rank.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return 0, 1
    import torch
    import torch.distributed as dist

    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo")
    return dist.get_rank(), dist.get_world_size()


def describe() -> dict[str, Any]:
    """Processor count, memory and accelerators, as `omni doctor` prints them. Imports torch."""
    import torch

    pages, page_bytes = os.sysconf("SC_PHYS_PAGES"), os.sysconf("SC_PAGE_SIZE")
    cards = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return {
        "cpus": os.cpu_count(),
        "memory_gib": round(pages * page_bytes / 2**30, 1),
        "torch": torch.__version__,
        "gpus": cards,
    }


def attention_kernels(verdicts_file: Path) -> list[dict[str, Any]]:
    """Per device: `device`, `dtype`, the attention kernel `chosen` and the `verdicts` on all that were tried.

    Takes seconds, once a card's verdicts are in the file; finding them can take minutes.

    Raises:
        RuntimeError: the process that tries them failed.
    """
    done = subprocess.run(
        [sys.executable, "-m", "omni_model.model.backends", str(verdicts_file)],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
    )
    if done.returncode != 0:
        raise RuntimeError((done.stderr.strip().splitlines() or ["no word"])[-1])
    found: list[dict[str, Any]] = json.loads(done.stdout)
    return found
