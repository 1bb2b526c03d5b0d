"""From a program's flat graph to a plan: every node is matched by what it computes, or refused by name.

The graph is walked once, with shapes of its sample batch. Values are `Rows` (numbers of tokens), `Positional`
(computed from positions alone) or plain Python and torch values, which are just computed.
"""

from torch import fx, nn

from ....kernels.engine_steps import KV_NUMBERS, MAX_BIDIRECTIONAL
from ...core.events import iterate_and_report
from ...ir.program import Program
from ...models.checkpoints.origin import POSITIONS
from ...models.checkpoints.pretrained import pretrained
from ...models.rows.inputs import is_encoder_decoder
from ...models.rows.packed_inputs import has_fixed_audio_length, is_media_encoder_decoder, sound_shape
from . import encoder_decoder, linears
from .layer_outputs import layer_output_registers
from .layout import IrregularColumns, Layout
from .mixers import copy_with_inlined_mixers
from .plan import Output, Plan
from .plan_builder import PlanBuilder
from .refusal import model_rejection
from .rule_table import RULES
from .values import FirstTokenRows, Rows

ENDLESS = 2**20  # tokens of a sequence, where no table of positions ends and a config names no limit


class Reader(PlanBuilder):
    """One walk over one graph. `plan` is complete when `build_plan` has returned.

    model   whose numbers are read, where the program was captured without any; else the program's own
    side    of an encoder with a decoder: the encoder's, which the reader of the decoder walks first
    """

    def __init__(
        self,
        program: Program,
        weights: str | linears.NumberFormats,
        model: nn.Module | None = None,
        side: encoder_decoder.Stack | None = None,
    ):
        model = model or program.model
        formats = linears.NumberFormats(weights) if isinstance(weights, str) else weights
        _check_inputs(program, model)
        source: Reader | None = None
        if side is None:
            graph = copy_with_inlined_mixers(program)
            if is_encoder_decoder(program.model):
                source_side, side = encoder_decoder.split_encoder_and_decoder(graph)
                source = Reader(program, formats, model, source_side)
            else:
                side = encoder_decoder.stack_of_all_nodes(graph)
        config = pretrained(model).config.get_text_config(**({} if side.ids == "input_ids" else {"decoder": True}))
        ids = program.inputs[side.ids]
        context = next(filter(None, (getattr(config, name, None) for name in POSITIONS)), None)
        if type(context) is not int and not any(n.meta.get("role") == "rotary" for n in side.nodes):
            context = ENDLESS  # states and slopes by distance have no end
        if type(context) is not int:
            reason = "its config states no longest context (`max_position_embeddings`)"
            raise model_rejection(model, reason)
        words = (source and getattr(config, "decoder_vocab_size", None)) or config.vocab_size
        encoder = source.plan if source else None
        plan = Plan(Layout(ids.numel()), words, context, encoder=encoder, kv_numbers=formats.kv_cache)
        super().__init__(model, formats, plan, ids.shape, side, source, RULES)
        self._encoder, self._layers = source, () if source else tuple(program.units)

    def build_plan(self) -> Plan:
        if self._encoder is not None:
            self._encoder.build_plan()
        for node in iterate_and_report(self.side.nodes, "reading the graph", len(self.side.nodes)):
            self.current = node
            if node.op == "output":
                self.plan.logits = self._lower_output(node)
            else:
                try:
                    self.values[node] = self.lower(self.resolve_call(node))
                except IrregularColumns:
                    reason = "it mixes numbers of different tokens, or picks others for each"
                    raise self.rejection(node, reason) from None
        if self.side.encodes:  # its keys and values come to be known when its decoder is read
            self.plan.context = min(self.plan.context, MAX_BIDIRECTIONAL)
            return self.plan
        self.plan.layers = layer_output_registers(self.side.nodes, self.values, self._layers, self.plan.layout)
        self.positions.forget()
        if self._encoder is not None:
            self._encoder.positions.forget()
        if self.last and not self.plan.output.states:
            linears.add_head_weight_entry(self.plan, self.formats, *self.last)
        linears.tie_embedding_weights(self.plan, self.lowered)
        self._check_cache()
        return self.plan

    def _check_cache(self) -> None:
        """Raise Reject where other numbers are named for a cache that the model has not."""
        if self.formats.kv_cache == KV_NUMBERS[0] or (self.plan.output.predicts_next_tokens and self._slots()):
            return
        reason = "it keeps no keys and values of the tokens before, which `kv_cache` is of"
        raise model_rejection(self.model, reason, help="leave `kv_cache` out")

    def _slots(self) -> bool:
        return bool(self.plan.slots or (self.plan.encoder and self.plan.encoder.slots))

    def _lower_output(self, node: fx.Node) -> int:
        value = node.args[0] if isinstance(node.args[0], fx.Node) else None
        rows = self.values.get(value) if value is not None else None
        bidirectional = any(step.get("whole") for step in self.plan.steps)
        # T5 and Llama 4's text part with a head have no base model of their own: the head itself is asked for.
        headless_kind = self.source is not None or self.model.base_model is self.model
        headless = headless_kind and pretrained(self.model).get_output_embeddings() is None
        self.plan.output = output_form = Output(headless, bidirectional, isinstance(rows, FirstTokenRows))
        rows = rows.rows if isinstance(rows, FirstTokenRows) else rows
        if not isinstance(rows, Rows) or (
            output_form.predicts_next_tokens and rows.index.shape[-1] != self.plan.vocabulary
        ):
            raise model_rejection(self.model, f"its result is not {self.plan.vocabulary} logits for each token")
        if self.source is not None and not output_form.predicts_next_tokens:
            raise model_rejection(self.model, "behind an encoder the engine runs a decoder with a head of logits")
        if rows.index.dim() != 3:
            raise model_rejection(self.model, "its result is not one row of numbers for each token or text")
        if bidirectional:
            self.plan.context = min(self.plan.context, MAX_BIDIRECTIONAL)
        return self.register(rows)[0]


def _check_inputs(program: Program, model: nn.Module) -> None:
    if is_media_encoder_decoder(program.model):
        senses = "hears sounds" if sound_shape(program.model) else "sees images"
        reason = f"it {senses}: the engine reads token ids, and has no convolution that sees what follows"
        targets = "`hf` and `onnx` write" if has_fixed_audio_length(program.model) else "`hf` writes"
        raise model_rejection(model, reason, help=f"{targets} it")
    if "input_ids" not in program.inputs:
        raise model_rejection(model, f"it takes {' and '.join(program.inputs)}, and the engine reads token ids")
    if "pixel_values" in program.inputs:
        raise model_rejection(model, "it takes pictures as well, and the engine reads token ids alone")
