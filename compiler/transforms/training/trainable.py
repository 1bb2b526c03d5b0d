"""Trainable parameters of a run, and the model's mode while training."""

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers.modeling_layers import GradientCheckpointingLayer

from ....dsl.syntax.diagnostics import Fault

no_checkpointing = Fault("no-checkpointing", "Gradient checkpointing is asked of a model whose layers don't do it.")


class TrainedParameters:
    """Parameters under training. A narrow one is trained by a float32 copy: small steps would be rounded off.

    masters    what the optimizer changes: the parameter itself, or its copy
    masks      what may change of a parameter, bool, by name; the rest gets no gradient, so that zeros stay zero
    """

    def __init__(self, parameters: Mapping[str, nn.Parameter], masks: Mapping[str, Tensor] | None = None):
        assert parameters, "nothing to train"
        self.parameters, self.masks = dict(parameters), dict(masks or {})
        self.masters = {
            name: nn.Parameter(p.detach().float()) if p.element_size() < 4 else p for name, p in self.parameters.items()
        }

    @property
    def count(self) -> int:
        """Number of trained parameters."""
        return sum(p.numel() for p in self.parameters.values())

    def move_gradients_to_masters(self) -> None:
        """Give the masters the gradients that a backward pass left at the parameters."""
        for name, p in self.parameters.items():
            master = self.masters[name]
            if master is not p and p.grad is not None:
                master.grad, p.grad = p.grad.float(), None
            if name in self.masks and master.grad is not None:
                master.grad.mul_(self.masks[name])

    @torch.no_grad()
    def copy_masters_to_parameters(self) -> None:
        """Round the masters into the parameters."""
        for name, p in self.parameters.items():
            if self.masters[name] is not p:
                p.copy_(self.masters[name])

    def tensors(self) -> dict[str, Tensor]:
        return {name: master.detach() for name, master in self.masters.items()}

    @torch.no_grad()
    def load(self, tensors: Mapping[str, Tensor]) -> None:
        for name, master in self.masters.items():
            master.copy_(tensors[name])
        self.copy_masters_to_parameters()


@contextmanager
def training_mode(model: nn.Module, trained_parameters: Mapping[str, nn.Parameter]) -> Iterator[None]:
    """Training mode, with gradients for these parameters only; the model's modes and flags come back."""
    modes = [(module, module.training) for module in model.modules()]
    flags = [(p, p.requires_grad) for p in model.parameters()]
    trained_ids = {id(p) for p in trained_parameters.values()}
    try:
        for p, _ in flags:
            p.requires_grad_(id(p) in trained_ids)
        model.train()
        yield
    finally:
        for module, mode in modes:
            module.training = mode
        for p, flag in flags:
            p.grad = None
            p.requires_grad_(flag)


@contextmanager
def activation_checkpointing(layers: Iterable[nn.Module]) -> Iterator[None]:
    """Layers keep only what they were given, and run again in the backward pass.

    Source: Chen et al. 2016, "Training deep nets with sublinear memory cost" (arXiv 1604.06174).
    """
    checkpointed = partial(checkpoint, use_reentrant=False)
    switches = {"gradient_checkpointing": True, "_gradient_checkpointing_func": checkpointed}
    known: list[tuple[nn.Module, dict[str, object]]] = []
    try:
        for layer in layers:
            if not isinstance(layer, GradientCheckpointingLayer):
                raise no_checkpointing(
                    f"a {type(layer).__name__} does not do gradient checkpointing",
                    help="leave it out, and take a smaller `batch`",
                ).rejection()
            known.append((layer, {name: vars(layer)[name] for name in switches if name in vars(layer)}))
            vars(layer).update(switches)
        yield
    finally:
        for layer, before in known:
            for name in switches:
                vars(layer).pop(name, None)
            vars(layer).update(before)
