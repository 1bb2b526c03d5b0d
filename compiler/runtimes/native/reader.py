"""From a program's flat graph to a plan: every node is matched by what it computes, or refused by name.

The graph is walked once, with shapes of its sample batch. Values are `Rows` (numbers of tokens), `Positional`
(computed from positions alone) or plain Python and torch values, which are just computed.
"""

from typing import Any

import torch
from torch import Tensor, fx, nn

from ....kernels.engine_steps import MAX_BIDIRECTIONAL
from ...core.events import follow
from ...ir.program import Program
from ...models.checkpoints.origin import POSITIONS
from ...models.checkpoints.pretrained import pretrained
from ...models.rows.inputs import is_encoder_decoder
from ...models.rows.packed_inputs import is_speech_encoder_decoder
from . import activations, calls, encoder_decoder, indexers, linear_attention, linears, norms, recurrences, rwkv
from .attention_lowering import AttentionRules
from .dense_dispatch import DenseDispatchRules
from .eager_attention import EagerAttentionRules
from .inline_routers import InlineRouterRules
from .key_score_bias import KeyScoreBiasRules
from .layout import IrregularColumns, Layout, RowLayout
from .mixers import inline_mixers
from .mixtures import MixtureRules
from .number_ops import FunctionRules
from .plan import Entry, Output, Plan
from .positional import Positions, call_node
from .refusal import model_rejection, rejection
from .scanning import ScanRules
from .shifting import BEFORE, ShiftRules
from .sorted_dispatch import SortedDispatchRules
from .tables import Tables
from .trees import attribute, leaves, mapped
from .values import (
    CACHE,
    OF_TOKENS,
    AllPositions,
    CachedRows,
    DenseDispatch,
    ElementwiseExpr,
    FirstTokenRows,
    KeyScoreBias,
    Mask,
    Positional,
    RouterLogits,
    Rows,
    ScorePairs,
    SortedDispatchIndex,
    SortedRows,
    SourceTokens,
    TokenIds,
)

ENDLESS = 2**20  # tokens of a sequence, where no table of positions ends and a config names no limit


class Reader:
    """One walk over one graph. `plan` is complete when `read` has returned.

    model   whose numbers are read, where the program was captured without any; else the program's own
    side    of an encoder with a decoder: the encoder's, which the reader of the whole walks first
    """

    def __init__(
        self,
        program: Program,
        weights: str | linears.Numbers,
        model: nn.Module | None = None,
        side: encoder_decoder.Stack | None = None,
    ):
        self.model = model or program.model
        self.numbers = linears.Numbers(weights) if isinstance(weights, str) else weights
        if is_speech_encoder_decoder(program.model):
            reason = "it hears sounds: the engine reads token ids, and has no convolution that sees what follows"
            raise model_rejection(self.model, reason, help="`hf` and `onnx` write it")
        if "input_ids" not in program.inputs:
            raise model_rejection(
                self.model, f"it takes {' and '.join(program.inputs)}, and the engine reads token ids"
            )
        if "pixel_values" in program.inputs:
            raise model_rejection(self.model, "it takes pictures as well, and the engine reads token ids alone")
        self.source: Reader | None = None  # of the encoder
        if side is None:
            graph = inline_mixers(program)
            two = is_encoder_decoder(program.model)
            source_side, side = (
                encoder_decoder.split_stacks(graph) if two else (None, encoder_decoder.single_stack(graph))
            )
            self.source = Reader(program, self.numbers, self.model, source_side) if source_side else None
        self.side = side
        config = pretrained(self.model).config.get_text_config(**({} if side.ids == "input_ids" else {"decoder": True}))
        ids = program.inputs[side.ids]
        layout = Layout(ids.numel())
        context = next(filter(None, (getattr(config, name, None) for name in POSITIONS)), None)
        if type(context) is not int and not any(n.meta.get("role") == "rotary" for n in side.nodes):
            context = ENDLESS  # states and slopes by distance have no end
        if type(context) is not int:
            reason = "its config states no longest context (`max_position_embeddings`)"
            raise model_rejection(self.model, reason)
        self.ids = TokenIds(layout)
        self.shape = ids.shape
        words = (self.source and getattr(config, "decoder_vocab_size", None)) or config.vocab_size
        self.plan: Plan = Plan(layout, words, context, encoder=self.source.plan if self.source else None)
        self.values: dict[fx.Node, Any] = {}
        behind = self.source.positions if self.source else None
        self.positions: Positions = Positions(self.model, self.values, layout, self.shape, behind)
        self.attending, self.scanning, self.tables = AttentionRules(self), ScanRules(self), Tables(self)
        self.mixtures, self.writing, self.computing = MixtureRules(self), EagerAttentionRules(self), FunctionRules(self)
        self.shifting, self.queues, self.key_biases = (
            ShiftRules(self),
            SortedDispatchRules(self),
            KeyScoreBiasRules(self),
        )
        self.offering, self.deciding = DenseDispatchRules(self), InlineRouterRules(self)
        self.last: tuple[str, linears.Linear] | None = None  # linear layer that was read, and its entry
        self.lowered: dict[str, Tensor] = {}  # packed weights that a pass left, by their entries
        self.current = side.nodes[0]  # the node that is being read

    def build_plan(self) -> Plan:
        if self.source is not None:
            self.source.build_plan()
        for node in follow(self.side.nodes, "reading the graph", len(self.side.nodes)):
            self.current = node
            if node.op == "output":
                self.plan.logits = self._lower_output(node)
            else:
                try:
                    self.values[node] = self._evaluate_node(node)
                except IrregularColumns:
                    reason = "it mixes numbers of different tokens, or picks others for each"
                    raise self.rejection(node, reason) from None
        if self.side.encodes:  # its keys and values come to be known when its decoder is read
            self.plan.context = min(self.plan.context, MAX_BIDIRECTIONAL)
            return self.plan
        self.positions.forget()
        if self.source is not None:
            self.source.positions.forget()
        if self.last and not self.plan.output.states:
            linears.pack_head(self.plan, self.numbers, *self.last)
        linears.tie_embedding_weights(self.plan, self.numbers, self.lowered)
        return self.plan

    def rejection(self, node: fx.Node, reason: str) -> Exception:
        return rejection(node, self.model, reason)

    # -- values ----------------------------------------------------------------------------------------------

    def _lower_output(self, node: fx.Node) -> int:
        value = node.args[0] if isinstance(node.args[0], fx.Node) else None
        rows = self.values.get(value) if value is not None else None
        bidirectional = any(step.get("whole") for step in self.plan.steps)
        # T5 and Llama 4's text part with a head have no base model of their own: the head itself is asked for.
        headless_kind = self.source is not None or self.model.base_model is self.model
        headless = headless_kind and pretrained(self.model).get_output_embeddings() is None
        self.plan.output = output_form = Output(headless, bidirectional, isinstance(rows, FirstTokenRows))
        rows = rows.rows if isinstance(rows, FirstTokenRows) else rows
        if not isinstance(rows, Rows) or (output_form.speaks and rows.index.shape[-1] != self.plan.vocabulary):
            raise model_rejection(self.model, f"its result is not {self.plan.vocabulary} logits for each token")
        if self.source is not None and not output_form.speaks:
            raise model_rejection(self.model, "behind an encoder the engine runs a decoder with a head of logits")
        if rows.index.dim() != 3:
            raise model_rejection(self.model, "its result is not one row of numbers for each token or text")
        if bidirectional:
            self.plan.context = min(self.plan.context, MAX_BIDIRECTIONAL)
        return self.register(rows)[0]

    def _evaluate_node(self, node: fx.Node) -> Any:
        if self.source is not None and node in self.source.values:
            value = self.source.values[node]
            return mapped(value, lambda x: SourceTokens(x) if isinstance(x, Rows) else x)
        if node.op == "placeholder":
            return self._placeholder_value(node)
        if node.op == "get_attr":
            return attribute(self.model, str(node.target))
        args, kwargs = (fx.map_arg(part, self.values.__getitem__) for part in (node.args, node.kwargs))
        flat = leaves((args, kwargs))
        role = node.meta.get("role")
        if role in ("mask", "rotary_embedding"):
            return Mask(node) if role == "mask" else Positional(node)
        if role == "cache_length":
            return Positional(node)
        if any(isinstance(x, SourceTokens) for x in flat) and role != "attention":
            return self._from_source(node, role, args, kwargs)
        if any(isinstance(x, OF_TOKENS) for x in flat):
            return self._lower_token_values(node, role, args, kwargs)
        if any(isinstance(x, Positional) for x in flat):
            return self.sample_size(node, args) if calls.operation(node) in calls.SIZE_CALLS else Positional(node)
        if any(x is CACHE for x in flat):
            raise self.rejection(node, "it reads the cache otherwise than by keys and values")
        if role == "embedding" and self.positions.grows_with_length(node):
            return Positional(node)  # it is handed how many tokens there are
        with torch.no_grad():
            return call_node(node, self.model, args, kwargs)

    def _placeholder_value(self, node: fx.Node) -> Any:
        name = self.side.owns(str(node.target))
        if name == "input_ids":
            return Rows(self.plan.layout.rows(self.ids.register).view(self.shape))
        if node.target == "cache":
            return CACHE
        return Positional(node) if name in ("position_ids", "attention_mask") else None

    def _from_source(self, node: fx.Node, role: str | None, args: Any, kwargs: Any) -> Any:
        """Value computed from the source alone and sizes of the target: part of the encoder."""
        source = self.source
        assert source is not None, "only behind an encoder there is a source"
        if any(isinstance(x, (Rows, CachedRows)) for x in leaves((args, kwargs))):
            raise self.rejection(node, "it mixes what the encoder gives with a target otherwise than by attention")
        plain = [mapped(part, lambda x: x.rows if isinstance(x, SourceTokens) else x) for part in (args, kwargs)]
        source.current = node
        value = source.values[node] = source._lower_token_values(node, role, *plain)
        return mapped(value, lambda x: SourceTokens(x) if isinstance(x, Rows) else x)

    def sample_size(self, node: fx.Node, args: Any) -> Any:
        """A size of something that depends on positions alone: that of the sample batch."""
        shape = node.args[0].meta.get("shape")
        if not isinstance(shape, tuple) or not all(type(n) is int for n in shape):
            return Positional(node)
        return call_node(node, self.model, (torch.empty(shape, device="meta"), *args[1:]), {})

    def size_of(self, node: fx.Node, index: Tensor, arguments: Any) -> Any:
        """A size of a value that has the shape of an index."""
        return call_node(node, self.model, (index, *arguments), {})

    # -- numbers of tokens -----------------------------------------------------------------------------------

    def _lower_token_values(self, node: fx.Node, role: str | None, args: Any, kwargs: Any) -> Any:
        if role == "cache_update":
            return self.attending.lower_cache_update(node, *args)
        if role == "rotary":
            return self.attending.lower_rotary(node, args, kwargs)
        if role == "attention":
            return self.attending.lower_attention(node, args, kwargs)
        kinds = {type(x) for x in leaves((args, kwargs))}
        if FirstTokenRows in kinds:
            return self._lower_first_token(node, role, args, kwargs)
        if RouterLogits in kinds and role != "experts":
            return self.deciding.lower(node, args)
        if KeyScoreBias in kinds or self.key_biases.is_start(node, args):
            return self.key_biases.lower(node, args, kwargs)
        if SortedDispatchIndex in kinds or SortedRows in kinds:
            return self.queues.lower(node, role, args, kwargs)
        if DenseDispatch in kinds:
            return self.offering.lower(node, role, args, kwargs)
        if ScorePairs in kinds or {Rows, CachedRows} <= kinds:
            return self.writing.lower(node, args)
        if CachedRows in kinds:
            plain = [mapped(part, lambda x: x.rows if isinstance(x, CachedRows) else x) for part in (args, kwargs)]
            value = self._lower_token_values(
                node, role, *plain
            )  # of each token when it comes; what is made of it is kept
            return mapped(value, lambda x: CachedRows(x) if isinstance(x, Rows) else x)
        if role in ("dropout", "identity", "slice_logits", "padding"):
            return args[0]  # sequences of the engine have no padding
        if role == "ssm_conv":
            return self.scanning.lower_convolution(node, args, kwargs)
        if role == "ssm_scan":
            return self.scanning.lower_scan(node, args, kwargs)
        if node.op == "call_module":
            return self._lower_module(node, role, args, kwargs)
        return self.computing.lower_function(node, args, kwargs)

    def _lower_first_token(self, node: fx.Node, role: str | None, args: Any, kwargs: Any) -> Any:
        """Value computed from a text's first token, computed for each."""
        if node.op != "call_module" and calls.operation(node) not in (*calls.UNARY, *calls.SAME):
            raise self.rejection(node, "it does more with a text's first token than layers and functions of it")
        plain = [mapped(part, lambda x: x.rows if isinstance(x, FirstTokenRows) else x) for part in (args, kwargs)]
        value = self._lower_token_values(node, role, *plain)
        if not isinstance(value, Rows):
            raise self.rejection(node, "it does more with a text's first token than layers and functions of it")
        return FirstTokenRows(value)

    def _lower_module(self, node: fx.Node, role: str | None, args: Any, kwargs: Any) -> Any:
        module, x = self.model.get_submodule(str(node.target)), args[0] if args else None
        if role == "embedding":
            is_positional = self.positions.ignores_ids(node)
            return Positional(node) if is_positional else self.tables.lower_embedding(node, module, args)
        if role == "router" and isinstance(x, Rows) and not kwargs:
            return self.mixtures.lower_router(node, module, x, args[1:])
        if role == "experts":
            return self.mixtures.lower_experts(node, module, args, kwargs)
        if isinstance(module, nn.Conv1d) and isinstance(x, Rows) and len(args) == 1 and not kwargs:
            return self.shifting.lower_depthwise_convolution(node, module, x)
        if isinstance(module, nn.ZeroPad2d) and isinstance(x, Rows):
            return self.shifting.lower_padding(x, module.padding)
        recurrence = None if kwargs else recurrences.lower_recurrence(self, node, module, args)
        if recurrence is not None:
            return recurrence
        mixed = rwkv.lower_rwkv(self, node, module, args, kwargs)
        if mixed is not None:
            return mixed
        decay = linear_attention.lower_linear_attention(self, node, module, args, kwargs)
        if decay is not None:
            return decay
        queue = self.queues.lower_router(node, module, args, kwargs)
        if queue is not None:
            return queue
        if indexers.selects_all_positions(self, module, args, kwargs):
            return AllPositions(node)
        if not isinstance(x, Rows) or len(args) > 1 or kwargs:
            gates = [*args[1:], *kwargs.values()]
            if role == "norm" and isinstance(x, Rows) and len(gates) == 1 and isinstance(gates[0], Rows):
                return self.scanning.lower_gated_norm(node, module, x, gates[0])
            raise self.rejection(node, f"a {type(module).__name__} is not among the engine's steps")
        if role == "linear":
            linear = linears.recognise_linear(module)
            if linear is not None:
                return self.lower_linear(node, x, str(node.target), linear)
        if role == "norm":
            return norms.lower_norm(self, node, module, x)
        if role == "activation":
            return self.lower_activation(node, x)
        raise self.rejection(node, f"a {type(module).__name__} is not among the engine's steps")

    def lower_activation(self, node: fx.Node, x: Rows) -> Rows:
        return Rows(x.index, ElementwiseExpr(self.model.get_submodule(str(node.target)), (x.pending,), node))

    # -- layers ----------------------------------------------------------------------------------------------

    def lower_linear(self, node: fx.Node, x: Rows, name: str, layer: linears.Linear, weights: str = "") -> Rows:
        """`weights`: other numbers than those of all linear layers."""
        outputs, width = layer.shape
        is_zero = bool((x.index < 0).all()) and layer.bias is None
        if is_zero or not x.index.numel():  # of zeros, and of none of the tokens
            return Rows(torch.full((*x.index.shape[:-1], outputs), BEFORE))
        x = self.materialised(x)
        register, _ = self.register(x)
        if x.index.shape[-1] != width or self.plan.layout.widths[register] != width:
            reason = "a linear layer over a part of what a token has is not among the engine's steps"
            raise self.rejection(node, reason)
        entry = Entry("packed", layer.shape, layer.packer(weights or self.numbers.weights, self.numbers.group))
        weight = self.plan.add_entry(f"{name}.weight", entry, layer.key)
        if layer.packed is not None:
            self.lowered[weight] = layer.packed
        self.last = weight, layer
        bias = None if layer.bias is None else self.plan.vector_entry(f"{name}.bias", layer.bias)
        output = self.plan.append_step("linear", outputs, x=register, weight=weight, bias=bias)
        _, token = self.plan.layout.locate(x.index[..., 0])
        return Rows(self.plan.layout.rows(output)[token])

    # -- registers -------------------------------------------------------------------------------------------

    def register(self, value: Rows) -> tuple[int, RowLayout]:
        """The register that holds a value's rows in the order of the value, made if need be."""
        lane = self.plan.layout.row_layout(self.materialised(value).index)
        return self.plan.gather(lane.columns), lane

    def elementwise(self, op: str, shape: torch.Size, lane: RowLayout, **fields: Any) -> Rows:
        """A step whose result lies as its operands do."""
        register = self.plan.append_step(op, len(lane.columns), **fields)
        return Rows(self.plan.layout.spread(register, lane.order, shape))

    def materialised(self, value: Rows) -> Rows:
        """The value without a pending function: steps compute it."""
        if bool((value.index < 0).any()):
            value = Rows(self.shifting.without_places_before(value.index), value.pending)
        return self.without_pending(value)

    def without_pending(self, value: Rows) -> Rows:
        """The same, with places before a text as they are, where no function is pending that would change them."""
        if value.pending is None:
            return value
        return self._apply_elementwise(Rows(value.index), value.pending)

    def _apply_elementwise(self, base: Rows, function: ElementwiseExpr) -> Rows:
        recognised = activations.recognise_elementwise(function)
        if recognised is None:
            return self._apply_piecewise(base, function)
        if not recognised.op:
            return base
        register, lane = self.register(base)
        return self.elementwise(recognised.op, base.index.shape, lane, x=register, **recognised.fields)

    def _apply_piecewise(self, base: Rows, function: ElementwiseExpr) -> Rows:
        """A function that no step computes, operand by operand."""
        node = self.current
        op = {calls.BINARY[name]: name for name in ("add", "sub", "mul")}.get(function.call)
        parts = [
            base if part is None else self._apply_elementwise(base, part) if isinstance(part, ElementwiseExpr) else part
            for part in function.operands
        ]
        first, second = (*parts, None, None)[:2]
        if len(parts) == 1 and function.operands[0] is not None and isinstance(first, Rows):
            return self._apply_elementwise(first, ElementwiseExpr(function.call, (None,), function.at))
        if len(parts) == 2 and op and isinstance(first, Rows) and isinstance(second, Rows):
            return self.computing.elementwise_of_two(node, op, first, second)
        if len(parts) == 2 and any(part is not base for part in parts if isinstance(part, Rows)):
            operand = next(part for part in parts if isinstance(part, Rows))
            numbers = tuple(None if isinstance(part, Rows) else part for part in parts)
            return self._apply_elementwise(operand, ElementwiseExpr(function.call, numbers, function.at))
        raise self.rejection(function.at or node, "an elementwise function that is not among the engine's steps")
