"""Workers: every job done once, errors in their own words, and nobody left behind."""

import os
import select
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from omni_model.config import BadInput
from omni_model.workers import spread

MODULE = "tests.little_worker"
ROOT = Path(__file__).resolve().parent.parent


def test_every_job_is_done_once_and_by_all(tmp_path: Path) -> None:
    steps: list[int] = []
    jobs: list[dict[str, Any]] = [{"do": "meet", "name": f"meet-{n}", "others": 3} for n in range(3)]
    jobs += [{"do": "write", "name": f"job-{n}"} for n in range(9)]
    spread(MODULE, {"folder": str(tmp_path)}, jobs, 3, steps.append)
    assert sum(steps) == 3 * len(jobs)
    authors = [(tmp_path / job["name"]).read_text() for job in jobs]
    assert len(set(authors[:3])) == len(set(authors)) == 3


@pytest.mark.parametrize(
    ("do", "error", "says"),
    [
        ("refuse", BadInput, r"^clip 7 is silent; give one that is not\.$"),
        ("fail", RuntimeError, "^seven is not nine$"),
        ("die", RuntimeError, "a worker was killed by SIGKILL .*run again to continue"),
    ],
)
def test_an_error_reaches_the_stage_in_its_own_words(
    tmp_path: Path, do: str, error: type[Exception], says: str, capfd: pytest.CaptureFixture[str]
) -> None:
    reader, writer = os.pipe()
    jobs = [{"do": "sleep"}, {"do": do}]
    try:
        with pytest.raises(error, match=says):
            spread(MODULE, {"descriptor": inheritable(writer)}, jobs, 2, lambda _: None)
        assert ended(reader, writer), "a worker is left"
    finally:
        os.close(reader)
    assert ("Traceback" in capfd.readouterr().err) == (do == "fail")


@pytest.mark.parametrize("whole_group", [False, True])
def test_workers_die_with_the_stage(whole_group: bool) -> None:
    reader, writer = os.pipe()
    script = (
        f"from omni_model.workers import spread\n"
        f"jobs = [{{'do': 'sleep'}}] * 2\n"
        f"spread('{MODULE}', {{'descriptor': {writer}}}, jobs, 2, lambda _: None)\n"
    )
    stage = subprocess.Popen(
        [sys.executable, "-c", script], cwd=ROOT, pass_fds=(writer,), start_new_session=True
    )
    heard = b""
    while len(heard) < 2:  # both work, and have what the stage inherited, as its lease
        assert select.select([reader], [], [], 60)[0]
        heard += os.read(reader, 2)
    (os.killpg if whole_group else os.kill)(stage.pid, signal.SIGKILL)
    stage.wait()
    assert ended(reader, writer), "a worker is left"
    os.close(reader)


def inheritable(descriptor: int) -> int:
    os.set_inheritable(descriptor, True)
    return descriptor


def ended(reader: int, writer: int) -> bool:
    """Whether every other process that could write into the pipe is gone."""
    os.close(writer)
    while select.select([reader], [], [], 20)[0]:
        if not os.read(reader, 100):
            return True
    return False
