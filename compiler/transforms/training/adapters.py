"""Low-rank adapters on the linear modules of a program, and off again: the tree is as it was before.

On a sparse weight an adapter gives nothing where the weight is zero, beside it and merged: zeros stay zero.

Source: LoRA (Hu et al. 2021, arXiv 2106.09685), section 4.1; the adapters are peft's. SparsePEFT of SQFT (Munoz et
al. 2024, arXiv 2410.03750), section 3.2.
"""

import re
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from ....dsl.checker.values import Selector
from ....dsl.syntax.diagnostics import Fault
from ....kernels.grid import Grid
from ...analysis.discovery.discover import skeleton_of
from ...analysis.planning.selection import inner_parts, linear_parts
from ...ir.layers.linear import weight_of
from ...ir.program import Program
from ...ir.surgery import split_parent_and_name
from ...models.rows.forward import evaluating
from ..search.masks import is_sparse
from .masks import MaskedProduct, masked_lora_product
from .rounded_adapters import RoundedProduct, rounded_weight_and_adapter

if TYPE_CHECKING:
    from peft.tuners.lora import LoraLayer

nothing_to_adapt = Fault("nothing-to-adapt", "No linear module is there that could be given an adapter.")
tied_adapter = Fault(
    "tied-adapter",
    "An adapter is asked for on a weight that two modules share.\n\nMerging it into one would change the other.",
)

_NAME, _FROZEN, _MASK, _SCALES = "effc", "held", "effc_mask", "effc_scales"
# Fused kernels of these models, where installed, read this weight past its module; so peft refuses it.
_FUSED = {
    "falcon_h1": "out_proj",
    "mamba": "out_proj",
    "mamba2": "out_proj",
    "falcon_mamba": "out_proj",
    "nemotron_h": "out_proj",
}


@dataclass(frozen=True)
class AdapterShape:
    """`rank` is that of A and B, `alpha` / `rank` scales their product, `dropout` acts on what A is given."""

    rank: int
    alpha: float
    dropout: float


def require_adaptable_modules(
    program: Program, selector: Selector | None, recipe_alternative: str = ""
) -> tuple[str, ...]:
    """Linear modules that may get an adapter: those selected, or all inside of the layers.

    recipe_alternative   what a recipe would write to train weights themselves, where it can

    Left out are those whose weight is read past the module, which an adapter would not see.
    Raises Reject where a selected one is tied, and where none is left.
    """
    skeleton, read = skeleton_of(program), _uncalled_linear_paths(program)
    paths = [part.path for part in inner_parts(skeleton, selector)]
    fused = _FUSED.get(skeleton.model_type)
    paths = [path for path in paths if path not in read and split_parent_and_name(path)[1] != fused]
    shared = {name for names in skeleton.tied for name in names}
    tied = [path for path in paths if f"{path}.weight" in shared]
    if tied:
        raise tied_adapter(
            f"the weight of {tied[0]} is tied to another module's",
            help="leave it out of `on`" + (f", or write `{recipe_alternative}`" if recipe_alternative else ""),
            argument="on",
        ).rejection()
    if not paths:
        raise nothing_to_adapt(
            "no linear module can be given an adapter",
            help="select others with `on`" + (f", or write `{recipe_alternative}`" if recipe_alternative else ""),
            argument="on",
        ).rejection()
    return tuple(paths)


def _uncalled_linear_paths(program: Program) -> set[str]:
    """Linear modules that are not called where their owner runs: the dt_proj of a Mamba."""
    model, called = program.model, set()
    hooks = [
        module.register_forward_hook(lambda *_, path=path: called.add(path)) for path, module in model.named_modules()
    ]
    try:
        with evaluating(model):
            model(**program.inputs)
    finally:
        for hook in hooks:
            hook.remove()
    paths = [part.path for part in linear_parts(skeleton_of(program), None)]
    return {path for path in paths if path not in called and split_parent_and_name(path)[0] in called}


@dataclass(frozen=True)
class Adapters:
    """The adapters that are on a model now; `layers` by the path of the module that they sit on."""

    layers: dict[str, Any]

    def parameters(self) -> dict[str, nn.Parameter]:
        return {
            f"{path}.{side}": getattr(layer, side)[_NAME].weight
            for path, layer in self.layers.items()
            for side in ("lora_A", "lora_B")
        }

    def follow_ranks(self, ranks_by_path: Mapping[str, int]) -> None:
        """Let each adapter use the first so many of its ranks, as `ranks_by_path` says by path whenever it runs."""
        for path, layer in self.layers.items():
            layer.forward = _adapter_forward(layer, partial(ranks_by_path.__getitem__, path))

    @torch.no_grad()
    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Put in what `parameters` gave, or the first ranks of it; the ones behind give nothing."""
        for name, parameter in self.parameters().items():
            parameter.zero_()
            parameter[tuple(slice(n) for n in tensors[name].shape)] = tensors[name].to(parameter.device)

    @contextmanager
    def with_per_row_adapters(self, stacked_adapters: Mapping[str, Tensor]) -> Iterator[None]:
        """Within it each row of a batch [rows, t, in] has an adapter of its own: `stacked_adapters` are such as
        `parameters` gives, one behind the other [rows, ...]. Those that are on the layers must be off."""
        hooks = [
            layer.register_forward_hook(
                _per_row_adapter_hook(layer, *(stacked_adapters[f"{path}.{side}"] for side in ("lora_A", "lora_B")))
            )
            for path, layer in self.layers.items()
        ]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    @torch.no_grad()
    def merge_into_weights(self) -> None:
        """Add the products to the weights, in place."""
        for layer in self.layers.values():
            mask, scales = vars(layer).get(_MASK), vars(layer).get(_SCALES)
            base = layer.get_base_layer()
            if scales is not None:
                new = rounded_weight_and_adapter(
                    *_lora_matrices(layer), mask, layer.scaling[_NAME], weight_of(base), scales
                )
                base.weight.data.copy_(new.T if isinstance(base, Conv1D) else new)
            elif mask is None:
                layer.merge()
            else:
                added = masked_lora_product(*_lora_matrices(layer), mask, layer.scaling[_NAME])
                base.weight.data += (added.T if isinstance(base, Conv1D) else added).to(base.weight.dtype)


def _lora_matrices(layer: Any) -> tuple[Tensor, Tensor]:
    """A [rank, in] and B [out, rank]."""
    return layer.lora_A[_NAME].weight, layer.lora_B[_NAME].weight


def _keep_zeros(layer: Any) -> None:
    """Let the adapter of a sparse weight give nothing where the weight is zero."""
    weight = weight_of(layer.get_base_layer())
    if is_sparse(weight):
        vars(layer)[_MASK] = weight != 0  # [out, in]
        layer.forward = _adapter_forward(layer, None)


def _round_weight_and_adapter_together(layer: Any, grid: Grid) -> None:
    """Let weight and adapter be rounded together, on scales that fit the weight and stay."""
    weight = weight_of(layer.get_base_layer())
    vars(layer)[_SCALES] = grid.fit_scales(weight.float())
    if _MASK not in vars(layer):
        vars(layer)[_MASK] = torch.ones(1, 1, dtype=torch.bool, device=weight.device).expand(weight.shape)
    layer.forward = _adapter_forward(layer, None)


def _adapter_forward(layer: Any, active_rank: Callable[[], int] | None) -> Callable[..., Tensor]:
    """Forward function of an adapted layer, its mask honoured where it has one; with the first `rank()` of its ranks,
    or all."""
    base, mask, scales = layer.get_base_layer(), vars(layer).get(_MASK), vars(layer).get(_SCALES)

    def forward(x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        result, (a, b), scale = base(x, *args, **kwargs), _lora_matrices(layer), layer.scaling[_NAME]
        if layer.disable_adapters:
            return result
        if active_rank is not None:
            a, b = a[: active_rank()], b[:, : active_rank()]
        dropped = layer.lora_dropout[_NAME](x.to(a.dtype))
        if scales is not None:
            added = RoundedProduct.apply(dropped, a, b, mask, scale, weight_of(base), scales)
        elif mask is not None:
            added = MaskedProduct.apply(dropped, a, b, mask, scale)
        else:
            added = (dropped @ a.T @ b.T) * scale
        return result + added.to(result.dtype)

    return forward


def _per_row_adapter_hook(layer: Any, a: Tensor, b: Tensor) -> Callable[..., Tensor]:
    """A hook behind a layer: what adapters a [rows, rank, in] and b [rows, out, rank] add to its rows."""
    mask, scale = vars(layer).get(_MASK), layer.scaling[_NAME]

    def hook(module: nn.Module, args: Any, output: Tensor) -> Tensor:
        x = args[0].to(a.dtype)  # [rows, t, in]
        if mask is None:
            added = x @ a.mT @ b.mT * scale
        else:
            added = torch.stack([x[i] @ masked_lora_product(a[i], b[i], mask, scale).T for i in range(len(a))])
        return output + added.to(output.dtype)

    return hook


@contextmanager
def with_adapters(
    model: nn.Module,
    module_paths: tuple[str, ...],
    shape: AdapterShape,
    init_seed: int,
    *,
    zeros: Literal["keep", "fill"] = "keep",
    rounding_grid: Grid | None = None,
) -> Iterator[Adapters]:
    """Adapters that change nothing yet on the modules at `module_paths`; afterwards the same modules are back.

    zeros           "keep": those of sparse weights are not trained; "fill": they are
    rounding_grid   that weights and what adapters add are rounded to, together; None: they are not
    """
    from peft import LoraConfig, inject_adapter_in_model
    from peft.tuners.lora import LoraLayer

    flags = [(p, p.requires_grad) for p in model.parameters()]
    # By `config.model_type` peft goes to other targets than it was told (experts); a holder has no config.
    holder = nn.Module()
    holder.add_module(_FROZEN, model)
    # A pattern, not a list: a name in a list would also match modules whose path ends with it.
    config = LoraConfig(
        r=shape.rank,
        lora_alpha=shape.alpha,  # type: ignore[arg-type]  # a number that it divides, whatever the annotation says
        lora_dropout=shape.dropout,
        bias="none",
        target_modules="|".join(f"{_FROZEN}[.]{re.escape(path)}" for path in module_paths),
    )
    try:
        with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that a Conv1D lies transposed: it sees to that
            torch.manual_seed(init_seed)
            inject_adapter_in_model(config, holder, adapter_name=_NAME)
        layers = {path: model.get_submodule(path) for path in module_paths}
        missed = [path for path, layer in layers.items() if not isinstance(layer, LoraLayer)]
        assert not missed, f"peft put no adapter on {missed[0]}"
        if zeros == "keep":
            for layer in layers.values():
                _keep_zeros(layer)
        if rounding_grid:
            for layer in layers.values():
                _round_weight_and_adapter_together(layer, rounding_grid)
        yield Adapters(layers)
    finally:
        _remove(model, module_paths, LoraLayer)
        for p, flag in flags:
            p.requires_grad_(flag)


def _remove(model: nn.Module, paths: tuple[str, ...], layer_class: "type[LoraLayer]") -> None:
    for path in paths:
        layer = model.get_submodule(path)
        if isinstance(layer, layer_class):
            owner, name = split_parent_and_name(path)
            setattr(model.get_submodule(owner), name, layer.get_base_layer())
