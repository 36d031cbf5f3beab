"""Work that divides, done by several processes of one thread each.

A worker is a fresh interpreter that runs a module of ours. It is told what to do, and answers, in lines of
JSON: nothing is forked from a process with threads in it, and nothing is unpickled. When its input ends,
because the work is done or whoever gave it is dead, it ends at once. It inherits the stage's lease, so that
nobody else enters the stage's directory before the last worker has left.
"""

import contextlib
import json
import os
import queue
import signal
import subprocess
import sys
import threading
import traceback
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from omni_model.config import BadInput

Told = Callable[[int], None]
Work = Callable[[Mapping[str, Any], Told], object]


def spread(
    module: str, setup: Mapping[str, Any], jobs: Sequence[Mapping[str, Any]], num_workers: int, told: Told
) -> None:
    """Have the jobs done by `num_workers` processes that run `module`, whose end calls `serve`.

    Args:
        setup: what each worker gets once, before its first job; plain JSON, as every job.
        told: called with the steps that a worker reports, from several threads.

    Raises:
        BadInput: a worker refused its job; the message is its own.
        RuntimeError: a worker failed or was killed.
    """
    waiting: queue.SimpleQueue[Mapping[str, Any] | None] = queue.SimpleQueue()
    for job in jobs:
        waiting.put(job)
    # After an error the workers are ended first; then their threads have nothing more to wait for.
    with ThreadPoolExecutor(num_workers) as threads, contextlib.ExitStack() as hired:
        busy = []
        for _ in range(num_workers):
            waiting.put(None)
            worker = hired.enter_context(Worker(module, setup))
            busy.append(threads.submit(worker.keep_busy, waiting, told))
        for each in as_completed(busy):
            each.result()


class Worker:
    """One process, for as long as the `with` block lasts."""

    def __init__(self, module: str, setup: Mapping[str, Any]) -> None:
        self._module, self._setup = module, setup

    def __enter__(self) -> Self:
        # Started in the folder that holds the package, so that it is found installed or not.
        self._process = subprocess.Popen(
            [sys.executable, "-m", self._module],
            cwd=Path(__file__).resolve().parents[1],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            close_fds=False,  # the lease goes with it
            text=True,
        )
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._process.kill()
        self._process.wait()

    def keep_busy(self, waiting: "queue.SimpleQueue[Mapping[str, Any] | None]", told: Told) -> None:
        """Give it jobs until None comes."""
        self._say(self._setup)
        while job := waiting.get():
            self._say(job)
            while steps := self._hear():
                told(steps)

    def _say(self, thing: Mapping[str, Any]) -> None:
        assert self._process.stdin
        with contextlib.suppress(BrokenPipeError):  # its last words are still to be heard
            self._process.stdin.write(json.dumps(thing) + "\n")
            self._process.stdin.flush()

    def _hear(self) -> int:
        """Steps that were done, or 0 where the whole job is."""
        assert self._process.stdout
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError(_why_it_ended(self._process.wait()))
        answer = json.loads(line)
        if "message" in answer:
            raise (BadInput if answer["refused"] else RuntimeError)(answer["message"])
        return int(answer["steps"])


def _why_it_ended(code: int) -> str:
    if code == -signal.SIGKILL:
        return (
            "a worker was killed by SIGKILL (out of memory is the usual reason); "
            "run again to continue, perhaps with a smaller runtime.workers"
        )
    return f"a worker ended with code {code} before its work was done; run again to continue"


def serve(prepare: Callable[[Mapping[str, Any]], Work]) -> None:
    """Be a worker: read the setup, then jobs, from standard input until it ends."""
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # whatever else is printed here is no answer
    heard: queue.SimpleQueue[Mapping[str, Any]] = queue.SimpleQueue()
    threading.Thread(target=_listen, args=(heard,), daemon=True).start()

    def tell(**answer: Any) -> None:
        with contextlib.suppress(BrokenPipeError):  # nobody listens any more: `_listen` ends this process
            answers.write(json.dumps(answer) + "\n")

    try:
        work = prepare(heard.get())
        while True:
            work(heard.get(), lambda steps: tell(steps=steps))
            tell(steps=0)
    except Exception as error:
        if not isinstance(error, BadInput):
            traceback.print_exc()
        tell(message=str(error) or type(error).__name__, refused=isinstance(error, BadInput))


def _listen(heard: "queue.SimpleQueue[Mapping[str, Any]]") -> None:
    for line in sys.stdin:
        heard.put(json.loads(line))
    os._exit(0)
