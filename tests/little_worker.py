"""A worker whose jobs are small enough to refuse, fail, be killed and never end."""

import os
import signal
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from omni_model.config import BadInput
from omni_model.workers import Told, Work, serve


def prepare(setup: Mapping[str, Any]) -> Work:
    """Jobs say what to `do`."""

    def work(job: Mapping[str, Any], told: Told) -> None:
        if job["do"] == "refuse":
            raise BadInput("clip 7 is silent; give one that is not.")
        if job["do"] == "fail":
            raise ArithmeticError("seven is not nine")
        if job["do"] == "die":
            os.kill(os.getpid(), signal.SIGKILL)
        if job["do"] == "sleep":
            os.write(setup["descriptor"], b"x")
            time.sleep(600)
        print("this line is no answer")
        folder = Path(setup["folder"])
        (folder / job["name"]).write_text(str(os.getpid()))
        while job["do"] == "meet" and len(list(folder.glob("meet-*"))) < job["others"]:
            time.sleep(0.01)
        told(2)
        told(1)

    return work


if __name__ == "__main__":
    serve(prepare)
