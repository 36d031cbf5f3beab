"""Runs one stage in a process of its own: `python -m omni_model.launch job.json`.

A stage function computes; this module gives it a workspace, hashes what it made and writes the manifest.
The process ends when its parent does: standard input is a pipe that nobody writes to, and its end of file
means that the parent is gone. The parent's lease is inherited, so nobody else enters the directory before
the last process of this attempt is dead.

Under torchrun several processes run this for one stage. The first of them alone tells and seals.
"""

import contextlib
import importlib
import json
import os
import resource
import shutil
import signal
import stat
import sys
import threading
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

from omni_model import hardware
from omni_model.artifacts import Artifact, Manifest, hash_payload, write_atomically
from omni_model.config import JSON, BadInput
from omni_model.storage import Job, Workspace
from omni_model.storage.local import remember
from omni_model.telemetry import Metrics

EXIT_DONE, EXIT_FAILED, EXIT_REFUSED = 0, 1, 2
FAILURE = "failure.json"


def resolve(entrypoint: str) -> Callable[..., dict[str, JSON]]:
    """The stage function that `package.module:function` names."""
    module, _, name = entrypoint.partition(":")
    return getattr(importlib.import_module(module), name)  # type: ignore[no-any-return]


def run(job: Job) -> Artifact | None:
    """Compute one stage in this process and seal its artifact.

    Returns the handle on the finished artifact; None in all ranks but the first.
    """
    started = time.time()
    metrics = Metrics(job.directory / "metrics.jsonl" if hardware.is_first_rank() else Path(os.devnull))
    work = Workspace(job.directory, job.seed, metrics, job.components)
    if "torch" in job.components["packages"]:  # importing it costs seconds that other stages need not pay
        hardware.prepare_torch(job.runtime, job.seed)
    facts = resolve(job.entrypoint)(job.recipe, *job.inputs, work=work, runtime=job.runtime)
    return seal(job, facts, metrics.summaries, started) if hardware.is_first_rank() else None


def seal(job: Job, facts: dict[str, Any], metrics: dict[str, Any], started: float) -> Artifact:
    """Hash the payload, write the manifest, and drop what only a restart would have needed."""
    expected = Artifact.kinds[job.handle].fact_names()
    if set(facts) != expected:
        raise TypeError(
            f"{job.entrypoint} returned facts {sorted(facts)} where {job.handle} has {sorted(expected)}"
        )
    out = job.directory / "out"
    files = hash_payload(out)
    for file in files:
        _sync(out / file.path)
    timings = {
        "started_unix": round(started, 3),
        "seconds": round(time.time() - started, 3),
        "peak_memory_bytes": float(peak_memory_bytes()),
    }
    versions = {"python": sys.version.split()[0], "machine": hardware.machine(), **job.components["packages"]}
    manifest = Manifest(
        job.stage, job.key, job.handle, job.components, files, facts, metrics, timings, versions
    )
    manifest.write(job.directory)
    shutil.rmtree(job.directory / "partial", ignore_errors=True)
    remember(job.directory, manifest)  # after that, which gave linked files a new change time
    return Artifact.from_manifest(manifest, job.directory)


def peak_memory_bytes() -> int:
    """Peak resident memory of this process.

    On Linux, what getrusage tells begins with the memory of the process that started this one.
    """
    with contextlib.suppress(OSError):
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    os.fsync(descriptor)
    os.close(descriptor)


def die_with_parent() -> None:
    """Kill this process group as soon as standard input, if it is a pipe, reaches its end."""
    if not stat.S_ISFIFO(os.fstat(0).st_mode):
        return  # started by hand from a terminal, not by a parent that holds the other end

    def watch() -> None:
        while os.read(0, 1):
            pass
        os.killpg(0, signal.SIGKILL)

    threading.Thread(target=watch, daemon=True, name="die-with-parent").start()


def main(job_path: str) -> int:
    """Run the job and report a failure as `failure.json` beside it. Returns the exit code."""
    die_with_parent()
    job = Job.read(Path(job_path))
    failure = job.directory / FAILURE
    hardware.fix_environment(job.runtime)
    try:
        run(job)
    except Exception as error:
        refused = isinstance(error, BadInput)
        message = str(error) or type(error).__name__
        if isinstance(error, OSError) and error.filename:
            message = f"{error.filename}: {error.strerror}"
        traceback.print_exc()
        if not failure.exists():  # of several ranks the first tells why; the others lose their connection
            write_atomically(failure, json.dumps({"message": message, "refused": refused}))
        return EXIT_REFUSED if refused else EXIT_FAILED
    return EXIT_DONE


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
