"""The selective scan of Mamba-1 for one position, its state moved on in place."""

import torch

from .kernel import Kernel
from .selective_scan import SelectiveScan
from .sequences import as_second, at, fit, one_type, plain, rows, rows_of, run


class SelectiveStep(Kernel):
    """As `selective_scan` with x, dt, z [b, c], B, C [b, n], state [b, c, n] -> y [b, c]; state is written.

    a_is_log   `a` is log(-A), as checkpoints hold it
    """

    name = "selective_step"
    schema = (
        "(Tensor(a!) state, Tensor x, Tensor dt, Tensor a, Tensor b, Tensor c, Tensor? d, Tensor? z, "
        "Tensor? bias, bool softplus, bool a_is_log) -> Tensor"
    )

    fake = staticmethod(as_second)

    @staticmethod
    def reference(state, x, dt, a, b, c, d, z, bias, softplus, a_is_log):
        x, dt, b, c, z = (None if t is None else t[:, :, None] for t in (x, dt, b, c, z))
        a = -torch.exp(a.float()) if a_is_log else a
        y, h = SelectiveScan.reference(x, dt, a, b, c, d, z, bias, softplus, state, None)
        state.copy_(h)
        return y[:, :, 0]

    @classmethod
    def native(cls, state, x, dt, a, b, c, d, z, bias, softplus, a_is_log):
        (batches, channels), n = x.shape, a.shape[-1]
        fit("a state", state, batches, channels, n)
        fit("a time step", dt, batches, channels)
        fit("B", b, batches, n)
        fit("C", c, batches, n)
        fit("a gate", z, batches, channels)
        fit("A", a, channels, n)
        fit("D", d, channels)
        fit("the time step's bias", bias, channels)
        x_rows, dt, b, c, z = one_type(x, dt, b, c, z)
        x_rows, dt, b, c, z = (None if t is None else rows(t) for t in (x_rows, dt, b, c, z))
        h = plain(state)
        a, d, bias, y = plain(a), plain(d), plain(bias), torch.empty(batches, channels, dtype=x_rows.dtype)
        operands = *rows_of(x_rows), *rows_of(dt), *rows_of(z), *rows_of(b), *rows_of(c)
        pointers, is_float = map(at, (a, d, bias, y, h)), x_rows.dtype is torch.float32
        run(cls.name, *operands, *pointers, batches, channels, n, is_float, softplus, a_is_log, torch.get_num_threads())
        if h is not state:
            state.copy_(h)
        return y.to(x.dtype)

    accepts = SelectiveScan.accepts
    cases = SelectiveScan.cases
