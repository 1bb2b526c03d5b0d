"""Landlock and seccomp: this process and those that it starts open the files that are listed, and no socket, for good.

Linux 5.13 has Landlock; where the kernel lacks either, or the processor has another table of system calls, that part is
left out. Both hold for threads that begin later, so a process is confined before it starts any.
Source: Linux's uapi headers `landlock.h`, `seccomp.h`, `filter.h`.
"""

import ctypes
import os
import platform
import struct
import sys
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import Literal

_CREATE_RULESET, _ADD_RULE, _RESTRICT_SELF = 444, 445, 446  # system calls, on every processor
_NO_NEW_PRIVILEGES, _SET_SECCOMP, _FILTER = 38, 22, 2  # of prctl
_READ = 1 << 0 | 1 << 2 | 1 << 3  # run a file, read it, list a folder
_FILE_ACCESS = 1 << 0 | 1 << 1 | 1 << 2 | 1 << 14 | 1 << 15  # what a rule of a file may say: also write, cut, ioctl
_RIGHTS = {1: 13, 2: 14, 3: 15, 5: 16}  # bits of access to files that Landlock of a version knows
_SCOPES = 3  # signals and abstract sockets of processes outside
_CONNECT = 1 << 1  # by TCP
# The kernel's name of the processor, and calls: ioctl; socket; what is refused in any case: ptrace, process_vm_readv
# and _writev, bpf, keyctl, io_uring_setup, pidfd_getfd, and what changes files by their path and Landlock lets pass:
# truncate, chmod, chown, setxattr, removexattr and their kin.
_EVERYWHERE = (425, 438, 452, 463, 466)
_CALLS: dict[str, tuple[int, int, int, tuple[int, ...]]] = {
    "x86_64": (0xC000003E, 16, 41, (101, 310, 311, 321, 250, 76, 90, 268, 92, 94, 260, 188, 189, 197, 198)),
    "aarch64": (0xC00000B7, 29, 198, (117, 270, 271, 280, 219, 45, 53, 54, 5, 6, 14, 15)),
}
_TYPING = (0x5412, 0x541C)  # TIOCSTI, TIOCLINUX: ioctls that type into the terminal, for the shell behind this process
OFF = "EFFC_SANDBOX"  # "off" leaves processes unconfined
Network = Literal["none", "listen", "any"]
_SYSTEM = ("/usr", "/lib", "/lib64", "/bin", "/sbin", "/opt", "/nix", "/proc", "/sys", "/run/systemd/resolve")
_ETC: tuple[str, ...] = (
    "ld.so.cache",
    "ld.so.preload",
    "localtime",
    "passwd",
    "group",
    "nsswitch.conf",
    "hosts",
    "resolv.conf",
)
_ETC += ("os-release", "inputrc", "terminfo", "ssl/openssl.cnf", "ssl/certs")
_DEVICES = ("null", "zero", "full", "random", "urandom", "tty", "shm")


def landlock_version() -> int:
    """Version of Landlock in this kernel; 0 where it has none."""
    if sys.platform != "linux":
        return 0
    return max(0, _system_call(_CREATE_RULESET, None, 0, 1))


def confine_process(readable: Iterable[Path], writable: Iterable[Path], network: Network = "none") -> None:
    """Leave to this process what Python and its libraries read, the files and folders of `readable` and those of
    `writable`, which alone it writes to; nothing is confined where EFFC_SANDBOX is "off".

    network   sockets: none, any, or those that listen (UDP and local sockets connect all the same)
    """
    if sys.platform != "linux" or os.environ.get(OFF) == "off":
        return
    version = landlock_version()
    ctypes.CDLL(None).prctl(_NO_NEW_PRIVILEGES, 1, 0, 0, 0)
    if version:
        read = {*_library_paths(), *(path.resolve() for path in readable)}
        write = {*(Path("/dev", name) for name in _DEVICES), *(path.resolve() for path in writable)}
        _restrict_files(version, read, write, _CONNECT if network == "listen" and version >= 4 else 0)
    _refuse_calls(sockets=network != "none")


def _library_paths() -> set[Path]:
    """Paths that Python, its packages and the dynamic loader read."""
    searched = [path for path in (*sys.path, *os.environ.get("LD_LIBRARY_PATH", "").split(":")) if path]
    packages: list[str | Path] = [sys.prefix, sys.base_prefix, Path(__file__).resolve().parents[2], *searched]
    system = [*_SYSTEM, *(f"/etc/{name}" for name in _ETC)]
    return {Path(path).resolve() for path in (*packages, *system)} - {Path("/")}


def _restrict_files(version: int, readable: Iterable[Path], writable: Iterable[Path], network: int) -> None:
    rights = (1 << max(bits for since, bits in _RIGHTS.items() if since <= version)) - 1
    attributes = struct.pack("<QQQ", rights, network, _SCOPES if version >= 6 else 0)
    size = 24 if version >= 6 else 16 if version >= 4 else 8
    ruleset = _raise_on_error(_system_call(_CREATE_RULESET, attributes, size, 0))
    for paths, access in ((readable, _READ), (writable, rights)):
        for path in paths:
            with suppress(OSError):  # it does not exist
                _allow(ruleset, path, access & rights)
    _raise_on_error(_system_call(_RESTRICT_SELF, ruleset, 0))
    os.close(ruleset)


def _allow(ruleset: int, path: Path, access: int) -> None:
    """Allow access to what lies at or below a path; one that is a link allows nothing."""
    beneath = os.open(path, os.O_PATH | os.O_CLOEXEC | os.O_NOFOLLOW)
    try:
        access &= -1 if os.path.isdir(path) else _FILE_ACCESS
        _system_call(_ADD_RULE, ruleset, 1, struct.pack("<Qi", access, beneath), 0)
    finally:
        os.close(beneath)


def _refuse_calls(sockets: bool) -> None:
    """Have the kernel refuse ways to reach other processes and files around Landlock, and new sockets unless they are
    allowed, with EPERM."""
    if platform.machine() not in _CALLS:
        return
    architecture, ioctl, socket, refused = _CALLS[platform.machine()]
    calls = (*_EVERYWHERE, *refused, *(() if sockets else (socket,)))
    load, equal, at_least, end = 0x20, 0x15, 0x35, 0x06
    last = len(calls) + 9  # refuses
    checks = [(load, 0, 0, 4), (equal, 0, last - 2, architecture), (load, 0, 0, 0)]
    checks += [(at_least, last - 4, 0, 1 << 30)]  # x86's calls of 32-bit pointers
    checks += [(equal, last - number, 0, call) for number, call in enumerate(calls, 5)]
    checks += [(equal, 0, 3, ioctl), (load, 0, 0, 24)]  # its second argument
    checks += [(equal, 2 - number, 0, request) for number, request in enumerate(_TYPING)]
    checks += [(end, 0, 0, 0x7FFF0000), (end, 0, 0, 0x00050001)]  # allow; errno 1
    program = ctypes.create_string_buffer(b"".join(struct.pack("<HBBI", *check) for check in checks))
    head = struct.pack("@HxxxxxxP", len(checks), ctypes.addressof(program))
    _raise_on_error(ctypes.CDLL(None, use_errno=True).prctl(_SET_SECCOMP, _FILTER, head, 0, 0))


def _system_call(number: int, *arguments: object) -> int:
    library = ctypes.CDLL(None, use_errno=True)
    library.syscall.restype = ctypes.c_long
    return library.syscall(number, *(ctypes.c_long(a) if isinstance(a, int) else a for a in arguments))


def _raise_on_error(result: int) -> int:
    """Result of a system call. Not by `assert`, which `python -O` leaves out with the call in it."""
    if result < 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    return result
