"""Runs a program that a model wrote, and tells whether it passes its test.

Nobody has read the program, so it may loop for ever, fill the memory or delete files. It runs in an
interpreter of its own with no environment, no input and no installed packages, in a directory that is empty
before and gone afterwards. Several walls stand around it, each alone enough for most of what can go wrong:

- *limits* (everywhere): CPU and wall time, memory (not on macOS), size of a file, open files, no processes
  (as root the kernel does not count them), no core dumps; output is read to a bound; the whole process group
  is killed at the end.
- *namespaces* (Linux, where users may make them): no network, no other process to be seen, nothing survives
  the first process, the directory has a bounded size.
- *landlock* (Linux 5.13 and later): no file but Python's own library and that directory; from 6.7 on no TCP,
  from 6.12 on no signal to other processes.
- *seccomp* (Linux on x86_64 and aarch64): no system call but some 75 that a computing Python needs: no fork,
  no other program, no thread, no socket, no signal, no change of a mode or an owner.
- *hook* (everywhere): Python's audit events refuse files elsewhere, sockets, processes, ctypes and frames.

`Ran.layers` says which of them held. On macOS these are limits and hook alone. None of it is a border against
someone who attacks the kernel or, where the hook stands alone, who knows the interpreter's insides: for those
one takes a virtual machine.

The verdict is a token of 256 random bits that the interpreter's own part of the child alone has, and sends
when program and test have run to their end; leaving early with any exit code, or printing anything, is not
that. What no such test can tell: whether an object that says it equals everything is a solution, or whether
the program has changed a module that the test uses.
"""

import contextlib
import os
import secrets
import selectors
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from omni_model.evaluation.sandbox_child import HOOK, LENGTH_BYTES, TOKEN_BYTES
from omni_model.evaluation.sandbox_walls import FLAGS, LANDLOCK, LIMITS, NAMESPACES, SECCOMP

LAYERS = (LIMITS, NAMESPACES, LANDLOCK, SECCOMP, HOOK)
WALLS = Path(__file__).with_name("sandbox_walls.py")
CHILD = Path(__file__).with_name("sandbox_child.py")
OUTPUT_BYTES = 10_000
VERDICT_BYTES = 10_000
START_S = 10.0  # for the interpreters to start, on a busy machine; the program's time begins after it
POLL_S = 0.05
CHUNK = 2**16


@dataclass(frozen=True)
class Ran:
    """What became of a program.

    Attributes:
        reason: why it did not pass; empty when it did.
        output: the beginning of what it printed on both streams.
        layers: the walls that stood around it.
    """

    passed: bool
    reason: str
    output: str
    layers: tuple[str, ...] = LAYERS


def run_program(
    code: str,
    test: str = "",
    *,
    timeout_s: float = 5.0,
    memory_bytes: int = 2**28,
    layers: Sequence[str] = LAYERS,
) -> Ran:
    """Run `code`, then `test` with the names that it defined; passed if both come to their end.

    Args:
        test: sees Python's builtins as they were before the program.
        timeout_s: seconds of wall time; also the limit of CPU seconds, rounded up.
        memory_bytes: address space of the interpreter and the program together.
        layers: which walls to put up; fewer are for proving that each of them holds.

    Raises:
        RuntimeError: the sandbox itself does not start here, which says nothing about the program.
    """
    try:
        return _run(code, test, timeout_s, memory_bytes, layers)
    except RuntimeError:
        # In namespaces root may no longer enter directories of others, and Python may be in one.
        return _run(code, test, timeout_s, memory_bytes, [each for each in layers if each != NAMESPACES])


def _run(code: str, test: str, timeout_s: float, memory_bytes: int, layers: Sequence[str]) -> Ran:
    token = secrets.token_bytes(TOKEN_BYTES)
    program, check = (text.encode(errors="surrogatepass") for text in (code, test))
    job = token + len(program).to_bytes(LENGTH_BYTES) + program + check
    scratch = os.path.realpath(tempfile.mkdtemp(prefix="program-"))
    told, tells = os.pipe()
    words = [str(CHILD), scratch, str(tells), str(timeout_s), str(memory_bytes), ",".join(layers)]
    try:
        process = subprocess.Popen(
            [sys.executable, *FLAGS, str(WALLS), *words],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            env={},
            cwd=scratch,
            pass_fds=(tells,),
            start_new_session=True,
        )
        os.close(tells)
        with os.fdopen(told, "rb", buffering=0) as verdict, process:
            watched = _Watched(process, verdict, job)
            try:
                watched.watch(timeout_s)
            finally:
                _end(process)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    return watched.judged(token, timeout_s)


def _end(process: subprocess.Popen[bytes]) -> None:
    """Kill the process with all that it started."""
    with contextlib.suppress(ProcessLookupError, PermissionError):  # macOS: of a group of zombies alone
        os.killpg(process.pid, signal.SIGKILL)
    process.kill()


class _Watched:
    """A running sandbox: what is written to it, and what it has said so far."""

    def __init__(self, process: subprocess.Popen[bytes], verdict: IO[bytes], job: bytes) -> None:
        assert process.stdin is not None
        assert process.stdout is not None
        self._process, self._verdict, self._job = process, verdict, job
        self._output, self._stdin = process.stdout, process.stdin
        self._said = {verdict.fileno(): bytearray(), self._output.fileno(): bytearray()}
        self._late = False

    def watch(self, timeout_s: float) -> None:
        """Until the process has ended, or its time is over."""
        deadline, started = time.monotonic() + START_S, False
        with selectors.DefaultSelector() as selector:
            for stream, what in (
                (self._verdict, selectors.EVENT_READ),
                (self._output, selectors.EVENT_READ),
                (self._stdin, selectors.EVENT_WRITE),
            ):
                os.set_blocking(stream.fileno(), False)
                selector.register(stream, what)
            while True:
                ended = self._process.poll() is not None  # asked first: what it wrote before is read below
                for key, _ in selector.select(0 if ended else POLL_S):
                    self._turn(selector, key.fileobj)  # type: ignore[arg-type]
                if ended:
                    return
                if not started and b"\n" in self._said[self._verdict.fileno()]:
                    deadline, started = time.monotonic() + timeout_s, True
                if time.monotonic() > deadline:
                    self._late = True
                    return

    def _turn(self, selector: selectors.BaseSelector, stream: IO[bytes]) -> None:
        """Write the job on, or read a piece of what is said."""
        if stream is self._stdin:
            with contextlib.suppress(BrokenPipeError):
                self._job = self._job[os.write(stream.fileno(), self._job[:CHUNK]) :]
                if self._job:
                    return
            selector.unregister(stream)
            stream.close()
            return
        said, most = self._said[stream.fileno()], max(OUTPUT_BYTES, VERDICT_BYTES)
        piece = os.read(stream.fileno(), CHUNK)
        said += piece[: most - len(said)]  # what goes beyond is read and forgotten
        if not piece:
            selector.unregister(stream)

    def judged(self, token: bytes, timeout_s: float) -> Ran:
        """The verdict on what was said."""
        verdict, output = (bytes(said) for said in self._said.values())
        text = output[:OUTPUT_BYTES].decode(errors="replace")
        layers, started, rest = verdict.partition(b"\n")
        if not started:
            raise RuntimeError(
                f"the sandbox for programs does not start: {text.strip()[-1000:] or 'no word'}"
            )
        held = tuple(layers.decode().split(","))
        if rest == token:
            return Ran(True, "", text, held)
        if self._late:
            return Ran(False, f"took longer than {timeout_s:g} s", text, held)
        return Ran(False, rest.decode(errors="replace") or self._ended(), text, held)

    def _ended(self) -> str:
        code = self._process.returncode
        number = -code if code < 0 else code - 128 if code > 128 else 0
        with contextlib.suppress(ValueError):
            return f"was ended by {signal.Signals(number).name}"
        return f"left before its end with code {code}"
