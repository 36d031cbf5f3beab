"""The machine a stage runs on. The other module that reads the environment.

Results may not depend on how many threads or which machine computed them more than floating point forces
them to, so everything that does is set here, once, before a stage touches a tensor.
"""

from __future__ import annotations

import contextlib
import json
import netrc
import os
import platform
import re
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

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

# Dense bf16 with fp32 sums, by the whole name of a card; from NVIDIA's data sheets.
PEAK_BF16_TFLOPS = {
    r"RTX 5090": 209.5,
    r"RTX 4090": 165.2,
    r"RTX 3090": 71.0,
    r"H100( SXM| 80GB HBM3)": 989.0,
    r"H100 PCIe": 756.0,
    r"H200": 989.0,
    r"A100(-SXM4-40GB|-SXM4-80GB|-PCIE-40GB|-PCIE-80GB| 80GB PCIe)?": 312.0,
}

HUGGING_FACE = "https://huggingface.co"
MODEL_SCOPE = "https://modelscope.cn"
WANDB = "https://api.wandb.ai https://api.forge.coreweave.com"  # one service under its two names
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


def wandb_mode() -> str:
    """How wandb is to run here: as WANDB_MODE says, else online with a key or login, else offline.

    To be asked before wandb is imported: it is told not to send reports on itself, as it does even offline.
    """
    os.environ["WANDB_ERROR_REPORTING"] = "false"
    if named := os.environ.get("WANDB_MODE"):
        return named
    hosts = [urlsplit(each).netloc for each in _addresses(os.environ.get("WANDB_BASE_URL") or WANDB)]
    known = bool(os.environ.get("WANDB_API_KEY"))
    with contextlib.suppress(OSError, netrc.NetrcParseError):
        logins = netrc.netrc(Path(os.environ.get("NETRC") or "~/.netrc").expanduser()).hosts
        known = known or not logins.keys().isdisjoint(hosts)
    return "online" if known and not _offline() else "offline"


def fix_environment(runtime: Runtime) -> None:
    """Fix what libraries read at import, in a stage's own process: threads, BLAS, no calls to any hub."""
    os.environ.update({name: str(runtime.threads) for name in THREAD_VARIABLES})
    os.environ.update(
        OMNI_OFFLINE=str(int(_offline())),  # what the person wants, before libraries are told otherwise
        CUBLAS_WORKSPACE_CONFIG=":4096:8",
        HF_HUB_OFFLINE="1",
        TOKENIZERS_PARALLELISM="true" if runtime.threads > 1 else "false",
        RAYON_NUM_THREADS=str(runtime.threads),
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

    named = _named_dtype()
    if not named:
        multiplies = device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 0)
        named = "bfloat16" if multiplies else "float32"
    return getattr(torch, named)  # type: ignore[no-any-return]


def _named_dtype() -> str:
    named = os.environ.get("NANOCHAT_DTYPE") or ""
    if named and named not in DTYPES:
        raise BadInput(f"NANOCHAT_DTYPE is {named!r}; set it to {', '.join(DTYPES)}, or to nothing")
    return named


def training_dtype() -> str:
    """`compute_dtype` by name, asked without torch: a run is planned before anything heavy is imported.

    Raises:
        BadInput: NANOCHAT_DTYPE is none of bfloat16, float16, float32.
    """
    return _named_dtype() or ("bfloat16" if (_capability() or 0.0) >= BF16_CAPABILITY else "float32")


def fast_dtype() -> str:
    """The dtype in which this machine reads a frozen encoder fastest: bfloat16 where it multiplies it.

    Asked before a run is planned, hence without torch. Emulated, bfloat16 would be slower than float32.
    """
    if (capability := _capability()) is not None:
        return "bfloat16" if capability >= BF16_CAPABILITY else "float32"
    with contextlib.suppress(OSError):
        if not BF16_FLAGS.isdisjoint(Path("/proc/cpuinfo").read_text().split()):
            return "bfloat16"
    return "float32"


def _capability() -> float | None:
    """The least compute capability of this machine's cards; None without one."""
    with contextlib.suppress(ValueError):
        return min(map(float, _nvidia_smi("compute_cap")))
    return None


def _nvidia_smi(field: str) -> list[str]:
    return _told_by("nvidia-smi", f"--query-gpu={field}", "--format=csv,noheader")


def _told_by(*command: str) -> list[str]:
    """The lines that a command prints; none where it is missing or fails."""
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True)
        return done.stdout.splitlines()
    return []


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


def is_first_rank() -> bool:
    """False in all but one of the processes that torchrun started for one stage."""
    return os.environ.get("RANK", "0") == "0"


def device() -> torch.device:
    """Where a language model trains: this process's card, else the CPU. Ask after `join_ranks`."""
    import torch

    return torch.device(f"cuda:{torch.cuda.current_device()}" if torch.cuda.is_available() else "cpu")


def card_name() -> str:
    """This process's card, as its driver names it; "cpu" without one."""
    import torch

    return torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"


def peak_flops(card: str) -> float | None:
    """Products and sums a second that a card can make at most, in dense bf16 with fp32 sums; None: not known.

    A card is known by its full name alone: laptop, Ti, D, NVL and parts of a card (MIG) are slower or faster.
    """
    name = card.removeprefix("NVIDIA ").removeprefix("GeForce ")
    found = (tflops for pattern, tflops in PEAK_BF16_TFLOPS.items() if re.fullmatch(pattern, name))
    return next((tflops * 1e12 for tflops in found), None)


def join_ranks() -> tuple[int, int]:
    """This process's rank and their number, once all that torchrun started have met; (0, 1) without torchrun.

    Tensors on the CPU travel by gloo, those on cards by NCCL; each process takes the card of its local rank.

    Raises:
        BadInput: there are more ranks than cards.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return 0, 1
    import torch
    import torch.distributed as dist

    if dist.is_initialized():
        return dist.get_rank(), dist.get_world_size()
    if torch.cuda.is_available():
        wanted, there = int(os.environ["LOCAL_WORLD_SIZE"]), torch.cuda.device_count()
        if wanted > there:
            raise BadInput(f"runtime.gpus is {wanted} and there are {there} cards; set it to {there} at most")
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo")
    return dist.get_rank(), dist.get_world_size()


def machine() -> str:
    """Processor, cores, memory and cards in words, asked without torch: `2 x EPYC 9B45, 24 GiB`."""
    pages, page_bytes = os.sysconf("SC_PHYS_PAGES"), os.sysconf("SC_PAGE_SIZE")
    words = f"{os.cpu_count()} x {_processor()}, {pages * page_bytes / 2**30:.0f} GiB"
    return ", ".join([words, *_nvidia_smi("name")])


def _processor() -> str:
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return next(iter(_told_by("sysctl", "-n", "machdep.cpu.brand_string")), platform.machine())


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
