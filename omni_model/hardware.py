"""The machine a stage runs on. The other module that reads the environment.

Results may not depend on how many threads or which machine computed them more than floating point forces
them to, so everything that does is set here, once, before a stage touches a tensor.
"""

import os
from typing import Any

from omni_model.config import Runtime

# One thread per process is the fastest use of a few cores here: stages run side by side, and OpenMP's
# spinning at barriers costs several times the work when another process wants the same core.
THREAD_VARIABLES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "VECLIB_MAXIMUM_THREADS")


def fix_environment(runtime: Runtime) -> None:
    """Fix what libraries read at import, in a stage's own process: threads, BLAS, no calls to any hub."""
    os.environ.update({name: str(runtime.threads) for name in THREAD_VARIABLES})
    os.environ.update(
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
    # On a CPU, where "medium" (oneDNN's GEMM) doubles large products, it slows SDPA and small models by half.
    torch.set_float32_matmul_precision("high" if torch.cuda.is_available() else "highest")
    torch.manual_seed(seed)


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
