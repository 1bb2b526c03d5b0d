"""Zeros of a model that a training loop of its user keeps, and the callback of transformers that does so."""

from typing import Any

import torch
from torch import Tensor, nn
from transformers import TrainerCallback

from ....dsl.syntax.diagnostics import Fault
from ..search.masks import is_sparse

no_sparse_weight = Fault(
    "no-sparse-weight",
    "Zeros are kept in the training of a model that trains no sparse weight.\n\n"
    "A weight is sparse where at least 1% of a matrix is exactly zero. Adapters of peft train beside the weights, and "
    "fill their zeros when they are merged: `tune.heal(rank: 8)` trains adapters that don't. Sharded weights (FSDP, "
    "DeepSpeed ZeRO-3) are no matrices while they are trained.",
)


class ZeroMasks:
    """Zeros of a model's sparse weights while an optimizer changes their neighbours.

    A gradient is zero where its weight is, so that clipping by norm counts what is trained; and the weight is set to
    zero there behind each step, since momentum of before and optimizers that mix a matrix (Muon) move it nevertheless.
    """

    def __init__(self) -> None:
        self._zeros: list[tuple[nn.Parameter, Tensor]] = []
        self._hooks: list[Any] = []

    def record_zeros_and_mask_gradients(self, model: nn.Module) -> None:
        """Take the zeros that the weights have now. Raises Reject (no-sparse-weight) where no trained one has any."""
        self.remove_hooks()
        sparse = [p for p in model.parameters() if p.dim() > 1 and is_sparse(p.detach())]
        if not any(p.requires_grad for p in sparse):
            raise no_sparse_weight(
                f"no weight that is trained of this {type(model).__name__} has zeros to keep",
                help="prune it by `sparsify` first, and train the weights themselves; or leave the callback out",
            ).rejection()
        self._zeros = [(p, p.detach() == 0) for p in sparse]
        self._hooks = [p.register_hook(_GradientMask(zeros)) for p, zeros in self._zeros if p.requires_grad]

    @torch.no_grad()
    def zero_masked_weights(self) -> None:
        for p, zeros in self._zeros:
            p.masked_fill_(zeros, 0)

    def remove_hooks(self) -> None:
        for hook in self._hooks:
            hook.remove()
        self._zeros, self._hooks = [], []


class _GradientMask:
    def __init__(self, zeros: Tensor):
        self.zeros = zeros

    def __call__(self, gradient: Tensor) -> Tensor:
        return gradient.masked_fill(self.zeros, 0)


class KeepZeros(TrainerCallback):
    """Callback of `transformers.Trainer`: zeros of a sparse model stay zero while it is trained.

        Trainer(model=effc.load("sparse-model"), callbacks=[effc.callbacks.KeepZeros()], ...)

    Zeros are those that the model has when training begins, after a checkpoint that it resumes from is loaded, in each
    matrix of which at least 1% is exactly zero. A bool for each weight of such a matrix is kept in memory.
    `train` raises Reject (no-sparse-weight) where no weight that is trained has zeros.
    """

    def __init__(self) -> None:
        self._masks = ZeroMasks()

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._masks.record_zeros_and_mask_gradients(kwargs["model"])

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._masks.zero_masked_weights()

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._masks.remove_hooks()
