"""A Prefect server on this machine: one for the length of a run, or one that stays open for its UI.

Prefect's own temporary server outlives a parent that is killed; this one is a child that watches its standard
input and ends with whoever started it. Nothing here imports Prefect before the server's own process does.
"""

import contextlib
import json
import os
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

from omni_model.artifacts import write_atomically
from omni_model.config import BadInput
from omni_model.storage import Store

STARTUP_TIMEOUT_S = 120  # migrations of a new database on a loaded two-core machine take a while
HOST = "127.0.0.1"

# Set wherever Prefect is imported or started, unless the user has set them otherwise.
SETTINGS = {
    "DO_NOT_TRACK": "1",
    "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
    "PREFECT_UI_API_URL": "/api",  # relative, so that any port and an ssh tunnel work
    "PREFECT_SERVER_UI_SHOW_PROMOTIONAL_CONTENT": "false",
    "PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS": str(STARTUP_TIMEOUT_S),
    "PREFECT_FLOWS_HEARTBEAT_FREQUENCY": "30",
}
# For the command alone: it says in one sentence what Prefect would print as a traceback. The UI has the logs.
QUIET = {"PREFECT_LOGGING_HANDLERS_CONSOLE_LEVEL": "CRITICAL"}


def use_settings(store: Path) -> None:
    """Put Prefect's settings and this store's Prefect home into the environment, keeping what is set."""
    for name, value in {**SETTINGS, **QUIET, "PREFECT_HOME": str(store / ".prefect")}.items():
        os.environ.setdefault(name, value)


def is_healthy(api_url: str, timeout_s: float = 1.0) -> bool:
    """Whether a Prefect server answers at `api_url`."""
    try:
        with urllib.request.urlopen(f"{api_url}/health", timeout=timeout_s) as answer:
            return bool(answer.status == 200)
    except (OSError, ValueError):
        return False


def live_ui(store: Path) -> str | None:
    """The API address of an `omni ui` server that is open on this store."""
    try:
        note = json.loads((store / ".prefect" / "server.json").read_text())
        os.kill(note["pid"], 0)  # signal 0 only asks; a note may outlive a server that was killed
    except (OSError, ValueError, KeyError):
        return None
    return str(note["api_url"]) if is_healthy(note["api_url"]) else None


def free_port() -> int:
    """A port of the loopback interface that nobody listens on."""
    with socket.socket() as probe:
        probe.bind((HOST, 0))
        return int(probe.getsockname()[1])


def require_port(port: int) -> None:
    """Refuse a port that cannot be listened on.

    Raises:
        BadInput: not a port, taken, or not allowed.
    """
    try:
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind((HOST, port))
    except (OSError, OverflowError) as error:
        reason = getattr(error, "strerror", None) or "it is not a port"
        raise BadInput(f"cannot listen on port {port} ({reason}); choose another with --port") from None


@contextlib.contextmanager
def embedded_server(store: Store) -> Iterator[str]:
    """A server without UI for one run; yields its API address.

    Raises:
        RuntimeError: it did not answer in time; the message names its log.
    """
    home = store.root / ".prefect"
    home.mkdir(parents=True, exist_ok=True)
    # One start at a time: two servers that both find a new database would both migrate it.
    with store.local_lease("prefect", "server", "starting a Prefect server"):
        server, api_url = _start(home)
    try:
        yield api_url
    finally:
        server.kill()
        server.wait()


def _start(home: Path) -> tuple[subprocess.Popen[bytes], str]:
    port = free_port()
    log_path = home / "server.log"
    with log_path.open("ab") as log:
        server = subprocess.Popen(
            [sys.executable, "-m", "tasks.prefect_server", str(port)],
            stdin=subprocess.PIPE,  # its end of file tells the server that this process is gone
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            cwd=Path(__file__).resolve().parent.parent,
            env=os.environ | {"PREFECT__SERVER_EPHEMERAL": "1", "PREFECT_UI_ENABLED": "0"},
        )
    api_url = f"http://{HOST}:{port}/api"
    try:
        _wait_until_healthy(server, api_url, log_path)
    except BaseException:
        server.kill()
        server.wait()
        raise
    return server, api_url


def _wait_until_healthy(server: subprocess.Popen[bytes], api_url: str, log: Path) -> None:
    deadline = time.monotonic() + STARTUP_TIMEOUT_S
    while not is_healthy(api_url):
        if server.poll() is not None:
            raise RuntimeError(
                f"the Prefect server ended with code {server.returncode} at its start; log: {log}"
            )
        if time.monotonic() > deadline:
            raise RuntimeError(f"the Prefect server did not answer within {STARTUP_TIMEOUT_S} s; log: {log}")
        time.sleep(0.05)


def serve(port: int) -> None:
    """Serve in this process until it is stopped."""
    import uvicorn

    uvicorn.run(
        "prefect.server.api.server:create_app",
        factory=True,
        host=HOST,
        port=port,
        log_level="error",
        lifespan="on",
    )


def serve_ui(store: Path, port: int) -> None:
    """Serve the API and the UI of this store until interrupted; runs started meanwhile use it."""
    note = store / ".prefect" / "server.json"
    note.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(note, json.dumps({"api_url": f"http://{HOST}:{port}/api", "pid": os.getpid()}))
    try:
        serve(port)
    finally:
        note.unlink(missing_ok=True)


def _die_with_parent() -> None:
    def watch() -> None:
        while os.read(0, 1):
            pass
        os._exit(0)

    threading.Thread(target=watch, daemon=True).start()


if __name__ == "__main__":
    _die_with_parent()
    serve(int(sys.argv[1]))
