"""The walls of the sandbox: what `sandbox.py` starts first, to give up rights and become `sandbox_child.py`.

Rights are given up through ctypes, and with ctypes a program could do whatever the kernel lets it. So it is
run by a second, fresh interpreter that never had it. Rights given up are not given back by starting another
program: that is how Linux keeps a process from getting out by way of it.

Every layer is put up as far as this kernel knows it, and the child is told which were. On systems other than
Linux a plain user has the limits alone. Standard library only, and of that only what starts fast: every
program pays for it.
"""

from __future__ import annotations

import math
import os
import resource
import struct
import sys

TYPE_CHECKING = False  # as in typing, whose import would take longer than all of this
if TYPE_CHECKING:
    import ctypes
    from collections.abc import Callable, Iterable
    from typing import Any

FLAGS = ("-I", "-S", "-B", "-u", "-X", "utf8")  # no environment, no installed packages, no buffers
LIMITS, NAMESPACES, LANDLOCK, SECCOMP = "limits", "namespaces", "landlock", "seccomp"

OPEN_FILES = 32
FILE_BYTES = 2**20  # each
SCRATCH_BYTES = 2**24  # together; held where there are namespaces
NOT_FOR_PROGRAMS = ("site-packages", "dist-packages", "ctypes", "_ctypes")

# Numbers of the calls that Python needs to run, on x86_64 and aarch64 ("-": not there). Sources: the kernel's
# arch/x86/entry/syscalls/syscall_64.tbl and include/uapi/asm-generic/unistd.h. No fork, no exec, no socket,
# no signal, no change of owner, mode or limit, no second thread: what is not listed "does not exist".
SYSCALLS = """
read 0 63, write 1 64, readv 19 65, writev 20 66, pread64 17 67, pwrite64 18 68, lseek 8 62, close 3 57,
open 2 -, openat 257 56, stat 4 -, fstat 5 80, lstat 6 -, newfstatat 262 79, statx 332 291, access 21 -,
faccessat 269 48, faccessat2 439 439, readlink 89 -, readlinkat 267 78, getcwd 79 17, getdents64 217 61,
mkdir 83 -, mkdirat 258 34, rmdir 84 -, unlink 87 -, unlinkat 263 35, rename 82 -, renameat 264 38,
renameat2 316 276, ftruncate 77 46, fcntl 72 25, dup 32 23, dup2 33 -, dup3 292 24, pipe 22 -, pipe2 293 59,
select 23 -, pselect6 270 72, poll 7 -, ppoll 271 73, mmap 9 222, mprotect 10 226, munmap 11 215,
mremap 25 216, madvise 28 233, brk 12 214, futex 202 98, rt_sigreturn 15 139, rt_sigprocmask 14 135,
sigaltstack 131 132, restart_syscall 219 128, arch_prctl 158 -, set_tid_address 218 96,
set_robust_list 273 99, rseq 334 293, getrandom 318 278, getpid 39 172, gettid 186 178, getppid 110 173,
getuid 102 174, geteuid 107 175, getgid 104 176, getegid 108 177, clock_gettime 228 113, clock_getres 229 114,
clock_nanosleep 230 115, nanosleep 35 101, gettimeofday 96 169, time 201 -, times 100 153, getrusage 98 165,
uname 63 160, sysinfo 99 179, sched_yield 24 124, sched_getaffinity 204 123, exit 60 93, exit_group 231 94
"""
EXECVE, IOCTL = {"x86_64": 59, "aarch64": 221}, {"x86_64": 16, "aarch64": 29}
AUDIT_ARCH = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}

# From linux/sched.h, linux/mount.h, linux/prctl.h, linux/seccomp.h, linux/landlock.h, asm/mman.h.
CLONE_NEWNS, CLONE_NEWIPC = 0x00020000, 0x08000000
CLONE_NEWUSER, CLONE_NEWPID, CLONE_NEWNET = 0x10000000, 0x20000000, 0x40000000
MS_NOSUID_NODEV_NOEXEC, MS_REC_PRIVATE = 2 | 4 | 8, 0x4000 | 0x40000
PR_SET_PDEATHSIG, PR_SET_SECCOMP, PR_SET_NO_NEW_PRIVS, SECCOMP_MODE_FILTER = 1, 22, 38, 2
SIGKILL, ENOTTY, ENOSYS = 9, 25, 38
ALLOW, ERROR, KILL = 0x7FFF0000, 0x00050000, 0x80000000
LANDLOCK_CREATE_RULESET, LANDLOCK_ADD_RULE, LANDLOCK_RESTRICT_SELF = 444, 445, 446
FS_EXECUTE, FS_READ_FILE, FS_READ_DIR = 1, 4, 8
FS_OF_SCRATCH = sum(1 << bit for bit in (1, 2, 3, 4, 5, 7, 8, 13, 14))  # make, read, write, move, remove
PATH_ADDRESS, MMAP_READ_WRITE, MMAP_PRIVATE_ANONYMOUS_NOREPLACE = 0x200000, 3, 0x100022


def main(argv: list[str]) -> None:
    """The child's script, its scratch directory, the verdict's pipe, seconds, bytes, layers with commas."""
    script, scratch, pipe, cpu_s, memory_bytes, layers = argv
    wanted = layers.split(",")
    held = [layer for layer in wanted if layer not in (LIMITS, NAMESPACES, LANDLOCK, SECCOMP)]
    words = [sys.executable, *FLAGS, script, scratch, pipe]
    if sys.platform == "linux":
        confine(words, scratch, (math.ceil(float(cpu_s)), int(memory_bytes)), wanted, held)
    os.chdir(scratch)
    limit(math.ceil(float(cpu_s)), int(memory_bytes))
    os.execve(sys.executable, [*words, ",".join([LIMITS, *held])], {})


def limit(cpu_s: int, memory_bytes: int) -> None:
    """What the process may use. Root may have more processes, and macOS keeps no limit of memory."""
    for what, most in (
        (resource.RLIMIT_CPU, cpu_s),
        (resource.RLIMIT_AS, memory_bytes),
        (resource.RLIMIT_FSIZE, FILE_BYTES),
        (resource.RLIMIT_NOFILE, OPEN_FILES),
        (resource.RLIMIT_NPROC, 0),
        (resource.RLIMIT_CORE, 0),
    ):
        hard = resource.getrlimit(what)[1]
        most = most if hard == resource.RLIM_INFINITY else min(most, hard)
        attempt(resource.setrlimit, what, (most, most))


def attempt(action: Callable[..., Any], *arguments: object) -> Any:
    """What the action returns; None where the system refuses it."""
    try:
        return action(*arguments)
    except (OSError, ValueError):
        return None


def confine(
    words: list[str], scratch: str, limits: tuple[int, int], wanted: list[str], held: list[str]
) -> None:
    """Linux: give up what `wanted` names, where this kernel knows it, and become the interpreter of `words`.

    The last word is what stands around it, `held` included.
    """
    files = [*needed_files(), (words[1 + len(FLAGS)], FS_READ_FILE)]
    import ctypes

    libc = ctypes.CDLL(None, use_errno=True)
    around = [LIMITS]
    if NAMESPACES in wanted and leave_namespaces(libc, scratch):
        around.append(NAMESPACES)
    libc.prctl(PR_SET_PDEATHSIG, SIGKILL, 0, 0, 0)
    os.chdir(scratch)
    limit(*limits)
    libc.prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
    if LANDLOCK in wanted and lock_files(libc, scratch, files):
        around.append(LANDLOCK)
    path = fixed_path(libc, os.readlink("/proc/self/exe"))
    if SECCOMP in wanted and filter_calls(libc, path):
        around.append(SECCOMP)
    told = [*map(os.fsencode, words), ",".join([*around, *held]).encode()]
    argv = (ctypes.c_char_p * (len(told) + 1))(*told, None)
    libc.execve(ctypes.c_void_p(path), argv, (ctypes.c_char_p * 1)(None))
    raise OSError(ctypes.get_errno(), "the interpreter could not be started inside the sandbox")


def needed_files() -> list[tuple[str, int]]:
    """Files and directories that Python and its library are, and what may be done with each.

    Called before ctypes is imported: what the process has mapped by then is what the next one will need.
    """
    load_libraries()
    with open("/proc/self/maps") as maps:
        mapped = {line.split(maxsplit=5)[5].strip() for line in maps if "/" in line}
    files = [(path, FS_EXECUTE | FS_READ_FILE) for path in sorted(mapped) if path.startswith("/")]
    files.append(("/etc/ld.so.cache", FS_READ_FILE))
    places = [place for place in sys.path if os.path.isdir(place)]
    for place in places:
        files.append((place, FS_READ_DIR))
        for entry in sorted(os.scandir(place), key=lambda entry: entry.name):
            if entry.path not in places and not entry.name.startswith(NOT_FOR_PROGRAMS):
                files.append((entry.path, FS_READ_FILE | (FS_READ_DIR if entry.is_dir() else 0)))
    return files


def load_libraries() -> None:
    """Of the modules that need a library of the system's, the two that programs do ask for."""
    try:
        import _hashlib  # noqa: F401
        import zlib  # noqa: F401
    except ImportError:
        return


def leave_namespaces(libc: ctypes.CDLL, scratch: str) -> bool:
    """Go on as the first process of an empty world: no network, no other process, a scratch of bounded size.

    Only that process returns; the one that called waits for it and ends as it ended.
    """
    user, group = os.getuid(), os.getgid()
    if libc.unshare(CLONE_NEWUSER | CLONE_NEWNET | CLONE_NEWIPC | CLONE_NEWPID | CLONE_NEWNS):
        return False
    for name, text in (("setgroups", "deny"), ("uid_map", f"1000 {user} 1"), ("gid_map", f"1000 {group} 1")):
        attempt(write_text, f"/proc/self/{name}", text)
    if not libc.mount(None, b"/", None, MS_REC_PRIVATE, None):
        options = f"size={SCRATCH_BYTES},nr_inodes=4096".encode()
        libc.mount(b"scratch", os.fsencode(scratch), b"tmpfs", MS_NOSUID_NODEV_NOEXEC, options)
    libc.prctl(PR_SET_PDEATHSIG, SIGKILL, 0, 0, 0)
    if child := os.fork():
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        os._exit(code if code >= 0 else 128 - code)
    return True


def write_text(path: str, text: str) -> int:
    """Overwrite a file; returns the number of characters."""
    with open(path, "w") as file:
        return file.write(text)


def lock_files(libc: ctypes.CDLL, scratch: str, files: Iterable[tuple[str, int]]) -> bool:
    """Landlock: no file but `files` and those below `scratch`; where it can, no TCP, no signal to others."""
    import ctypes

    version = libc.syscall(LANDLOCK_CREATE_RULESET, None, ctypes.c_size_t(0), 1)
    if version < 1:
        return False
    rights = (1 << 13) - 1 | (version >= 2) << 13 | (version >= 3) << 14 | (version >= 5) << 15
    attributes = struct.pack("=QQQ", rights, 3 if version >= 4 else 0, 3 if version >= 6 else 0)
    size = 24 if version >= 6 else 16 if version >= 4 else 8
    ruleset = libc.syscall(LANDLOCK_CREATE_RULESET, attributes, ctypes.c_size_t(size), 0)
    for path, allowed in [*files, (scratch, FS_OF_SCRATCH & rights)]:
        descriptor = attempt(os.open, path, os.O_PATH | os.O_CLOEXEC)
        if descriptor is not None:
            libc.syscall(LANDLOCK_ADD_RULE, ruleset, 1, struct.pack("=Qi", allowed, descriptor), 0)
            os.close(descriptor)
    return bool(libc.syscall(LANDLOCK_RESTRICT_SELF, ruleset, 0) == 0)


def fixed_path(libc: ctypes.CDLL, path: str) -> int:
    """The address of `path`, where an interpreter that has just been started has no memory."""
    import ctypes

    libc.mmap.restype = ctypes.c_void_p
    flags = MMAP_PRIVATE_ANONYMOUS_NOREPLACE
    address = libc.mmap(ctypes.c_void_p(PATH_ADDRESS), 4096, MMAP_READ_WRITE, flags, -1, ctypes.c_long(0))
    if address != PATH_ADDRESS:
        raise OSError(ctypes.get_errno(), "no memory at the place that the sandbox needs")
    ctypes.memmove(address, os.fsencode(path) + b"\0", len(os.fsencode(path)) + 1)
    return PATH_ADDRESS


def filter_calls(libc: ctypes.CDLL, path: int) -> bool:
    """seccomp: no system call but SYSCALLS, and one execve, that of the path at this address.

    The filter is a program for the kernel's classic BPF machine, of instructions (code, jump if true, jump if
    false, operand). It cannot read memory, only compare the address; no other process than this has it.
    """
    import ctypes

    machine = os.uname().machine
    if machine not in AUDIT_ARCH or sys.maxsize < 2**32:
        return False
    column = list(AUDIT_ARCH).index(machine) + 1
    numbers = [call.split()[column] for call in SYSCALLS.replace("\n", " ").split(",")]
    allowed = [int(number) for number in numbers if number != "-"]
    load, equal, give = 0x20, 0x15, 0x06
    # Offsets in struct seccomp_data: 0 number, 4 architecture, 16 and 20 the halves of the first argument.
    code = [(load, 0, 0, 4), (equal, 1, 0, AUDIT_ARCH[machine]), (give, 0, 0, KILL), (load, 0, 0, 0)]
    # Of ioctl, Python takes this error for "no terminal", and any other to heart.
    code += [(equal, 0, 1, IOCTL[machine]), (give, 0, 0, ERROR | ENOTTY)]
    code += [(equal, len(allowed) - place + 5, 0, number) for place, number in enumerate(allowed)]
    code += [(equal, 0, 4, EXECVE[machine]), (load, 0, 0, 16), (equal, 0, 2, path)]
    code += [(load, 0, 0, 20), (equal, 1, 0, path >> 32), (give, 0, 0, ERROR | ENOSYS), (give, 0, 0, ALLOW)]
    program = ctypes.create_string_buffer(b"".join(struct.pack("=HBBI", *each) for each in code))
    header = struct.pack("@HP", len(code), ctypes.addressof(program))
    return bool(libc.prctl(PR_SET_SECCOMP, SECCOMP_MODE_FILTER, header, 0, 0) == 0)


if __name__ == "__main__":
    main(sys.argv[1:])
