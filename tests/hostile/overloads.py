"""Run by path: calls operators that a stored program may call with random arguments, and says what each came to.

`python overloads.py SEED TRIES OVERLOAD...`: an overload is `add.Tensor`. Arguments that pass the check of shapes are given
to the operator itself, each tensor's bytes ending where a page begins that can't be read: an operator that reads or
writes behind a tensor ends the process. A line is written before each call, so that the last one is to blame.
"""

import ctypes
import mmap
import os
import random
import resource
import signal
import sys

import torch
from effc.compiler.artifacts.exported_shapes import call_on_fake_tensors, quiet_fake_tensor_mode, with_sizes_as_numbers
from torch.utils import _pytree as pytree

PAGE, MOST = mmap.PAGESIZE, 1 << 20  # MOST: numbers of a result
SECONDS = 5  # for all tries of one overload
DTYPES = [torch.float32] * 3 + [torch.int64, torch.bool, torch.bfloat16, torch.float64, torch.int32, torch.uint8]
SIZES = (0, 1, 1, 2, 2, 3, 4, 4, 8, 33)
NUMBERS = (0, 1, 1, 2, 2, 3, 4, -1, -1, -2, 5, 8)
EXTREMES = (100, -100, 2**31 - 1, 2**40, -(2**63), 2**63 - 1)
TEXTS = ("none", "tanh", "mean", "sum", "reflect", "replicate", "constant", "trunc", "floor", "ij->ji", "bij,bjk->bik")
SCALARS = {
    "bool": (True, False),
    "float": (0.0, 1.0, 0.5, -1.0, 1e30, float("inf"), float("nan")),
    "number": (0, 1, 2, -1, 0.5, 2**40, 1e30, float("nan"), True),
    "ScalarType": (*DTYPES, torch.complex64, 1, 99, 1 << 20),
    "Layout": (torch.strided, torch.strided, 3, 99),
    "MemoryFormat": (torch.contiguous_format, torch.preserve_format, torch.channels_last, 99),
    "Device": (torch.device("cpu"),),
    "str": TEXTS,
}
_libc = ctypes.CDLL(None, use_errno=True)


def fenced(tensor: torch.Tensor, fences: list[mmap.mmap]) -> torch.Tensor:
    """The tensor in memory of its own that ends where a page begins that can't be read."""
    size = tensor.numel() * tensor.itemsize
    if not size:
        return tensor
    end = (size + PAGE - 1) // PAGE * PAGE
    fence = mmap.mmap(-1, end + PAGE)
    address = ctypes.addressof(ctypes.c_char.from_buffer(fence))
    assert _libc.mprotect(ctypes.c_void_p(address + end), PAGE, 0) == 0, "no page can be protected"
    fences.append(fence)
    copy = torch.frombuffer(fence, dtype=torch.uint8, count=size, offset=end - size)
    return copy.view(tensor.dtype).view(tensor.shape).copy_(tensor)


class Arguments:
    """Random arguments of a schema; shapes of later tensors are like the first one's more often than not."""

    def __init__(self, seed: int):
        self.random, self.fences = random.Random(seed), []
        self.first: torch.Tensor | None = None

    def of(self, schema) -> tuple[list, dict]:
        args, kwargs, open_ = [], {}, True
        for argument in schema.arguments:
            if argument.has_default_value() and self.random.random() < 0.3:
                open_ = False  # what follows is given by name alone
            elif argument.kwarg_only:
                kwargs[argument.name] = self.value(str(argument.real_type))
            elif open_:
                args.append(self.value(str(argument.real_type)))
        return args, kwargs

    def value(self, kind: str):
        if kind.startswith("Optional["):
            return None if self.random.random() < 0.4 else self.value(kind[9:-1])
        if kind.startswith("List["):
            return [self.value(kind[5:-1]) for _ in range(self.random.choice((0, 1, 1, 2, 2, 3, 4)))]
        if kind == "Tensor":
            return fenced(self.tensor(), self.fences)
        if kind in ("int", "SymInt"):
            return self.random.choice(NUMBERS if self.random.random() < 0.85 else EXTREMES)
        return self.random.choice(SCALARS[kind])

    def tensor(self) -> torch.Tensor:
        shape = [self.random.choice(SIZES) for _ in range(self.random.choice((0, 1, 1, 2, 2, 3, 3, 4, 4, 5)))]
        dtype = self.random.choice(DTYPES)
        if self.first is not None and self.random.random() < 0.6:
            shape, dtype = list(self.first.shape), self.random.choice((self.first.dtype, dtype))
            if shape and self.random.random() < 0.5:
                shape[self.random.randrange(len(shape))] = self.random.choice(SIZES)
            shape = shape[self.random.choice((0, 0, 0, 1, -1)) :]
        if dtype.is_floating_point:
            made = torch.randn(shape).to(dtype)
        elif self.random.random() < 0.7 or dtype == torch.bool:
            made = torch.randint(0, 4, shape).to(dtype)
        else:
            made = torch.randint(-(2**40), 2**40, shape).to(dtype)
        self.first = made if self.first is None else self.first
        return made


def trial(overload, seed: int, say) -> str:
    arguments = Arguments(seed)
    args, kwargs = arguments.of(overload._schema)
    try:
        with quiet_fake_tensor_mode():
            plain = pytree.tree_map_only(torch.Tensor, with_sizes_as_numbers, (args, kwargs))
            result = call_on_fake_tensors(overload, tuple(plain[0]), plain[1])
    except Exception:
        return "refused"
    numbers = [x.numel() for x in pytree.tree_leaves(result) if isinstance(x, torch.Tensor)]
    if any(not isinstance(n, int) or n > MOST for n in numbers):
        return "large"
    shapes = pytree.tree_map_only(torch.Tensor, lambda x: f"{x.dtype} {list(x.shape)}", (args, kwargs))
    say(f"call {overload} {seed} {shapes}")
    try:
        with torch.no_grad():
            overload(*args, **kwargs)
    except Exception:
        return "raised"
    return "ran"


def main(seed: str, tries: str, *names: str) -> None:
    torch.set_num_threads(1)
    resource.setrlimit(resource.RLIMIT_AS, (8 << 30, 8 << 30))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)  # what operators warn of
    for number, name in enumerate(names):
        packet, _, overload = name.partition(".")
        signal.alarm(SECONDS)
        print(f"begin {name}", flush=True)
        for each in range(int(tries)):
            number_of_try = (int(seed) + 7919 * number + each) & 0xFFFFFFFF
            torch.manual_seed(number_of_try)
            came_to = trial(
                getattr(getattr(torch.ops.aten, packet), overload), number_of_try, lambda t: print(t, flush=True)
            )
            print(f"{came_to} {name}", flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
