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
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Literal

_CREATE_RULESET, _ADD_RULE, _RESTRICT_SELF = 444, 445, 446  # system calls, on every processor
_NO_NEW_PRIVILEGES, _SET_SECCOMP, _FILTER = 38, 22, 2  # of prctl
_READ = 1 << 0 | 1 << 2 | 1 << 3  # run a file, read it, list a folder
_FILE_ACCESS = 1 << 0 | 1 << 1 | 1 << 2 | 1 << 14 | 1 << 15  # what a rule of a file may say: also write, cut, ioctl
_RIGHTS = {1: 13, 2: 14, 3: 15, 5: 16}  # bits of access to files that Landlock of a version knows
_SCOPES = 3  # signals and abstract sockets of processes outside
# The kernel's name of the processor, and calls: ioctl; socket, connect, socketpair, sendto, sendmsg, sendmmsg; what is
# refused in any case: ptrace, process_vm_readv and _writev, bpf, keyctl, io_uring_setup, pidfd_getfd, and what changes
# files by their path and Landlock lets pass: truncate, chmod, chown, setxattr, removexattr and their kin.
_EVERYWHERE = (425, 438, 452, 463, 466)
_CALLS: dict[str, tuple[int, int, tuple[int, ...], tuple[int, ...]]] = {
    "x86_64": (
        0xC000003E,
        16,
        (41, 42, 53, 44, 46, 307),
        (101, 310, 311, 321, 250, 76, 90, 268, 92, 94, 260, 188, 189, 197, 198),
    ),
    "aarch64": (0xC00000B7, 29, (198, 203, 199, 206, 211, 269), (117, 270, 271, 280, 219, 45, 53, 54, 5, 6, 14, 15)),
}
_TYPING = (0x5412, 0x541C)  # TIOCSTI, TIOCLINUX: ioctls that type into the terminal, for the shell behind this process
_ANY_BIT, _SOCKET_TYPE, _FASTOPEN = (1 << 32) - 1, 0xF, 0x20000000
_INTERNET, _STREAM, _TCP = (2, 10), (1,), (0, 6)  # families of sockets, a type, protocols
_Instruction = tuple[int, int, int, int]
_REFUSE, _ALLOW = (0x06, 0, 0, 0x00050001), (0x06, 0, 0, 0x7FFF0000)  # with errno 1
OFF = "EFFC_SANDBOX"  # "off" leaves processes unconfined
Network = Literal["none", "listen", "any"]
_SYSTEM = ("/usr", "/lib", "/lib64", "/bin", "/sbin", "/opt", "/nix", "/gnu", "/proc", "/sys", "/run/systemd/resolve")
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
_DEVICES = ("null", "zero", "full", "random", "urandom")


def landlock_version() -> int:
    """Version of Landlock in this kernel; 0 where it has none."""
    if sys.platform != "linux":
        return 0
    return max(0, _system_call(_CREATE_RULESET, None, 0, 1))


def confine_process(readable: Iterable[Path], writable: Iterable[Path], network: Network = "none") -> None:
    """Leave to this process what Python and its libraries read, the files and folders of `readable` and those of
    `writable`, which alone it writes to; nothing is confined where EFFC_SANDBOX is "off".

    network   sockets: none, any, or those of TCP, which listen and connect to nobody
    """
    if sys.platform != "linux" or os.environ.get(OFF) == "off":
        return
    version = landlock_version()
    ctypes.CDLL(None).prctl(_NO_NEW_PRIVILEGES, 1, 0, 0, 0)
    if version:
        read = {*_library_paths(), *(path.resolve() for path in readable)}
        write = {*(Path("/dev", name) for name in _DEVICES), *(path.resolve() for path in writable)}
        _restrict_files(version, read, write)
    _block_syscalls(network)


def _library_paths() -> set[Path]:
    """Paths that Python, its packages and the dynamic loader read."""
    home = Path(os.path.expanduser("~")).resolve()
    personal = {home, *home.parents}
    with suppress(FileNotFoundError):  # the working directory, which an empty entry of PYTHONPATH stands for
        personal.add(Path.cwd())
    packages = {Path(path).resolve() for path in sys.path if path} - personal
    linked = {target for folder in packages for target in _link_targets(folder)} - personal
    libraries = {Path(path).resolve() for path in os.environ.get("LD_LIBRARY_PATH", "").split(":") if path} - personal
    python = [sys.prefix, sys.base_prefix, str(Path(__file__).resolve().parents[2])]
    system = [*_SYSTEM, *(f"/etc/{name}" for name in _ETC)]
    return (packages | linked | libraries | {Path(path).resolve() for path in (*python, *system)}) - {Path("/")}


def _link_targets(folder: Path) -> Iterator[Path]:
    """Folders and files that installers linked into a folder of `sys.path`, as packages or file by file."""
    with suppress(OSError):
        for name in os.listdir(folder):
            if (folder / name).is_symlink():
                yield (folder / name).resolve()
            for file in (folder / name / "__init__.py", folder / name / "METADATA"):
                if file.is_symlink():
                    yield file.resolve().parents[1]


def _restrict_files(landlock_abi: int, readable: Iterable[Path], writable: Iterable[Path]) -> None:
    rights = (1 << max(bits for since, bits in _RIGHTS.items() if since <= landlock_abi)) - 1
    attributes = struct.pack("<QQQ", rights, 0, _SCOPES if landlock_abi >= 6 else 0)
    size = 24 if landlock_abi >= 6 else 8
    ruleset = _raise_on_error(_system_call(_CREATE_RULESET, attributes, size, 0))
    for paths, access in ((readable, _READ), (writable, rights)):
        for path in paths:
            with suppress(OSError):  # it does not exist
                _allow_beneath(ruleset, path, access & rights)
    _raise_on_error(_system_call(_RESTRICT_SELF, ruleset, 0))
    os.close(ruleset)


def _allow_beneath(ruleset_fd: int, path: Path, access_flags: int) -> None:
    """Allow access to what lies at or below a path; one that is a link allows nothing."""
    beneath = os.open(path, os.O_PATH | os.O_CLOEXEC | os.O_NOFOLLOW)
    try:
        access_flags &= -1 if os.path.isdir(path) else _FILE_ACCESS
        _system_call(_ADD_RULE, ruleset_fd, 1, struct.pack("<Qi", access_flags, beneath), 0)
    finally:
        os.close(beneath)


def _block_syscalls(network: Network) -> None:
    """Have the kernel refuse ways to reach other processes and files around Landlock, and new sockets but for those
    that `network` is of, with EPERM."""
    if platform.machine() not in _CALLS:
        return
    architecture, ioctl, (socket, connect, socketpair, sendto, sendmsg, sendmmsg), denied = _CALLS[platform.machine()]
    socket_calls = {"none": (socket,), "listen": (connect, sendmmsg), "any": ()}[network]
    instructions = _instructions_to_refuse_unless(4, _ANY_BIT, (architecture,))
    instructions += _instructions_to_refuse_unless(0, 1 << 30, (0,))  # x86's calls of 32-bit pointers
    instructions += _instructions_to_refuse_if(0, (*_EVERYWHERE, *denied, *socket_calls))
    arguments = [(ioctl, _instructions_to_refuse_if(24, _TYPING))]
    if network != "any":  # a pair of datagram sockets can be connected again
        arguments += [(socketpair, _instructions_to_refuse_unless(24, _SOCKET_TYPE, _STREAM))]
    if network == "listen":
        arguments += [(socket, _instructions_to_refuse_unless(16, _ANY_BIT, _INTERNET))]
        arguments += [(socket, _instructions_to_refuse_unless(24, _SOCKET_TYPE, _STREAM))]
        arguments += [(socket, _instructions_to_refuse_unless(32, _ANY_BIT, _TCP))]
        arguments += [
            (sendto, _instructions_to_refuse_unless(40, _FASTOPEN, (0,))),
            (sendmsg, _instructions_to_refuse_unless(32, _FASTOPEN, (0,))),
        ]
    for call, conditions in arguments:
        instructions += [_load_word_instruction(0), (0x15, 0, len(conditions), call), *conditions]
    instructions += [_ALLOW]
    program = ctypes.create_string_buffer(b"".join(struct.pack("<HBBI", *instruction) for instruction in instructions))
    head = struct.pack("@HxxxxxxP", len(instructions), ctypes.addressof(program))
    _raise_on_error(ctypes.CDLL(None, use_errno=True).prctl(_SET_SECCOMP, _FILTER, head, 0, 0))


def _load_word_instruction(offset: int) -> _Instruction:
    """Load of the number of a call (0), the processor (4) or the lower half of an argument (16, 24, ...)."""
    return 0x20, 0, 0, offset


def _instructions_to_refuse_unless(offset: int, mask: int, values: Sequence[int]) -> list[_Instruction]:
    """Refusal of a call unless the masked word is one of the values."""
    jumps = [(0x15, len(values) - index, 0, value) for index, value in enumerate(values)]
    return [_load_word_instruction(offset), (0x54, 0, 0, mask), *jumps, _REFUSE]


def _instructions_to_refuse_if(offset: int, values: Sequence[int]) -> list[_Instruction]:
    """Refusal of a call where the word is one of the values."""
    jumps = [(0x15, len(values) - index, 0, value) for index, value in enumerate(values)]
    return [_load_word_instruction(offset), *jumps, (0x05, 0, 0, 1), _REFUSE]


def _system_call(syscall_number: int, *arguments: object) -> int:
    library = ctypes.CDLL(None, use_errno=True)
    library.syscall.restype = ctypes.c_long
    return library.syscall(syscall_number, *(ctypes.c_long(a) if isinstance(a, int) else a for a in arguments))


def _raise_on_error(result: int) -> int:
    """Result of a system call. Not by `assert`, which `python -O` leaves out with the call in it."""
    if result < 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    return result
