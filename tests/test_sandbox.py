"""Programs that try to get out of the sandbox.

Each attack is tried three ways: against all walls together, against each wall alone that is meant to stop
it, and against nothing but the limits, where it must succeed: an attack that cannot succeed proves nothing.
A wall that this kernel does not offer is skipped; the others still have to hold.
"""

import functools
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import textwrap
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import iniconfig
import pytest

from omni_model.evaluation.sandbox import LAYERS, OUTPUT_BYTES, Ran, run_program
from omni_model.evaluation.sandbox_child import HOOK
from omni_model.evaluation.sandbox_walls import (
    FILE_BYTES,
    LANDLOCK,
    LIMITS,
    NAMESPACES,
    OPEN_FILES,
    SCRATCH_BYTES,
    SECCOMP,
)

ROOT = Path(__file__).resolve().parent.parent
LINUX = sys.platform == "linux"
OPEN = "nothing"
SECRET = "the-cellar-key-4711"
LAX = {"timeout_s": 20.0}  # where the time is not what is tested


@functools.cache
def offered() -> frozenset[str]:
    """The walls that can be put up here."""
    return frozenset(run_program("").layers)


def walls(wall: str) -> tuple[str, ...]:
    """The layers that a wall stands for, all ("all"), or none (OPEN). Skips a test of what there is not."""
    if wall in LAYERS and wall not in offered():
        pytest.skip(f"this system offers no {wall}")
    return {"all": LAYERS, OPEN: (LIMITS,)}.get(wall, (LIMITS, wall))


def attack(code: str, wall: str, **limits: float) -> Ran:
    """Run a program behind one wall, all or none."""
    return run_program(textwrap.dedent(code), layers=walls(wall), **(LAX | limits))  # type: ignore[arg-type]


def try_each(ways: Sequence[str], there: Path, wall: str) -> str:
    """What a program prints that tries one way after the other; each has `there` and the modules it needs."""
    code = f"""
        import os, sys, time, subprocess, socket, _io, _socket, _posixsubprocess
        there = {str(there)!r}
        for way in {ways!r}:
            try:
                exec(way)
            except Exception as error:
                print(type(error).__name__)
    """
    ran = attack(code, wall)
    assert ran.passed, ran
    return ran.output


def behind(*walls: str) -> pytest.MarkDecorator:
    """The three ways to try an attack that each of these walls stops alone."""
    return pytest.mark.parametrize("wall", ["all", *walls, OPEN])


# -- what honest programs may do ----------------------------------------------------------------------------

HONEST = """
import bisect, collections, copy, dataclasses, datetime, decimal, enum, functools, hashlib, heapq, itertools
import json, math, operator, os, pathlib, random, re, statistics, string, tempfile, time, typing, zlib

Pair = collections.namedtuple("Pair", "left right")
Colour = enum.Enum("Colour", "RED BLUE")

class Point(typing.NamedTuple):
    x: int = 1

@dataclasses.dataclass(order=True)
class Box:
    size: int = 2

with open("kept.txt", "w") as file:
    file.write("words ✓")
assert open("kept.txt").read() == "words ✓" and os.listdir() == ["kept.txt"]
os.mkdir("room"); os.rename("kept.txt", "room/kept.txt"); os.remove("room/kept.txt"); os.rmdir("room")
with tempfile.TemporaryDirectory() as place:
    pathlib.Path(place, "x").write_bytes(b"y" * 1000)
assert hashlib.md5(b"x").hexdigest().startswith("9dd4e461") and zlib.crc32(b"x")
print("answers:", Pair(1, 2), Colour.RED, Point(), Box(), decimal.Decimal("0.1"), random.random() < 1)

def double(x):
    return 2 * x
"""


@pytest.mark.parametrize("layers", [LAYERS, *((LIMITS, wall) for wall in LAYERS[1:])], ids="+".join)
def test_an_honest_program_runs_behind_every_wall(layers: tuple[str, ...]) -> None:
    ran = run_program(HONEST, "assert double(2) == 4", layers=layers, **LAX)
    assert (ran.passed, ran.reason) == (True, ""), ran
    assert ran.output.startswith("answers: Pair(left=1, right=2) Colour.RED")


def test_the_walls_of_this_system_are_told() -> None:
    layers = run_program("").layers
    assert {LIMITS, HOOK} <= set(layers) <= set(LAYERS)
    if not LINUX:
        assert set(layers) == {LIMITS, HOOK}


@pytest.mark.parametrize(
    ("code", "test", "reason"),
    [
        ("def double(x): return x", "assert double(2) == 4, 'not doubled'", "AssertionError: not doubled"),
        ("1 / 0", "", "ZeroDivisionError: division by zero"),
        ("def broken(:", "", "SyntaxError: invalid syntax (program, line 1)"),
        ("x = 1", "print(y)", "NameError: name 'y' is not defined"),
        ("x = 'a\0b'", "", "SyntaxError: source code string cannot contain null bytes"),
        ("x = '\ud800'", "", "UnicodeEncodeError: 'utf-8' codec can't encode character"),
        ("(" * 5000 + ")" * 5000, "", "SyntaxError: too many nested parentheses (program, line 1)"),
        ("input()", "", "EOFError: EOF when reading a line"),
    ],
    ids=str,
)
def test_a_failure_has_its_reason(code: str, test: str, reason: str) -> None:
    ran = run_program(code, test, **LAX)
    null = "contain null bytes" in reason and sys.version_info < (3, 12)  # a ValueError then
    assert not ran.passed
    assert ran.reason.startswith(reason) or (null and ran.reason.endswith("cannot contain null bytes"))


def test_any_text_can_be_a_program() -> None:
    assert run_program("größe = '🎈' * 3\nassert len(größe) == 3\nprint(größe)").output == "🎈🎈🎈\n"
    assert run_program("#" + "x" * 3_000_000).passed


def test_a_sandbox_that_does_not_start_is_no_verdict_on_the_program() -> None:
    with pytest.raises(RuntimeError, match="the sandbox for programs does not start"):
        run_program("", memory_bytes=2**20)


@pytest.mark.skipif(os.getuid() != 0, reason="only root may enter the directories of others")
def test_without_namespaces_where_they_would_keep_it_from_starting(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "private").mkdir(mode=0o700)
    os.chown(tmp_path / "private", 65534, 65534)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "private"))
    ran = run_program("x = 1", **LAX)
    assert ran.passed
    assert NAMESPACES not in ran.layers


# -- files --------------------------------------------------------------------------------------------------


READS = (
    "open('secret').read()",
    "os.read(os.open('secret', 0), 99)",
    "_io.open_code('secret').read()",
    "os.listdir('.')",
    "[entry.name for entry in os.scandir('.')]",
)


@behind(LANDLOCK, HOOK)
def test_a_secret_of_the_user_is_not_read(wall: str, tmp_path: Path) -> None:
    (tmp_path / "secret").write_text(SECRET)
    (tmp_path / SECRET).touch()
    ways = [way.replace("'secret'", "there + '/secret'").replace("'.'", "there") for way in READS]
    done = try_each([f"print({way})" for way in ways], tmp_path, wall)
    assert done.count(SECRET) == (len(READS) if wall == OPEN else 0)


WRITES = (
    "open(there + '/new', 'w')",
    "open(there + '/kept', 'a').write('!')",
    "os.open(there + '/new', os.O_CREAT | os.O_WRONLY)",
    "os.mkdir(there + '/new')",
    "os.remove(there + '/kept')",
    "os.rename(there + '/kept', there + '/new')",
    "os.symlink('/', there + '/new')",
    "os.link(there + '/kept', there + '/new')",
    "os.truncate(there + '/kept', 1)",
    "os.mkfifo(there + '/new')",
    "open('../../' * 9 + there + '/new', 'w')",
)


@behind(LANDLOCK, HOOK)
def test_nothing_is_written_elsewhere(wall: str, tmp_path: Path) -> None:
    for number in range(len(WRITES)):
        (tmp_path / str(number)).mkdir()
        (tmp_path / str(number) / "kept").write_text("as it was")
    try_each(
        [way.replace("there", f"there + '/{number}'") for number, way in enumerate(WRITES)], tmp_path, wall
    )
    for number, way in enumerate(WRITES):
        found = list((tmp_path / str(number)).iterdir())
        untouched = [path.name for path in found] == ["kept"] and found[0].read_text() == "as it was"
        assert untouched == (wall != OPEN), way


@behind(SECCOMP, HOOK)
def test_mode_and_time_of_a_file_elsewhere_stay(wall: str, tmp_path: Path) -> None:
    """Landlock does not guard them."""
    path = tmp_path / "kept"
    path.touch(mode=0o600)
    before = path.stat()
    try_each(["os.chmod(there, 0o777)", "os.utime(there, (1, 1))"], path, wall)
    after = path.stat()
    assert (before.st_mode == after.st_mode) == (wall != OPEN)
    assert (before.st_mtime == after.st_mtime) == (wall != OPEN)


@behind(LANDLOCK, HOOK)
def test_a_link_in_the_scratch_directory_leads_nowhere(wall: str, tmp_path: Path) -> None:
    (tmp_path / "secret").write_text(SECRET)
    ran = attack(f"import os\nos.symlink({str(tmp_path)!r}, 'way')\nprint(open('way/secret').read())", wall)
    assert (SECRET in ran.output) == (wall == OPEN)


@pytest.mark.parametrize("wall", ["all", LANDLOCK, HOOK, OPEN])
def test_the_scratch_directory_is_empty_before_and_gone_afterwards(wall: str) -> None:
    ran = attack(
        "import os\nprint(os.getcwd(), os.listdir())\nopen('x', 'w').write('y')\nos.mkdir('z')", wall
    )
    where, found = ran.output.split()
    assert found == "[]"
    assert ran.passed
    assert Path(where).is_relative_to(os.path.realpath(tempfile.gettempdir()))
    assert not Path(where).exists()


def test_a_program_may_empty_its_scratch_directory() -> None:
    code = """
        import os, shutil
        open("x", "w").write("y")
        shutil.rmtree(os.getcwd(), ignore_errors=True)
        for way in (os.rmdir, shutil.rmtree):
            try:
                way(os.getcwd())
            except OSError:
                pass
        assert os.listdir() == []
    """
    for wall in ("all", LANDLOCK, HOOK):
        assert attack(code, wall).passed


# -- network, processes and signals -------------------------------------------------------------------------


class Listener:
    """A socket on the loopback interface, and whether anybody has come."""

    def __init__(self) -> None:
        self.socket = socket.create_server(("127.0.0.1", 0))
        self.socket.settimeout(0.05)
        self.port = self.socket.getsockname()[1]

    def visited(self) -> bool:
        try:
            self.socket.accept()[0].close()
        except TimeoutError:
            return False
        return True


@contextmanager
def listening() -> Iterator[Listener]:
    listener = Listener()
    yield listener
    listener.socket.close()


@behind(NAMESPACES, SECCOMP, HOOK)
def test_no_connection_is_made(wall: str, tmp_path: Path) -> None:
    with listening() as listener:
        way = f"socket.socket(socket.AF_INET, socket.SOCK_STREAM).connect(('127.0.0.1', {listener.port}))"
        try_each([way, way.replace("socket.", "_socket.")], tmp_path, wall)
        assert [listener.visited(), listener.visited()] == [wall == OPEN] * 2


@behind(NAMESPACES, SECCOMP, HOOK)
def test_no_datagram_is_sent(wall: str) -> None:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as receiver:
        receiver.bind(("127.0.0.1", 0))
        receiver.settimeout(0.05)
        code = f"""
            import socket
            way = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
            way.sendto(b"told", {receiver.getsockname()})
        """
        attack(code, wall)
        try:
            told = receiver.recv(10) == b"told"
        except TimeoutError:
            told = False
        assert told == (wall == OPEN)


@behind(SECCOMP, HOOK)
def test_no_process_is_made(wall: str, tmp_path: Path) -> None:
    """A fork bomb that is bounded, should it go off: twenty children that end at once."""
    if wall == OPEN and os.getuid():
        pytest.skip("the limit of processes holds for everybody but root")
    fork = "for _ in range(10): {} or os._exit(0); print('made')"
    made = try_each([fork.format("os.fork()"), fork.format("os.forkpty()[0]")], tmp_path, wall).count("made")
    assert made == (20 if wall == OPEN else 0)


STARTS = (
    "os.system(command)",
    "os.waitpid(os.posix_spawn('/bin/sh', ['sh', '-c', command], {}), 0)",
    "subprocess.run(command, shell=True)",
    "os.execv('/bin/sh', ['sh', '-c', command])",
)


@behind(LANDLOCK, SECCOMP, HOOK)
def test_no_other_program_is_started(wall: str, tmp_path: Path) -> None:
    if wall == OPEN and os.getuid():
        pytest.skip("the limit of processes holds for everybody but root")
    ways = [way.replace("command", f"'echo > {tmp_path}/{number}'") for number, way in enumerate(STARTS)]
    attack(f"import os, subprocess\nfor way in {ways!r}:\n  try: exec(way)\n  except Exception: pass", wall)
    assert len(list(tmp_path.iterdir())) == (len(STARTS) if wall == OPEN else 0)


@pytest.mark.skipif(not LINUX, reason="elsewhere the hook alone refuses to start a program")
@behind(LANDLOCK)
def test_another_interpreter_stands_behind_the_same_walls(wall: str, tmp_path: Path) -> None:
    (tmp_path / "secret").write_text(SECRET)
    script = f"print(open({str(tmp_path / 'secret')!r}).read())"
    python = os.path.realpath(sys.executable)
    code = f"import os\nos.execv({python!r}, [{python!r}, '-I', '-S', '-c', {script!r}])"
    ran = attack(code, wall)
    assert (SECRET in ran.output) == (wall == OPEN)
    assert not ran.passed


ORDERLY = """
import os, sys
from omni_model.evaluation.sandbox import run_program
code, layers = sys.stdin.read().replace("PARENT", str(os.getpid())), sys.argv[1].split(",")
ran = run_program(code, layers=layers, timeout_s=20.0)
print(ran.output)
"""


def in_a_process_of_its_own(code: str, wall: str, scratch: Path) -> subprocess.CompletedProcess[str]:
    """`attack`, called by a process that may be killed and has a secret in its environment."""
    return subprocess.run(
        [sys.executable, "-c", ORDERLY, ",".join(walls(wall))],
        input=textwrap.dedent(code),
        env={"SECRET": SECRET, "PYTHONPATH": str(ROOT), "TMPDIR": str(scratch)},
        capture_output=True,
        text=True,
    )


@behind(NAMESPACES, SECCOMP, HOOK)
def test_the_parent_is_not_killed(wall: str, tmp_path: Path) -> None:
    code = """
        import os
        for target in (PARENT, os.getppid()):
            try:
                os.kill(target, 9)
            except OSError as error:
                print(error)
    """
    killed = in_a_process_of_its_own(code, wall, tmp_path).returncode == -signal.SIGKILL
    assert killed == (wall == OPEN)


def test_a_program_that_kills_its_own_group_kills_itself_alone() -> None:
    ran = attack("import os\nos.killpg(0, 9)", OPEN)
    assert (ran.passed, ran.reason) == (False, "was ended by SIGKILL")


@pytest.mark.skipif(not LINUX, reason="there is no /proc")
@behind(LANDLOCK, HOOK)
def test_the_environment_of_the_parent_is_not_read(wall: str, tmp_path: Path) -> None:
    ran = in_a_process_of_its_own("print(open('/proc/PARENT/environ').read())", wall, tmp_path)
    assert (SECRET in ran.stdout) == (wall == OPEN)


def test_the_environment_is_empty(tmp_path: Path) -> None:
    code = "import os\nprint(sorted(os.environ), os.environb.get(b'SECRET'))"
    ran = in_a_process_of_its_own(code, OPEN, tmp_path)
    assert ran.stdout.splitlines()[0] in ("[] None", "['LC_CTYPE'] None")


@behind(NAMESPACES, SECCOMP, HOOK)
def test_nothing_lives_on_in_the_background(wall: str, tmp_path: Path) -> None:
    if wall in (OPEN, NAMESPACES) and os.getuid():
        pytest.skip("the limit of processes holds for everybody but root")
    heart = tmp_path / "heart"
    code = f"""
        import os, time
        if os.fork() == 0:
            os.setsid()
            for beat in range(30):
                open({str(heart)!r}, "a").write(".")
                time.sleep(0.05)
            os._exit(0)
        time.sleep(0.3)
    """
    attack(code, wall)
    beats = heart.stat().st_size if heart.exists() else 0
    time.sleep(0.2)
    assert ((heart.stat().st_size if heart.exists() else 0) > beats) == (wall == OPEN)
    assert (beats > 0) == (wall in (OPEN, NAMESPACES))  # that it was killed counts only if it lived


# -- limits -------------------------------------------------------------------------------------------------


def test_limits_are_set() -> None:
    code = """
        import json, resource
        names = "CPU AS FSIZE NOFILE NPROC CORE".split()
        print(json.dumps({name: resource.getrlimit(getattr(resource, "RLIMIT_" + name)) for name in names}))
    """
    found = json.loads(attack(code, OPEN, timeout_s=7.5, memory_bytes=2**29).output)
    wanted = {"CPU": 8, "FSIZE": FILE_BYTES, "NOFILE": OPEN_FILES, "NPROC": 0, "CORE": 0}
    wanted |= {"AS": 2**29} if LINUX else {}
    assert {name: found[name] for name in wanted} == {name: [most, most] for name, most in wanted.items()}


@pytest.mark.skipif(not LINUX, reason="macOS keeps no limit of memory")
def test_memory_is_limited() -> None:
    assert attack("x = bytearray(2**28)", "all", memory_bytes=2**29).passed
    code = """
        for way in ("bytearray(2**28)", "'x' * 2**28", "1 << 2**31", "list(range(2**40))"):
            try:
                eval(way)
            except MemoryError:
                print("no")
    """
    assert attack(code, "all", memory_bytes=2**28).output == "no\n" * 4
    assert attack("x = [bytes(2**20) for _ in range(500)]", "all").reason.startswith("MemoryError")


@pytest.mark.parametrize(
    "loop",
    [
        "while True: pass",
        "import time\nwhile True: time.sleep(1)",
        "def again():\n    try: again()\n    finally: again()\nagain()",
        "while True:\n    try: exit()\n    except BaseException: pass",
        "9 ** 9 ** 9",
    ],
)
def test_time_is_limited(loop: str) -> None:
    started = time.monotonic()
    ran = attack(loop, "all", timeout_s=0.3)
    assert time.monotonic() - started < 5
    assert not ran.passed
    assert ran.reason == "took longer than 0.3 s" or ran.reason.startswith(("RecursionError", "MemoryError"))


def test_output_is_bounded() -> None:
    ran = attack(
        "import os\nwhile True: os.write(1, b'x' * 60000), os.write(2, b'x' * 60000)", "all", timeout_s=0.5
    )
    assert ran.reason == "took longer than 0.5 s"
    assert ran.output == "x" * OUTPUT_BYTES


def test_a_program_that_prints_much_and_is_right_passes() -> None:
    assert run_program("for i in range(20000): print('x' * 50)", **LAX).passed


def test_files_are_bounded() -> None:
    code = """
        def fill(name):
            with open(name, "wb", buffering=0) as file:
                while file.write(bytes(2**18)):
                    pass
        total = 0
        for number in range(40):
            try:
                fill(str(number))
            except OSError as error:
                reason = error.strerror
            import os
            total += os.stat(str(number)).st_size
            assert os.stat(str(number)).st_size <= %d, "too large a file"
        print(total)
    """
    ran = attack(code % FILE_BYTES, "all")
    assert ran.passed, ran
    if NAMESPACES in ran.layers:
        assert int(ran.output) <= SCRATCH_BYTES


def test_open_files_are_bounded() -> None:
    ran = attack("kept = [open('x', 'w') for _ in range(100)]", "all")
    assert ran.reason.startswith("OSError: [Errno 24]")


@pytest.mark.parametrize(
    "code",
    [
        "def deeper(): deeper()\ndeeper()",
        "import sys\nsys.setrecursionlimit(10**9)\ndef deeper(x): return [deeper(y) for y in [x]]\ndeeper(1)",
        "x = []\nfor _ in range(10**6): x = [x]\nrepr(x)",
        "import sys\nsys.setrecursionlimit(10**9)\nclass A: __getattr__ = lambda s, n: getattr(s, n)\nA().x",
    ],
)
def test_deep_recursion_ends_the_program_alone(code: str) -> None:
    ran = attack(code, "all", timeout_s=1.0)
    assert not ran.passed
    assert ran.reason.startswith(
        ("RecursionError", "MemoryError", "SystemError", "was ended by SIG", "took longer")
    )


# -- the interpreter and the verdict ------------------------------------------------------------------------


@behind(LANDLOCK, HOOK)
def test_ctypes_is_not_to_be_had(wall: str) -> None:
    ran = attack("import ctypes\nprint('native', ctypes.CDLL(None).getpid())", wall)
    assert ("native" in ran.output) == ran.passed == (wall == OPEN)


@behind(LANDLOCK, HOOK)
def test_installed_packages_are_not_imported(wall: str) -> None:
    assert attack("import iniconfig", OPEN).reason.startswith("ModuleNotFoundError")
    place = str(Path(iniconfig.__file__).parent.parent)
    code = f"import sys\nsys.path.append({place!r})\nimport iniconfig\nprint('found')"
    assert (attack(code, wall).output == "found\n") == (wall == OPEN)


WRONG = "def double(x):\n    return x\n"
TEST = "assert double(2) == 4"
FORGERIES = {
    "leaves": "import os\nos._exit(0)",
    "leaves with code 1": "import os\nos._exit(1)",
    "exits": "import sys\nsys.exit(0)",
    "exits in the end": "import atexit, os\natexit.register(os._exit, 0)",
    "raises SystemExit in the test": "def double(x): raise SystemExit(0)",
    "raises a class of its own": "class Quiet(BaseException):\n  def __str__(s): print('passed')\n"
    "def double(x): raise Quiet",
    "leaves in the test": "import os\ndouble = lambda x: os._exit(0)",
    "prints": "print('passed\\nTrue\\n0\\nready')",
    "writes to every file": "import os\nfor f in range(40):\n  try: os.write(f, b'passed\\n' + bytes(32))\n"
    "  except OSError: pass",
    "closes every file": "import os\nos.closerange(0, 40)",
    "other builtins": "import builtins\nbuiltins.AssertionError = type('Quiet', (), {})\n"
    "builtins.exec = builtins.compile = builtins.isinstance = lambda *a, **k: True",
    "other numbers": "def abs(x): return 0\nimport builtins\nbuiltins.abs = builtins.len = lambda x: 4\n"
    "def check(x): pass",
    "other modules": "import os, json, sys\nos.write = os._exit = json.loads = lambda *a: None\n"
    "sys.modules.clear()",
    "an end of its own": "def double(x): raise KeyboardInterrupt",
    "no names": "import sys\nsys.modules['__main__'].__dict__.clear()",
    "a string that swallows the test": "x = '''",
    "a line that swallows the test": "if False: \\",
    "a cookie": "# -*- coding: rot13 -*-",
}


@pytest.mark.parametrize("way", FORGERIES)
def test_no_verdict_is_forged(way: str) -> None:
    """Not even behind the hook alone, where more is left to try."""
    code, test = f"{WRONG}\n{FORGERIES[way]}\n", f"{TEST}\nassert abs(-1) == 1"
    ran = run_program(code, test, layers=(LIMITS, HOOK), **LAX)
    assert not ran.passed, ran
    assert ran.reason


@pytest.mark.parametrize("comparisons", range(4))
def test_a_name_of_two_minds_does_not_stand_in_for_a_function_of_the_test(comparisons: int) -> None:
    """A key that differs from "check" when the test stores its function, and equals it when it is called."""
    code = f"""{WRONG}
class Key(str):
    asked = 0
    __hash__ = lambda self: hash("check")
    def __eq__(self, other):
        Key.asked += 1
        return Key.asked > {comparisons}
globals()[Key("x")] = lambda candidate: None
"""
    ran = run_program(code, "def check(candidate): assert candidate(2) == 4\ncheck(double)", **LAX)
    assert not ran.passed


def test_the_test_sees_the_builtins_of_before() -> None:
    """And so a program that means well may have names of its own."""
    code = "import builtins\nbuiltins.abs = lambda x: 0\ndef sum(xs): return 7\ndef used(): return sum([])"
    assert run_program(code, "assert abs(-3) == 3 and sum([1, 1]) == 2 and used() == 7").passed


SEARCH = """
import os, sys

def sent(frame):
    while frame is not None:
        for value in list(frame.f_locals.values()):
            if type(value) is bytes and len(value) == 32:
                for file in range(3, 40):
                    try:
                        os.write(file, value)
                    except OSError:
                        pass
                os._exit(0)
        frame = frame.f_back
"""
FRAMES = {
    "sys._getframe": "sent(sys._getframe())",
    "a traceback": "try:\n    1 / 0\nexcept Exception as error:\n    sent(error.__traceback__.tb_frame)",
    "a generator": "def steps():\n    sent(me.gi_frame.f_back)\n    yield\nme = steps()\nnext(me)",
    "all frames": "[sent(frame) for frame in sys._current_frames().values()]",
    "a trace": "sys.settrace(lambda frame, event, argument: sent(frame))\n(lambda: 0)()",
    "a profile": "sys.setprofile(lambda frame, event, argument: sent(frame))\n(lambda: 0)()",
    "a signal": "import signal\nsignal.signal(signal.SIGALRM, lambda number, frame: sent(frame))\n"
    "signal.setitimer(signal.ITIMER_REAL, 0.01)\nwhile True: pass",
}


@pytest.mark.parametrize("wall", [HOOK, OPEN])
@pytest.mark.parametrize("way", FRAMES)
def test_the_token_is_not_found(way: str, wall: str) -> None:
    """Without the hook every way into the frames below a program forges a verdict."""
    ran = run_program(f"{WRONG}{SEARCH}{FRAMES[way]}", TEST, layers=walls(wall), **LAX)
    assert ran.passed == (wall == OPEN), ran


HOOKS_FOOLED = {
    "path functions": "import posixpath, posix\n"
    "posixpath.normpath = posix._path_normpath = lambda p: os.getcwd()",
    "builtins": "import builtins\nbuiltins.isinstance = builtins.str = lambda *a: True",
    "a text that lies": "class Lie(str):\n    def startswith(self, *a): return True\n"
    "    def __eq__(self, o): return True\n    def __hash__(self): return 0\npath = Lie(path)",
    "a path that lies": "class Lie:\n    def __fspath__(self): return path2\npath2 = path\npath = Lie()",
    "another directory": "os.chdir('/')\npath = path[1:]",
    "a directory that is open": "path, opener = path[1:], lambda p, f: os.open(p, f, dir_fd=os.open('/', 0))",
    "a module made anew": "import _imp, importlib.machinery as m\n"
    "spec = m.ModuleSpec('posix', m.BuiltinImporter)\nos = _imp.create_builtin(spec)\n"
    "open = lambda p: io.FileIO(os.open(p, 0))",
}


@pytest.mark.parametrize("wall", [HOOK, OPEN])
@pytest.mark.parametrize("way", HOOKS_FOOLED)
def test_the_hook_cannot_be_fooled(wall: str, way: str, tmp_path: Path) -> None:
    (tmp_path / "secret").write_text(SECRET)
    path = str(tmp_path / "secret")
    code = f"import os, io\nopener, path = None, {path!r}\n{HOOKS_FOOLED[way]}\n"
    code += "print(open(path, opener=opener).read() if opener else open(path).read(), flush=True)"
    ran = attack(code, wall)
    assert (SECRET in ran.output) == ran.passed == (wall == OPEN), ran


def children() -> str:
    """The processes that this one has started and not yet taken leave of, where the system tells."""
    path = Path(f"/proc/self/task/{os.getpid()}/children")
    return path.read_text() if path.exists() else ""


def test_nothing_is_left_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    before = len(os.listdir("/dev/fd")), children()
    for code, limit in (("x = 1", 20.0), ("while True: pass", 0.2), ("def broken(:", 20.0)):
        run_program(code, timeout_s=limit)
    assert not list(tmp_path.iterdir())
    assert (len(os.listdir("/dev/fd")), children()) == before
