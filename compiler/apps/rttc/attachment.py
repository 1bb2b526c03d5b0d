"""Tensors that are trained at test time: attached to a frozen model, and in use only while they are switched on."""

from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from ...analysis.discovery.discover import skeleton_of
from ...ir.capture.capture import capture
from ...ir.layers.linear import weight_of
from ...ir.layers.reft import Intervention
from ...models.checkpoints.pretrained import pretrained
from ...transforms.training.adapters import AdapterShape, require_adaptable_modules, with_adapters

KINDS = ("lora", "reft")
_PROJECTIONS = ("q_proj", "v_proj", "up_proj", "down_proj")


class Attachment(Protocol):
    """On one model, from when it is made until `close`."""

    def parameters(self) -> dict[str, nn.Parameter]: ...

    def switch(self, enabled: bool) -> None:
        """While it is off the model computes what it did before."""

    def rows(self, stacked: Mapping[str, Tensor]) -> AbstractContextManager[None]:
        """Within it row i of a batch has the i-th of `stacked`, parameters [rows, ...]; it must be switched off."""

    def close(self) -> None:
        """Leave the module tree as it was."""


class LowRank:
    """LoRA on linear modules, by peft."""

    def __init__(self, model: nn.Module, module_paths: tuple[str, ...], rank: int, alpha: float, seed: int):
        self._stack = ExitStack()
        self._adapters = self._stack.enter_context(
            with_adapters(model, module_paths, AdapterShape(rank, alpha, 0.0), seed)
        )

    def parameters(self) -> dict[str, nn.Parameter]:
        return self._adapters.parameters()

    def switch(self, enabled: bool) -> None:
        for layer in self._adapters.layers.values():
            layer.enable_adapters(enabled)

    def rows(self, stacked: Mapping[str, Tensor]) -> AbstractContextManager[None]:
        return self._adapters.with_per_row_adapters(stacked)

    def close(self) -> None:
        self._stack.close()


class Residual:
    """ReFT behind layers, at every position, of prompts and of what is generated.

    A text that is learned has no prompt at whose edges an edit could sit (first and last seven learn a third as much
    of it), and what is edited in learning must be edited in decoding: so these are hooks, and not the interventions
    at prompts that a recipe inserts. The form is DiReFT, h + P'(Ah + b): no basis is orthonormalized for a token.

    Source: Wu et al. 2024 (arXiv 2404.03592), equation 3.
    """

    def __init__(self, model: nn.Module, layer_paths: tuple[str, ...], rank: int, seed: int):
        self._on = False
        self._stacked: Mapping[str, Tensor] | None = None
        generator = torch.Generator().manual_seed(seed)
        width = weight_of(pretrained(model).get_input_embeddings()).shape[1]
        self._edits: dict[str, Intervention] = {}
        self._hooks = []
        for path in layer_paths:
            layer = model.get_submodule(path)
            like = next(layer.parameters())
            edit = Intervention("direft", width, min(rank, width), 0.0, dtype=torch.float32, device=like.device)
            edit.init_weights("identity", generator)
            self._edits[path] = edit
            self._hooks.append(layer.register_forward_hook(self._edit_hook(path, edit)))

    def parameters(self) -> dict[str, nn.Parameter]:
        return {f"{path}.{name}": p for path, edit in self._edits.items() for name, p in edit.named_parameters()}

    def switch(self, enabled: bool) -> None:
        self._on = enabled

    def close(self) -> None:
        for hook in self._hooks:
            hook.remove()

    @contextmanager
    def rows(self, stacked: Mapping[str, Tensor]) -> Iterator[None]:
        self._stacked = stacked
        try:
            yield
        finally:
            self._stacked = None

    def _edit_hook(self, path: str, edit: Intervention) -> Any:
        def hook(module: nn.Module, args: Any, output: Any) -> Any:
            if not self._on and self._stacked is None:
                return None
            hidden: Tensor = output[0] if isinstance(output, tuple) else output  # [b, t, d]
            if self._stacked is None:
                edited = edit(hidden.flatten(0, -2)).view_as(hidden)
            else:
                project, aim, bias = (self._stacked[f"{path}.{name}"] for name in ("project", "aim", "bias"))
                h = hidden.to(project.dtype)
                edited = (h + torch.baddbmm(bias[:, None], h, aim.mT) @ project).to(hidden.dtype)
            return (edited, *output[1:]) if isinstance(output, tuple) else edited

        return hook


def attach_adapters(
    adapter_kind: str, model: nn.Module, module_paths: tuple[str, ...], rank: int, alpha: float, seed: int
) -> Attachment:
    assert adapter_kind in KINDS, f"nothing is called {adapter_kind}"
    return (
        Residual(model, module_paths, rank, seed)
        if adapter_kind == "reft"
        else LowRank(model, module_paths, rank, alpha, seed)
    )


def default_attachment_paths(model: nn.Module, adapter_kind: str = "lora") -> tuple[str, ...]:
    """Modules that an attachment is put on: behind every layer (ReFT); on the q, v, up and down projections where the
    layers have such, else on all linear modules (LoRA)."""
    program = capture(model.eval())
    if adapter_kind == "reft":
        return tuple(skeleton_of(program).units)
    modules = require_adaptable_modules(program, None)
    named = tuple(p for p in modules if p.rpartition(".")[2] in _PROJECTIONS)
    return named or modules
