"""The inside of the sandbox: runs one program behind the walls that `sandbox_walls.py` has put up.

The last wall is put up here: an audit hook (PEP 578), the portable one. Standard library only, and of that
only what starts fast: every program pays for it. Nothing here may import the rest of the package.
"""

from __future__ import annotations

import builtins
import os
import posix
import sys
import types

TYPE_CHECKING = False  # as in typing, whose import would take longer than all of this
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

HOOK = "hook"
TOKEN_BYTES, LENGTH_BYTES = 32, 8
REASON_CHARS = 500
PROGRAM = "program"  # its module's name: what stands below `if __name__ == "__main__"` is not part of a test


def run(scratch: str, pipe: int, held: list[str]) -> None:
    """Run the program that standard input brings, tell the verdict, and end without another word.

    The token that says "passed" is a local of this function alone. The program's way to it would be a frame,
    and the hook gives it none; the test, run last, sees the program's names and the builtins of before.
    """
    write, leave, execute, kind, text = os.write, os._exit, builtins.exec, type, str
    with open(0, "rb", closefd=False) as file:
        token, length, texts = file.read(TOKEN_BYTES), int.from_bytes(file.read(LENGTH_BYTES)), file.read()
    write(pipe, f"{','.join(held)}\n".encode())
    pristine = dict(vars(builtins))
    module = types.ModuleType(PROGRAM)
    names = vars(module)
    sys.modules["__main__"] = sys.modules[PROGRAM] = module
    if HOOK in held:
        blunt()
        sys.addaudithook(guard(scratch, [place for place in sys.path if place != scratch]))
    try:
        # Both are compiled before one of them runs.
        program, test = (
            compile(source.decode(errors="surrogatepass"), name, "exec", dont_inherit=True)
            for source, name in ((texts[:length], "program"), (texts[length:], "test"))
        )
        execute(program, names)
        # A key that is no plain text may equal a name of the test at one time and not at another.
        seen = {name: names[name] for name in names if kind(name) is text and name not in pristine}
        execute(test, seen | {"__builtins__": pristine})
    except BaseException as error:  # whatever it is, they did not reach their end
        try:
            write(pipe, f"{type(error).__name__}: {error}"[:REASON_CHARS].encode(errors="replace"))
        finally:
            leave(1)
    write(pipe, token)
    leave(0)


def blunt() -> None:
    """Take away what raises no audit event: special files, and handlers, which are handed frames."""
    import _signal

    for name in ("mkfifo", "mknod", "chroot"):
        for module in (posix, os):
            if hasattr(module, name):
                delattr(module, name)
    for name in ("signal", "setitimer", "alarm"):
        setattr(_signal, name, None)


FREE = """
compile exec marshal.loads builtins.id builtins.input builtins.input/result function.__new__ code.__new__
object.__setattr__ object.__delattr__ array.__new__ pickle.find_class sys._getframemodulename sys.excepthook
sys.unraisablehook time.sleep glob.glob glob.glob/2 os.walk os.fwalk os.putenv os.unsetenv pathlib.Path.glob
pathlib.Path.rglob tempfile.mkstemp tempfile.mkdtemp shutil.copyfile shutil.copytree shutil.rmtree shutil.move
"""
LISTS, WRITES = ("os.listdir", "os.scandir"), ("os.mkdir", "os.remove", "os.rmdir", "os.truncate")
# Modules that reach below the interpreter, or make another without hooks.
UNKNOWN = "ctypes _ctypes _testcapi _testinternalcapi _testlimitedcapi _xxsubinterpreters _interpreters"


def guard(scratch: str, library: list[str]) -> Callable[[str, tuple[Any, ...]], None]:
    """An audit hook (PEP 578) that refuses every event but those of harmless work: the portable net.

    All that it uses is bound here, out of the program's reach: a program may put its own things in the place
    of any module's and any builtin.
    """
    free, unknown, writes, lists = frozenset(FREE.split()), frozenset(UNKNOWN.split()), WRITES, LISTS
    text, data, number, kind = str, bytes, int, isinstance
    normal, ends_with, starts_with, decode = posix._path_normpath, str.endswith, str.startswith, bytes.decode
    below, beside = scratch + "/", tuple(place + "/" for place in library)
    packages, refused, missing, wrong, plain = (
        "-packages/",
        PermissionError,
        ImportError,
        ValueError,
        str.__str__,
    )

    def place(path: Any) -> str:
        """The path as text, whole and with a slash behind it; of a file that is open, its directory's."""
        if kind(path, number) or path is None:
            return below
        name = decode(path, "utf-8", "surrogateescape") if kind(path, data) else path
        if not kind(name, text):
            return ""
        return normal(name if starts_with(name, "/") else below + name) + "/"

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        if event in free:
            return
        if event == "open":
            path, mode, _ = arguments
            where = place(path)
            reads = mode == "r" or mode == "rb"
            if starts_with(where, below) or (reads and starts_with(where, beside) and packages not in where):
                return
        elif event in lists:
            if starts_with(place(arguments[0]), (below, *beside)):
                return
        elif event in writes:
            if starts_with(place(arguments[0]), below) and place(arguments[0]) != below:
                return
        elif event == "os.rename":
            if starts_with(place(arguments[0]), below) and starts_with(place(arguments[1]), below):
                return
        elif event == "import":
            if plain(arguments[0]) not in unknown:
                return
            raise missing("not available here")
        elif event == "object.__getattr__":
            if not ends_with(arguments[1], "_frame"):
                return
        elif event == "sys._getframe":
            raise wrong("no frames here")  # which the library takes for "not to be had"
        raise refused(f"{event} is not allowed here")

    return hook


if __name__ == "__main__":
    run(sys.argv[1], int(sys.argv[2]), sys.argv[3].split(","))
