"""An accelerator for tests, in place of a GPU: a device of torch's own kind, whose operations the CPU computes.

It has memory that is counted and may be bounded (`torch.OutOfMemoryError`), and refuses operands on two devices, as
CUDA does. It shows that tensors are where they should be and what happens when memory ends; of speed and of rounding
it says nothing. Built by torch's own tools, once: needs a C++ compiler.
"""

import os
import sys
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import nn

NAME = "emulated"


@cache
def device() -> Any:
    """Register the device. What is returned has `used()`, `peak()`, `forget()` and `limit(bytes)`."""
    from torch.utils import cpp_extension

    os.environ["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"  # ninja of the environment
    memory = cpp_extension.load("emulated_device", [str(Path(__file__).with_name("device.cpp"))], extra_cflags=["-O0"])
    torch.utils.rename_privateuse1_backend(NAME)
    torch._register_device_module(NAME, _module(memory))
    torch.utils.generate_methods_for_privateuse1_backend()
    nn.Module.to = _to(nn.Module.to)
    return memory


def _to(plain: Any) -> Any:
    """`Module.to` that keeps tied weights tied, as it does between CPU and CUDA; devices of others get new parameters."""

    def to(self: nn.Module, *args: Any, **kwargs: Any) -> nn.Module:
        places: dict[int, list[tuple[nn.Module, str]]] = {}
        held = []  # so that no number is given twice
        for module in self.modules():
            for name, parameter in module._parameters.items():
                if parameter is not None:
                    held.append(parameter)
                    places.setdefault(id(parameter), []).append((module, name))
        plain(self, *args, **kwargs)
        for (first, its), *others in places.values():
            for module, name in others:
                module._parameters[name] = first._parameters[its]
        return self

    return to


def _module(memory: Any) -> ModuleType:
    """What torch asks of `torch.emulated`, as of `torch.cuda`."""
    module = ModuleType(f"torch.{NAME}")
    module.is_available = module.is_initialized = lambda: True
    module.device_count = lambda: 1
    module.current_device = lambda: 0
    module._is_in_bad_fork = lambda: False
    module.manual_seed_all = module.set_rng_state = lambda *_: None  # random numbers come of the CPU's generator
    module.get_rng_state = lambda *_: torch.get_rng_state()
    module.empty_cache = module.synchronize = lambda *_: None
    module.get_amp_supported_dtype = lambda: [torch.float16, torch.bfloat16]
    module.mem_get_info = lambda *_: (memory.left(), memory.whole())
    return module
