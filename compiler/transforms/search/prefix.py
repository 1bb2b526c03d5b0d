"""Measuring a model again and again without running the layers in front of the one that changed."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext, suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ....dsl.checker.skeleton import is_submodule
from ...models.rows.forward import evaluating, in_eval_mode, main_tensor_of_output

if TYPE_CHECKING:
    from ...ir.program import Program


# How a forward fails that lacks what an earlier layer would have left.
_MISSING = (RuntimeError, LookupError, AttributeError, TypeError, ValueError, AssertionError)

MakeChange = Callable[[], AbstractContextManager[None]]


class _Reached(Exception):
    """The layer whose output was wanted has run."""


class _OtherForwards(Exception):
    """A metric makes other forwards than when it was first looked at."""


@dataclass
class MetricForward:
    """One forward of the metric: what the model was given, and the share of the metric's tokens in it."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    tokens: int

    def is_known(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
        return _trees_equal(self.args, args) and _trees_equal(self.kwargs, kwargs)


class Prefix:
    """Keeps what every layer gave, so that a changed layer's effect costs only the layers from it on.

    The first `measure_from` runs the whole model, looks at the forwards that the metric makes, and keeps the layers'
    outputs, at most `max_bytes` of them: where all don't fit, every second, fourth, ... layer's, and the ones
    between are run again. Later measures of the same metric, over the same rows, skip the layers before the one
    that is named; layers then run on the very tensors that they would have been given, so scores are equal bit
    for bit. Whether layers form a chain that can be entered in the middle is tested, not assumed: on other models
    every measure runs the whole.

    layers_run   layer forwards so far, one being a layer over all the metric's tokens
    bytes_stored of outputs, at most
    chain        whether the layers can be entered in the middle; None before the first measure

    Source: own; that prefix activations are the same is noted for ShortGPT- and BlockPruner-like searches.
    """

    def __init__(self, program: "Program", max_bytes: int):
        self.program, self.max_bytes = program, max_bytes
        self.layers_run, self.bytes_stored = 0.0, 0
        self.chain: bool | None = None
        self.calls: list[MetricForward] = []
        self.outputs: dict[int, list[Any]] = {}  # layer -> its output in every call
        self.sizes: dict[int, int] = {}  # layer -> bytes of that
        self.front: tuple[int, list[Any]] | None = None  # the same for the last layer asked for
        self.stride = 1

    # -- measuring -------------------------------------------------------------------------------------------

    def measure_from(
        self, measure: Callable[[], float], first_changed_unit: str | None = None, make_change: MakeChange | None = None
    ) -> float:
        """`measure()` inside of the context `make_change()`; layers before `first_changed_unit` are not run again."""
        if self.chain is None:
            value = self._record_first_run(measure)
            if make_change is None:
                return value
        index = self._index(first_changed_unit)
        if self.chain and index > 0:
            try:
                return self._measure_from_layer(measure, index, make_change)
            except _OtherForwards:  # a metric whose forwards depend on what the model says
                self._disable()
        return self._measure_from_layer(measure, 0, make_change)

    def _measure_from_layer(self, measure: Callable[[], float], index: int, make_change: MakeChange | None) -> float:
        with ExitStack() as stack:
            if index > 0:
                stack.enter_context(self._with_layers_replayed(index, self.compute_layer_outputs(index - 1)))
            if make_change is not None:
                stack.enter_context(make_change())
            value = measure()
        self.layers_run += len(self._layers()) - index
        return value

    def _disable(self) -> None:
        """Measure whole models from now on."""
        self.chain, self.calls, self.outputs, self.front = False, [], {}, None

    def forget_outputs_from(self, layer_index: int) -> None:
        """The layer at `layer_index` is another from now on: what it and the ones behind it gave is void."""
        self.outputs = {k: v for k, v in self.outputs.items() if k < layer_index}
        self.sizes = {k: self.sizes[k] for k in self.outputs}
        if self.front and self.front[0] >= layer_index:
            self.front = None

    def compute_layer_outputs(self, layer_index: int) -> list[Any]:
        """Outputs of a layer in every call, from the nearest stored output before it."""
        if layer_index in self.outputs:
            return self.outputs[layer_index]
        if self.front and self.front[0] == layer_index:
            return self.front[1]
        known = [k for k in self.outputs if k < layer_index]
        start, inputs = max(known, default=-1), None
        if self.front and start < self.front[0] < layer_index:
            start, inputs = self.front
        elif start >= 0:
            inputs = self.outputs[start]
        self.front = (layer_index, self._run_layers_behind_up_to(start, inputs, layer_index))
        self.bytes_stored = max(self.bytes_stored, sum(self.sizes.values()) + _bytes(self.front[1]))
        return self.front[1]

    def replace_calls(self, calls: list[MetricForward]) -> None:
        """Other forwards from now on, of the same kind; nothing of the ones before is kept."""
        self.calls, self.outputs, self.sizes, self.front = calls, {}, {}, None
        self.stride = len(self._layers()) + 1 if self.max_bytes == 0 else 1

    def outputs_of_changed_layer(self, layer_index: int, make_change: MakeChange | None = None) -> list[Any]:
        """Outputs of one layer with a change, over the unchanged outputs before it."""
        assert self.chain, "layers can't be entered in the middle"
        inputs = self.compute_layer_outputs(layer_index - 1) if layer_index else None
        with make_change() if make_change is not None else nullcontext():
            return self._run_layers_behind_up_to(layer_index - 1, inputs, layer_index, stores_outputs=False)

    def forward_from_input_leaf(self, layer_index: int, call_index: int) -> tuple[Tensor, Tensor]:
        """A layer's input in one call, as a leaf that takes gradients, and what it gives, or for the one behind the
        last layer the model's main output; gradients flow from the second to the first."""
        assert self.chain and layer_index > 0, "layers can't be entered in the middle"
        leaf, inputs = _with_leaf(self.compute_layer_outputs(layer_index - 1)[call_index])
        model, layers, one = self.program.model, self._layers(), self.calls[call_index]
        outputs: dict[int, Any] = {}
        with ExitStack() as stack:
            at = _Position([one], [inputs])
            stack.callback(model.register_forward_pre_hook(at.begin, with_kwargs=True).remove)
            for skipped in layers[:layer_index]:
                stack.enter_context(_with_forward_replaced(skipped, at.instead_of(skipped.forward)))
            stack.enter_context(in_eval_mode(model))
            stack.enter_context(torch.enable_grad())
            if layer_index == len(layers):
                return leaf, main_tensor_of_output(model(*one.args, **one.kwargs))
            hook = layers[layer_index].register_forward_hook(_make_output_hook(outputs, layer_index, True, False))
            stack.callback(hook.remove)
            with suppress(_Reached):
                model(*one.args, **one.kwargs)
        return leaf, hidden_states_of(outputs[layer_index])

    def run_layer(self, layer_index: int) -> None:
        """Run one layer over what those before it give, for whoever listens; its outputs are not kept."""
        assert self.chain, "layers can't be entered in the middle"
        inputs = self.compute_layer_outputs(layer_index - 1) if layer_index else None
        self._run_layers_behind_up_to(layer_index - 1, inputs, layer_index)

    def unit_of(self, path: str) -> str | None:
        """The layer that a module is in; None outside all layers."""
        return next((unit for unit in self.program.units if is_submodule(path, unit)), None)

    def _index(self, path: str | None) -> int:
        return list(self.program.units).index(path) if path in self.program.units else 0

    def _layers(self) -> list[nn.Module]:
        return [unit.module(self.program.model) for unit in self.program.units.values()]

    # -- the first look --------------------------------------------------------------------------------------

    def _record_first_run(self, measure: Callable[[], float]) -> float:
        """The value of the whole model, run once to see the metric's forwards and to keep the layers' outputs."""
        layers, model = self._layers(), self.program.model
        first_run = _FirstForward(self, layers)
        with ExitStack() as stack:
            stack.callback(model.register_forward_pre_hook(first_run.call, with_kwargs=True).remove)
            stack.callback(model.register_forward_hook(first_run.end).remove)
            for k, layer in enumerate(layers):
                for handle in (
                    layer.register_forward_pre_hook(first_run.make_enter_hook(k), with_kwargs=True),
                    layer.register_forward_hook(first_run.make_leave_hook(k)),
                ):
                    stack.callback(handle.remove)
            value = measure()
        self.layers_run += len(layers)
        self.calls = first_run.calls
        self.chain = first_run.is_chain and bool(layers) and bool(self.calls)
        if not (self.chain and self._matches_when_entered(first_run.result)):
            self._disable()
        return value

    def store_output_within_budget(self, layer_index: int, output: Any) -> None:
        """Keep one call's output of a layer; thin out what is kept when it passes the room."""
        if (layer_index + 1) % self.stride or layer_index + 1 == len(self.program.units):  # none begins behind the last
            return
        self.outputs.setdefault(layer_index, []).append(output)
        self.sizes[layer_index] = self.sizes.get(layer_index, 0) + _bytes(output)
        while sum(self.sizes.values()) > self.max_bytes and self.outputs:
            self.stride *= 2
            self.outputs = {k: v for k, v in self.outputs.items() if (k + 1) % self.stride == 0}
            self.sizes = {k: self.sizes[k] for k in self.outputs}
        self.bytes_stored = max(self.bytes_stored, sum(self.sizes.values()))

    def _matches_when_entered(self, expected_result: Tensor | None) -> bool:
        """Whether the first call gives the same result when entered in the middle and at the last layer."""
        if expected_result is None:
            return False
        count, call = len(self._layers()), self.calls[0]
        share = call.tokens / sum(c.tokens for c in self.calls)
        for index in sorted({count // 2, count - 1} - {0}):
            inputs = self.compute_layer_outputs(index - 1)
            with evaluating(self.program.model), self._with_layers_replayed(index, inputs):
                try:
                    result = main_tensor_of_output(self.program.model(*call.args, **call.kwargs))
                except _MISSING:  # what a layer looked for was made by one that did not run
                    return False
            self.layers_run += (count - index) * share
            if result.shape != expected_result.shape or not torch.equal(result, expected_result):
                return False
        return True

    # -- entering and leaving in the middle ------------------------------------------------------------------

    @contextmanager
    def _with_layers_replayed(self, layer_index: int, outputs_before_by_call: list[Any]) -> Iterator[None]:
        """The layers before `layer_index` hand on what the last of them gave; forwards come in the order known."""
        at = _Position(self.calls, outputs_before_by_call)
        with ExitStack() as stack:
            stack.callback(self.program.model.register_forward_pre_hook(at.begin, with_kwargs=True).remove)
            for layer in self._layers()[:layer_index]:
                stack.enter_context(_with_forward_replaced(layer, at.instead_of(layer.forward)))
            versions = [t._version for t in _nested_tensors(outputs_before_by_call)]
            yield
            if versions != [t._version for t in _nested_tensors(outputs_before_by_call)]:  # a layer writes to its input
                self._disable()

    @torch.no_grad()
    def _run_layers_behind_up_to(
        self, behind_index: int, inputs_by_call: list[Any] | None, last_index: int, stores_outputs: bool = True
    ) -> list[Any]:
        """Run the layers behind `behind_index` up to `last_index`; outputs of those between are kept by the stride."""
        model, layers, results = self.program.model, self._layers(), []
        strides = [k for k in range(behind_index + 1, last_index + 1) if stores_outputs and (k + 1) % self.stride == 0]
        fresh: dict[int, list[Any]] = {k: [] for k in strides}
        for call_index, call in enumerate(self.calls):
            outputs: dict[int, Any] = {}
            with ExitStack() as stack:
                if inputs_by_call is not None:
                    one = _Position([call], [inputs_by_call[call_index]])
                    stack.callback(model.register_forward_pre_hook(one.begin, with_kwargs=True).remove)
                    for skipped in layers[: behind_index + 1]:
                        stack.enter_context(_with_forward_replaced(skipped, one.instead_of(skipped.forward)))
                for k in range(behind_index + 1, last_index + 1):
                    handle = layers[k].register_forward_hook(_make_output_hook(outputs, k, k == last_index))
                    stack.callback(handle.remove)
                with evaluating(model), suppress(_Reached):
                    model(*call.args, **call.kwargs)
            results.append(outputs[last_index])
            for k, stored in fresh.items():
                stored.append(outputs[k])
        self.outputs |= fresh
        self.sizes |= {k: _bytes(stored) for k, stored in fresh.items()}
        self.layers_run += last_index - behind_index
        return results


class _FirstForward:
    """Record of a metric's forwards in the first run."""

    def __init__(self, prefix: Prefix, layers: list[nn.Module]):
        self.prefix, self.count = prefix, len(layers)
        self.calls: list[MetricForward] = []
        self.is_chain, self.next = True, 0
        self.stream: Tensor | None = None
        self.result: Tensor | None = None

    def call(self, model: nn.Module, args: tuple, kwargs: dict) -> None:
        tensors = [t for t in (*args, *kwargs.values()) if isinstance(t, Tensor)]
        plain = all(isinstance(v, (Tensor, bool, int, float, str, type(None))) for v in (*args, *kwargs.values()))
        self.is_chain &= plain and bool(tensors) and not torch.is_grad_enabled()
        self.calls.append(MetricForward(args, dict(kwargs), tensors[0].numel() if tensors else 1))
        self.next, self.stream = 0, None

    def make_enter_hook(self, layer_index: int) -> Callable[..., None]:
        def hook(_module, args, kwargs):
            hidden = args[0] if args else kwargs.get("hidden_states")
            known = self.stream is None or (isinstance(hidden, Tensor) and hidden is self.stream)
            self.is_chain &= self.next == layer_index and known

        return hook

    def make_leave_hook(self, layer_index: int) -> Callable[..., None]:
        def hook(_module, _args, output):
            self.next = layer_index + 1
            self.stream = hidden_states_of(output)
            if self.is_chain:
                self.prefix.store_output_within_budget(layer_index, _detached(output))

        return hook

    def end(self, _module, _args, output) -> None:
        self.is_chain &= self.next == self.count
        if self.result is None and self.is_chain:
            self.result = main_tensor_of_output(output)


class _Position:
    """Position in the metric's calls, and the outputs of the skipped layers."""

    def __init__(self, calls: list[MetricForward], inputs: list[Any]):
        self.calls, self.outputs, self.index, self.module = calls, inputs, -1, None

    def begin(self, _model: nn.Module, args: tuple, kwargs: dict) -> None:
        self.index += 1
        known = self.index < len(self.calls) and self.calls[self.index].is_known(args, kwargs)
        if not known:
            raise _OtherForwards
        self.module = self.outputs[self.index]

    def instead_of(self, _forward) -> Callable[..., Any]:
        return lambda *args, **kwargs: self.module


@contextmanager
def _with_forward_replaced(layer: nn.Module, forward: Callable[..., Any]) -> Iterator[None]:
    """A layer with another forward; hooks that were put on it stay quiet, too, as it doesn't run."""
    before = vars(layer).get("forward")
    hooks, pre = layer._forward_hooks, layer._forward_pre_hooks
    layer.forward = forward
    layer._forward_hooks, layer._forward_pre_hooks = type(hooks)(), type(pre)()
    try:
        yield
    finally:
        layer._forward_hooks, layer._forward_pre_hooks = hooks, pre
        if before is None:
            del layer.forward
        else:
            layer.forward = before


def _make_output_hook(
    output_by_layer: dict[int, Any], layer_index: int, stops_forward: bool, detach: bool = True
) -> Callable[..., None]:
    def hook(_module, _args, output):
        output_by_layer[layer_index] = _detached(output) if detach else output
        if stops_forward:
            raise _Reached

    return hook


def hidden_states_of(output: Any) -> Tensor:
    """The hidden states of what a layer gave."""
    return output if isinstance(output, Tensor) else output[0]


def _with_leaf(output: Any) -> tuple[Tensor, Any]:
    """A leaf in place of the hidden states of what a layer gave, and all that it gave with it."""
    leaf = hidden_states_of(output).detach().requires_grad_()
    return leaf, leaf if isinstance(output, Tensor) else type(output)([leaf, *output[1:]])


def _detached(output: Any) -> Any:
    if isinstance(output, Tensor):
        return output.detach()
    return tuple(_detached(x) for x in output) if isinstance(output, (tuple, list)) else output


def _nested_tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (tuple, list)):
        for x in value:
            yield from _nested_tensors(x)
    elif isinstance(value, dict):
        for x in value.values():
            yield from _nested_tensors(x)


def _bytes(value: Any) -> int:
    return sum({t.data_ptr(): t.numel() * t.element_size() for t in _nested_tensors(value)}.values())


def _trees_equal(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return a is b or (a.shape == b.shape and a.dtype == b.dtype and torch.equal(a, b))
    if isinstance(a, (tuple, list)):
        return isinstance(b, (tuple, list)) and len(a) == len(b) and all(map(_trees_equal, a, b))
    if isinstance(a, dict):
        return isinstance(b, dict) and a.keys() == b.keys() and all(_trees_equal(v, b[k]) for k, v in a.items())
    return type(a) is type(b) and a == b
