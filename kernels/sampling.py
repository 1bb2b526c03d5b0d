"""One token out of a row of logits: greedy, or drawn after the filters of transformers, in their order."""

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from . import levels, native
from .native import KernelError

_NOT_FINITE = 13


@dataclass
class Sampler:
    """Settings, and the state of a generator: the same seed and calls give the same tokens.

    temperature          0 takes the most likely token
    top_k                0 keeps all
    top_p                1 keeps all
    repetition_penalty   logits of tokens that were seen are divided by it where positive, else multiplied
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    repetition_penalty: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        infinite = float("inf")
        bounds = {
            "temperature": 0 <= self.temperature < infinite,
            "top_k": 0 <= self.top_k < 2**63,
            "top_p": 0 < self.top_p <= 1,
            "repetition_penalty": 0 < self.repetition_penalty < infinite,
        }
        for name, fine in bounds.items():
            if not fine:
                raise KernelError(f"sampling with `{name}` {getattr(self, name)} has no meaning")
        self._state = ctypes.c_uint64(self.seed)

    def sample_next_token(self, logits: Tensor, previous_tokens: Tensor | Sequence[int] | None = None) -> int:
        """The next token.

        logits   [vocabulary] float32
        previous_tokens   [n]: the sequence so far; only the penalty looks at it
        """
        logits = logits.detach().to(torch.float32).contiguous()
        penalised = previous_tokens is not None and self.repetition_penalty != 1
        penalised_ids = torch.as_tensor(previous_tokens if penalised else [], dtype=torch.int64).contiguous()
        token = ctypes.c_int64()
        values = logits.data_ptr(), logits.numel(), penalised_ids.data_ptr(), penalised_ids.numel()
        rules = self.temperature, self.top_k, self.top_p, self.repetition_penalty
        results = ctypes.byref(self._state), ctypes.byref(token)
        status = native.library_function("sample")(levels.active_level_code(), *values, *rules, *results)
        if status == _NOT_FINITE:
            raise KernelError("no token can be chosen: a logit is NaN or infinite")
        if status:
            raise native.error_of_status(status, "the logits")
        return token.value
