"""The kernels' library of another processor, each call of which runs on an emulator of it.

The library is built by a cross compiler, `calls.cc` loads it under qemu. Memory that a call's arguments point to is
sent there and comes back, so that Python's tests of the kernels run unchanged over it.
"""

import ctypes
import fcntl
import gc
import shutil
import struct
import subprocess
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from effc.kernels import levels, native
from effc.kernels.engine_adapters import LowRank
from effc.kernels.engine_steps import Plan

ROOT = Path(__file__).resolve().parents[3]
COMPILER, EMULATOR, SYSROOT = "aarch64-linux-gnu-g++", "qemu-aarch64", "/usr/aarch64-linux-gnu"
HANDLES = ("add_adapter", "remove_adapter", "forget", "length", "source", "cancel", "profile", "free", "run", "encode")


def missing_program() -> str:
    """The first program that the emulated library needs and that is not here; "" where all are."""
    return next((p for p in (COMPILER, EMULATOR, "cmake") if not shutil.which(p)), "")


def build(folder: Path, levels: str = "neon") -> Path:
    """The library for ARM, and beside it the program that calls it; what the folder has is used."""
    target = ["-DCMAKE_SYSTEM_NAME=Linux", "-DCMAKE_SYSTEM_PROCESSOR=aarch64", f"-DCMAKE_CXX_COMPILER={COMPILER}"]
    calls = [COMPILER, "-std=c++17", "-O2", Path(__file__).with_name("calls.cc"), "-ldl", "-o", folder / "calls"]
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "lock", "w") as lock:  # of the processes that run tests, one builds
        fcntl.flock(lock, fcntl.LOCK_EX)
        for command in (
            ["cmake", "-S", ROOT, "-B", folder, *target, f"-DEFFC_LEVELS={levels}"],
            ["cmake", "--build", folder, "-j", "2"],
            calls,
        ):
            done = subprocess.run([str(word) for word in command], capture_output=True, text=True)
            assert done.returncode == 0, (done.stdout + done.stderr)[-3000:]
    return folder / "libeffc_kernels.so"


class EmulatedLibrary:
    """A library as ctypes shows one: an attribute for each function that it exports."""

    def __init__(self, library: Path, processor: str = "max"):
        command = [EMULATOR, "-cpu", processor, "-L", SYSROOT, library.with_name("calls"), library]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        self.lock = threading.Lock()

    def __getattr__(self, name: str) -> "EmulatedFunction":
        if not name.startswith("effc_"):
            raise AttributeError(name)
        function = EmulatedFunction(self, name)
        setattr(self, name, function)
        return function

    def close(self) -> None:
        self.process.communicate(timeout=60)


@contextmanager
def kernels_of(library: EmulatedLibrary) -> Iterator[None]:
    """Kernels run in this library within a block; which level is for `at_forced_level` to say."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(levels, "load_library", lambda: library)
        native.library_function.cache_clear()
        try:
            yield
        finally:
            native.library_function.cache_clear()


class EmulatedFunction:
    def __init__(self, library: EmulatedLibrary, name: str):
        self.library, self.name = library, name
        self.argtypes: tuple = ()
        self.restype: type = ctypes.c_int32

    def __call__(self, *arguments) -> int:
        engine = self.name.removeprefix("effc_engine_")
        with self.library.lock:
            request = _Request(arguments if engine in ("run", "encode") else ())
            types = self.argtypes or (ctypes.c_int32,) * len(arguments)
            for position, (argument, kind) in enumerate(zip(arguments, types, strict=True)):
                is_handle = engine in HANDLES and position == 0
                request.add(int(getattr(argument, "value", argument)) if is_handle else argument, kind, is_handle)
            return request.answer(self.library.process, self.name, keep=engine in ("create", "add_adapter"))


class _Request:
    """One call: memory by where it lies here, pointers within it, and arguments."""

    def __init__(self, token_arguments: tuple = ()):
        self.starts: list[tuple[int, int]] = []  # address and bytes
        self.pointers: list[tuple[int, int, int, int]] = []
        self.arguments = b""
        self.count = 0
        self.alive: list = []  # what is pointed to
        self.integers = [*self._token_memory(token_arguments)]
        self.storages: list[tuple[int, int]] = []

    @staticmethod
    def _token_memory(arguments: tuple) -> Iterator[tuple[int, int]]:
        """Memory of an engine's lists of integers, which are no tensors: tokens, sequences, outputs, adapters."""
        if arguments:
            yield from ((arguments[i], 8 * arguments[1]) for i in (2, 3) if arguments[1])
        if len(arguments) > 5 and arguments[4]:
            yield arguments[5], 8 * arguments[4]
        if len(arguments) > 6 and arguments[6]:
            yield arguments[6], 4 * arguments[1]

    def add(self, argument, kind: type, is_handle: bool = False) -> None:
        self.count += 1
        if kind is ctypes.c_float:
            self.arguments += struct.pack("<If", 1, argument)
        elif kind is not ctypes.c_void_p or is_handle or not argument:
            self.arguments += struct.pack("<Iq", 0, int(argument or 0))
        else:
            memory = self._memory_of_object(argument) if not isinstance(argument, int) else self._memory_of(argument)
            self.arguments += struct.pack("<IIQ", 2, *memory)

    def _memory_of_object(self, argument) -> tuple[int, int]:
        """Memory of a ctypes value, or of one passed by reference."""
        value = getattr(argument, "_obj", argument)
        self.alive.append(value)
        place = self._memory(ctypes.addressof(value), ctypes.sizeof(value))
        if isinstance(value, Plan):
            self._add_plan(value, place[0])
        if isinstance(value, ctypes.Array) and value._type_ is LowRank:
            for i, update in enumerate(value):
                for name in ("down", "bias", "up"):
                    if address := getattr(update, name):
                        offset = i * ctypes.sizeof(LowRank) + getattr(LowRank, name).offset
                        self.pointers.append((place[0], offset, *self._memory_of(address)))
        return place

    def _add_plan(self, plan: Plan, memory: int) -> None:
        counts = {"steps": "step_count", "widths": "register_count", "weights": "weight_count", "slots": "slot_count"}
        for name, count in counts.items():
            field, length = getattr(plan, name), getattr(plan, count)
            if not length:
                continue
            bytes = ctypes.sizeof(field._type_) * length
            target = self._memory(ctypes.addressof(field.contents), bytes)
            self.pointers.append((memory, getattr(Plan, name).offset, *target))
            for i in range(length if name == "weights" else 0):
                self.pointers.append((target[0], i * ctypes.sizeof(field._type_), *self._memory_of(field[i].at)))
        if plan.encoder:
            target = self._memory(ctypes.addressof(plan.encoder.contents), ctypes.sizeof(Plan))
            self.pointers.append((memory, Plan.encoder.offset, *target))
            self._add_plan(plan.encoder.contents, target[0])

    def _memory(self, start: int, bytes: int) -> tuple[int, int]:
        if (start, bytes) not in self.starts:
            self.starts.append((start, bytes))
        return self.starts.index((start, bytes)), 0

    def _memory_of(self, address: int) -> tuple[int, int]:
        """The tensor's storage that an address lies in, and where in it."""
        self.storages = self.storages or [*self.integers, *_storages()]
        for start, bytes in self.storages:
            if start <= address < start + bytes:
                return self._memory(start, bytes)[0], address - start
        raise AssertionError(f"no tensor has the memory at {address:#x}")

    def answer(self, process: subprocess.Popen, name: str, keep: bool) -> int:
        sent, received = process.stdin, process.stdout
        assert sent and received
        sent.write(struct.pack("<I", len(name)) + name.encode() + struct.pack("<II", keep, len(self.starts)))
        before = [ctypes.string_at(start, bytes) for start, bytes in self.starts]
        for content in before:
            sent.write(struct.pack("<Q", len(content)) + content)
        sent.write(struct.pack("<I", len(self.pointers)))
        for pointer in self.pointers:
            sent.write(struct.pack("<IQIQ", *pointer))
        sent.write(struct.pack("<I", self.count) + self.arguments)
        sent.flush()
        status = struct.unpack("<i", _exactly(received, 4))[0]
        for (start, bytes), content in zip(self.starts, before, strict=True):
            after = _exactly(received, bytes)
            if after != content and (not keep or (start, bytes) == self.starts[-1]):  # a plan has pointers from there
                ctypes.memmove(start, after, bytes)
        return status


def _exactly(stream, count: int) -> bytes:
    whole = stream.read(count)
    assert len(whole) == count, "the emulated process ended"
    return whole


def _storages() -> Iterator[tuple[int, int]]:
    kinds = {torch.Tensor, torch.nn.Parameter}
    for tensor in [thing for thing in gc.get_objects() if type(thing) in kinds]:
        if tensor.device.type == "cpu":
            storage = tensor.untyped_storage()
            yield storage.data_ptr(), storage.nbytes()


if __name__ == "__main__":
    print(f"{missing_program()} is not installed" if missing_program() else build(ROOT / "build" / "aarch64"))
