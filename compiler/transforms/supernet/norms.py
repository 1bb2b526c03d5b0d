"""Statistics of BatchNorm, which are of one choice alone: another one's inputs have other means and variances."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from ...models.rows.forward import evaluating
from ...models.rows.inputs import forward_args_and_kwargs

EACH = 32  # rows of a forward; the statistics are the mean over forwards


def batch_norms(model: nn.Module) -> list[_BatchNorm]:
    """Batch norms with running statistics."""
    return [m for m in model.modules() if isinstance(m, _BatchNorm) and m.running_mean is not None]


def recalibrate_batch_norms(model: nn.Module, rows: Tensor) -> None:
    """Measure the statistics again, over rows, with the model as it runs now.

    Source: BN adaptation of BootstrapNAS (Munoz et al. 2021, arXiv 2112.10878); calibration of slimmable networks, Yu
    and Huang 2019 (arXiv 1903.05134), section 3.4.
    """
    norms = batch_norms(model)
    momenta = [norm.momentum for norm in norms]
    with evaluating(model):
        for norm in norms:  # new tensors: the old ones may be mapped from a file, or another's
            assert norm.running_mean is not None and norm.running_var is not None, "a norm without statistics"
            norm.running_mean = torch.zeros_like(norm.running_mean)
            norm.running_var = torch.ones_like(norm.running_var)
            norm.num_batches_tracked = torch.zeros((), dtype=torch.long, device=norm.running_mean.device)
            norm.momentum = None  # the mean of all forwards
            norm.train()
        for batch in rows.split(EACH):
            args, named = forward_args_and_kwargs(model, batch)
            model(*args, **named)
        for norm, momentum in zip(norms, momenta, strict=True):
            norm.momentum = momentum
            norm.eval()


@contextmanager
def with_batch_norm_statistics_restored(model: nn.Module) -> Iterator[None]:
    """The statistics afterwards are the ones before."""
    norms = batch_norms(model)
    before = [(n.running_mean, n.running_var, n.num_batches_tracked) for n in norms]
    try:
        yield
    finally:
        for norm, statistics in zip(norms, before, strict=True):
            norm.running_mean, norm.running_var, norm.num_batches_tracked = statistics


@contextmanager
def with_batch_statistics(model: nn.Module) -> Iterator[None]:
    """Batch norms go by the rows of each forward, as in training; running statistics stay."""
    norms = batch_norms(model)
    modes = [(norm.training, norm.track_running_stats) for norm in norms]
    for norm in norms:
        norm.training, norm.track_running_stats = True, False
    try:
        yield
    finally:
        for norm, (training, tracks) in zip(norms, modes, strict=True):
            norm.training, norm.track_running_stats = training, tracks
