"""Makes one stage's artifact: lease, look again, compute in a process of its own, hand back what was sealed.

This is the only way an artifact comes to be, whether Prefect, a test or a notebook asks for it.
"""

import contextlib
import dataclasses
import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from omni_model.artifacts import Artifact, Manifest
from omni_model.config import BadInput, Runtime
from omni_model.storage import Job, Store
from omni_model.storage.lease import Lease
from omni_model.telemetry import read_progress
from tasks.identity import Identifier, Identity
from tasks.stage import Stage

POLL_S = 0.2
LAUNCH, FAILURE = "omni_model.launch", "failure.json"


class StageFailed(RuntimeError):
    """A stage's own process failed; the message is one sentence with the log's path."""


@dataclass(frozen=True)
class Outcome:
    """A finished stage: its handle and manifest, and whether this call computed it."""

    handle: Artifact
    manifest: Manifest
    computed: bool


class Listener(Protocol):
    """Hears what happens to a stage; `label` is its name in this run."""

    def waiting(self, label: str, holder: str) -> None:
        """Another process holds the stage."""

    def started(self, label: str) -> None:
        """The stage's process has begun."""

    def progressed(self, label: str, progress: dict[str, float]) -> None:
        """The newest line of the stage's metrics."""

    def finished(self, label: str, outcome: Outcome) -> None:
        """The artifact is there."""

    def failed(self, label: str, error: Exception) -> None:
        """The stage failed; nothing else is begun after that."""


class Executor:
    """Runs stages; one per run, shared by its threads."""

    def __init__(self, store: Store, identifier: Identifier, runtime: Runtime, listener: Listener) -> None:
        self._store = store
        self._identifier = identifier
        self._runtime = runtime
        self._listener = listener
        self._slots = threading.BoundedSemaphore(runtime.parallel_stages)
        self._collecting = threading.Lock()
        self._children: set[subprocess.Popen[bytes]] = set()
        self._stopped = threading.Event()
        self.failure: Exception | None = None  # the first stage's that failed

    def identify(self, stage: Stage, recipe: Any, inputs: tuple[Artifact, ...]) -> Identity:
        """The stage's key for these finished inputs."""
        stage.check(recipe, tuple(type(handle) for handle in inputs))
        digests: dict[str, str | None] = {
            name: handle.digest for name, handle in zip(stage.edges(len(inputs)), inputs, strict=True)
        }
        return self._identifier.identify(stage, recipe, digests)

    def find(self, stage: Stage, key: str) -> Outcome | None:
        """The finished and undamaged artifact of this key, if there is one."""
        manifest = self._store.find(stage.name, key)
        directory = self._store.directory(stage.name, key)
        if manifest is None or self._store.damages(directory, manifest, trust=True):
            return None
        return Outcome(stage.makes.from_manifest(manifest, directory), manifest, computed=False)

    def make(self, stage: Stage, recipe: Any, inputs: tuple[Artifact, ...], label: str) -> Outcome:
        """The artifact of a stage, reused or computed.

        Raises:
            StageFailed: its process failed or was killed.
            BadInput: it refused its input.
        """
        identity = self.identify(stage, recipe, inputs)
        outcome = self.find(stage, identity.key)
        if outcome is None:
            with self._lease(stage, identity, label) as lease, self._room(stage):
                outcome = self.find(stage, identity.key)  # another process may just have made it
                if outcome is None:
                    outcome = self._attempt(stage, recipe, inputs, identity, label, lease)
        self._listener.finished(label, outcome)
        return outcome

    def stop(self) -> None:
        """Kill every stage's process; nothing starts after this."""
        self._stopped.set()
        for child in list(self._children):
            _kill_group(child, signal.SIGKILL)

    def _widened(self) -> Runtime:
        """How a stage runs that has the machine to itself."""
        threads = self._runtime.threads * self._runtime.parallel_stages
        return dataclasses.replace(self._runtime, threads=threads, parallel_stages=1)

    @contextlib.contextmanager
    def _room(self, stage: Stage) -> Iterator[None]:
        """One of the places for stages that compute; a wide stage takes all of them."""
        with contextlib.ExitStack() as taken:
            # Two wide stages that each held some places would wait for ever.
            with self._collecting if stage.wide else contextlib.nullcontext():
                for _ in range(self._runtime.parallel_stages if stage.wide else 1):
                    taken.enter_context(self._slots)
            yield

    def _lease(self, stage: Stage, identity: Identity, label: str) -> Any:
        return self._store.lease(
            stage.name,
            identity.key,
            purpose=f"omni run, {label}",
            waiting=lambda holder: self._listener.waiting(label, holder),
            given_up=self._stopped.is_set,
        )

    def _attempt(
        self,
        stage: Stage,
        recipe: Any,
        inputs: tuple[Artifact, ...],
        identity: Identity,
        label: str,
        lease: Lease,
    ) -> Outcome:
        if self._stopped.is_set() or self.failure is not None:
            raise StageFailed(f"{label} was not begun, because the run had ended")
        try:
            return self._compute(stage, recipe, inputs, identity, label, lease)
        except Exception as error:
            self.failure = self.failure or error
            self._listener.failed(label, error)
            raise

    def _compute(
        self,
        stage: Stage,
        recipe: Any,
        inputs: tuple[Artifact, ...],
        identity: Identity,
        label: str,
        lease: Lease,
    ) -> Outcome:
        for handle in inputs:
            self._store.fetch(handle.stage, handle.key, self._stopped.is_set)
        directory = self._store.directory(stage.name, identity.key)
        self._store.clear(directory)
        job = Job(
            stage=stage.name,
            key=identity.key,
            entrypoint=stage.entrypoint,
            handle=stage.makes.__name__,
            components=identity.components,
            recipe=recipe,
            inputs=inputs,
            seed=identity.seed,
            runtime=self._widened() if stage.wide else self._runtime,
            directory=directory,
        )
        self._listener.started(label)
        if self._runtime.inline:
            from omni_model import launch

            launch.run(job)
        else:
            self._run_child(stage, job, label, lease)
        manifest = Manifest.read(directory)
        self._store.publish(manifest, lease, self._stopped.is_set)
        return Outcome(stage.makes.from_manifest(manifest, directory), manifest, computed=True)

    def _run_child(self, stage: Stage, job: Job, label: str, lease: Lease) -> None:
        job_path = job.write()
        (job.directory / FAILURE).unlink(missing_ok=True)
        shared = stage.distributed and job.runtime.gpus > 1
        through = _torchrun(job.runtime.gpus) if shared else ()
        with (job.directory / "log.txt").open("ab") as log:
            child = subprocess.Popen(
                [sys.executable, "-m", *through, LAUNCH, str(job_path)],
                stdin=subprocess.PIPE,  # its end of file tells the child that this process is gone
                stdout=log,
                stderr=subprocess.STDOUT,
                pass_fds=(lease.fileno(),),
                start_new_session=True,
                cwd=Path(__file__).resolve().parent.parent,
            )
        self._children.add(child)
        try:
            if self._stopped.is_set():
                raise StageFailed(f"{label} was stopped")
            code = self._wait(child, job.directory / "metrics.jsonl", label)
        finally:
            _kill_group(child, signal.SIGKILL)
            child.wait()
            if child.stdin is not None:
                child.stdin.close()  # torchrun's ranks have groups of their own; this ends them
            self._children.discard(child)
        if code != 0:
            raise self._failure(job, label, code)

    def _wait(self, child: subprocess.Popen[bytes], metrics: Path, label: str) -> int:
        while True:
            try:
                return child.wait(timeout=POLL_S)
            except subprocess.TimeoutExpired:
                if progress := read_progress(metrics):
                    self._listener.progressed(label, progress)

    def _failure(self, job: Job, label: str, code: int) -> Exception:
        if self._stopped.is_set():
            return StageFailed(f"{label} was stopped; run again to continue")
        log = job.directory / "log.txt"
        if code < 0:
            name = signal.Signals(-code).name
            hint = " (out of memory is the usual reason)" if name == "SIGKILL" else ""
            return StageFailed(f"{label} was killed by {name}{hint}; run again to continue; log: {log}")
        try:
            failure = json.loads((job.directory / FAILURE).read_text())
        except (OSError, ValueError):
            return StageFailed(f"{label} ended with code {code} before it could say why; log: {log}")
        if failure["refused"]:
            return BadInput(f"{label}: {failure['message']}")
        return StageFailed(f"{label} failed: {failure['message']}; log: {log}")


def _torchrun(processes: int) -> tuple[str, ...]:
    return ("torch.distributed.run", "--standalone", f"--nproc-per-node={processes}", "--module")


def _kill_group(child: subprocess.Popen[bytes], number: int) -> None:
    """Signal the child's whole group, helpers of its own included."""
    try:
        os.killpg(child.pid, number)
    except ProcessLookupError:
        return
    except PermissionError:  # macOS says so of a group that has just ended
        return
