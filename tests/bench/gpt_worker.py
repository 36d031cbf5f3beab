"""One contender of `python -m tests.bench gpt`, in a process of its own.

    python -m tests.bench.gpt_worker '{"side": "ours", "work": "train", ...}'

It prepares, warms up, and prints one line of JSON with the numbers on which all contenders must agree. Then
it obeys one word per line of standard input, and answers each with one line of JSON: "time" is one timed
repetition, "memory" a measurement of bytes. Meanwhile the others wait, so only one works at a time.
"""

import json
import os
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from tests.bench.gpt_sides import Nanochat, Ours, Shape, Side

WARM_UP = 3  # repetitions that do not count: the first two may compile


@dataclass(frozen=True)
class Job:
    """What one contender does; `tokens` are those of a row in training, of the prompt elsewhere."""

    side: str  # "ours" or "nanochat"
    work: str  # "train", "prefill", "decode" or "kv"
    shape: Shape = Shape()
    rows: int = 1
    tokens: int = 700
    new_tokens: int = 16  # that one repetition decodes
    dtype: str = "float32"  # of the activations
    narrow: bool = False  # keep all weights in that dtype
    compiled: bool = False
    optimizer: str = "92d63d4"  # whose: nanochat's at that commit
    precision: str = "highest"  # of fp32 matrix products
    device: str = "cpu"
    threads: int = 1


@dataclass
class Contender:
    """`rewind` is the untimed beginning of a repetition; what it gives, `work` gets."""

    values: list[float]
    work: Callable[[Any], object]
    rewind: Callable[[], Any] = lambda: None
    memory: Callable[[], int] = lambda: 0
    last_loss: float = 0.0  # of the warm-up
    flops_per_token: int = 0


def train(job: Job, side: Side) -> Contender:
    """One update on the same batch again and again. Value: its first loss, before the optimizer had a say."""
    update = side.updates(job.compiled, job.optimizer)
    tokens = _tokens(job, job.rows, job.tokens + 1)
    ids, targets = tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()
    losses = [update(ids, targets).item() for _ in range(WARM_UP)]

    def work(_: None) -> None:
        update(ids, targets)

    flops = side.model.flops_per_token() if isinstance(side, Ours) else side.model.estimate_flops()  # type: ignore[operator]
    return Contender(
        losses[:1],
        work,
        memory=lambda: working_bytes(side, work),
        last_loss=losses[-1],
        flops_per_token=flops,
    )


def prefill(job: Job, side: Side) -> Contender:
    """Read the prompt. Values: the logits after it."""
    prompt = _tokens(job, 1, job.tokens)

    @torch.inference_mode()
    def work(_: None) -> Tensor:
        return side.prefill(prompt)

    for _ in range(WARM_UP):
        logits = work(None)
    return Contender(logits.flatten().tolist(), work)


def decode(job: Job, side: Side) -> Contender:
    """Write `new_tokens` tokens after the prompt. Values: the logits after the last of them."""
    columns = _tokens(job, job.new_tokens, job.rows).tolist()
    with torch.inference_mode():
        rewind = torch.inference_mode()(side.decoding(_tokens(job, 1, job.tokens), job.rows, job.new_tokens))

    @torch.inference_mode()
    def work(step: Callable[[list[int]], Tensor]) -> Tensor:
        for column in columns:
            logits = step(column)
        return logits

    for _ in range(WARM_UP):
        logits = work(rewind())
    return Contender(logits.flatten().tolist(), work, rewind)


def kv(job: Job, side: Side) -> Contender:
    """Nothing to time: the memory of the cache of one row of `tokens` tokens."""
    with torch.inference_mode():
        cache = side.cache(job.tokens)
    return Contender([], lambda _: None, memory=lambda: _bytes_of(_tensors_of(cache)))


WORKS = {"train": train, "prefill": prefill, "decode": decode, "kv": kv}


def working_bytes(side: Side, update: Callable[[None], None]) -> int:
    """Peak memory of an update above weights, one gradient per weight, and the optimizer's state.

    What tensors occupy, as the allocators of both devices tell it: on a CPU the resident memory of the
    process also holds whatever the C library keeps for later, which differs by a hundred MiB from run to run.
    Between updates only the weights and the state are there.
    """
    weights = list(side.model.parameters())
    gradients = _bytes_of(weights)
    if weights[0].is_cuda:
        state = _bytes_of([*weights, *_tensors_of(dict(side.optimizer.state))])
        torch.cuda.reset_peak_memory_stats()
        update(None)
        return torch.cuda.max_memory_allocated() - state - gradients
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        update(None)
    events = recorded.profiler.kineto_results.events()  # type: ignore[union-attr]
    moves = sorted((e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]")
    return max(accumulate(nbytes for _, nbytes in moves)) - gradients


def _bytes_of(tensors: Iterable[Tensor]) -> int:
    """Memory under these tensors, counted once where they share it."""
    storages = (tensor.untyped_storage() for tensor in tensors if not tensor.is_meta)
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())


def _tensors_of(thing: object) -> Iterable[Tensor]:
    """The tensors in a structure of lists, dictionaries and objects."""
    if isinstance(thing, Tensor):
        yield thing
    elif isinstance(thing, dict):
        for value in thing.values():
            yield from _tensors_of(value)
    elif isinstance(thing, list | tuple):
        for value in thing:
            yield from _tensors_of(value)
    elif hasattr(thing, "__dict__"):
        yield from _tensors_of(vars(thing))


def _tokens(job: Job, *size: int) -> Tensor:
    """Random token ids, the same for every contender."""
    generator = torch.Generator().manual_seed(0)
    return torch.randint(job.shape.vocab_size, size, generator=generator).to(job.device)


def timed(contender: Contender, device: str) -> dict[str, float]:
    """Wall and CPU seconds of one repetition."""
    prepared = contender.rewind()
    _wait(device)
    wall, cpu = time.perf_counter(), time.process_time()
    contender.work(prepared)
    _wait(device)
    return {"wall": time.perf_counter() - wall, "cpu": time.process_time() - cpu}


def _wait(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def main() -> None:
    """Serve one job until standard input ends."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever the contender prints is no answer
    fields = json.loads(sys.argv[1])
    job = Job(**fields | {"shape": Shape(**fields["shape"])})
    torch.set_num_threads(job.threads)
    torch.set_float32_matmul_precision(job.precision)
    dtype, device = getattr(torch, job.dtype), torch.device(job.device)
    if job.side == "ours":
        side: Side = Ours(job.shape, dtype, device, job.narrow)
    else:
        side = Nanochat(job.shape, dtype, device)
    contender = WORKS[job.work](job, side)
    greeting = {
        "values": contender.values,
        "last_loss": contender.last_loss,
        "flops_per_token": contender.flops_per_token,
        "card": torch.cuda.get_device_name() if job.device == "cuda" else "",
        "torch": torch.__version__,
    }
    print(json.dumps(greeting), file=answers, flush=True)
    for line in sys.stdin:
        measured = {"bytes": contender.memory()} if line.strip() == "memory" else timed(contender, job.device)
        print(json.dumps(measured), file=answers, flush=True)


if __name__ == "__main__":
    main()
