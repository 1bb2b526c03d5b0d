"""The scan of Mamba-2 for one position, its state moved on in place."""

import torch

from .kernel import Kernel
from .sequences import as_second, at, fit, one_type, plain, rows, rows_of, run
from .ssd_scan import SsdScan


class SsdStep(Kernel):
    """As `ssd_scan` with x [b, h, p], dt [b, h], B, C [b, g, n], state [b, h, p, n] -> y as x; state is written.

    a_is_log   `a` is log(-A), as checkpoints hold it
    """

    name = "ssd_step"
    schema = (
        "(Tensor(a!) state, Tensor x, Tensor dt, Tensor a, Tensor b, Tensor c, Tensor? d, "
        "Tensor? bias, bool softplus, bool a_is_log) -> Tensor"
    )

    fake = staticmethod(as_second)

    @staticmethod
    def reference(state, x, dt, a, b, c, d, bias, softplus, a_is_log):
        a = -torch.exp(a.float()) if a_is_log else a
        x, dt, b, c = (t[:, None] for t in (x, dt, b, c))
        y, h = SsdScan.reference(x, dt, a, b, c, d, bias, softplus, -torch.inf, torch.inf, state, None)
        state.copy_(h)
        return y[:, 0]

    @classmethod
    def native(cls, state, x, dt, a, b, c, d, bias, softplus, a_is_log):
        batches, heads, p = x.shape
        groups, n = b.shape[1:]
        fit("a state", state, batches, heads, p, n)
        fit("a time step", dt, batches, heads)
        fit("C", c, batches, groups, n)
        fit("A", a, heads)
        fit("D", d, heads)
        fit("the time step's bias", bias, heads)
        x_rows, dt, b, c = one_type(x, dt, b, c)
        x_rows, dt, b, c = (rows(t.flatten(1)) for t in (x_rows, dt, b, c))
        h = plain(state)
        a, d, bias, y = plain(a), plain(d), plain(bias), torch.empty(batches, heads, p, dtype=x_rows.dtype)
        operands = *rows_of(x_rows), *rows_of(dt), *rows_of(b), *rows_of(c)
        pointers, sizes = map(at, (a, d, bias, y, h)), (batches, heads, p, groups, n)
        is_float = x_rows.dtype is torch.float32
        run(cls.name, *operands, *pointers, *sizes, is_float, softplus, a_is_log, torch.get_num_threads())
        if h is not state:
            state.copy_(h)
        return y.to(x.dtype)

    accepts = SsdScan.accepts
    cases = SsdScan.cases
