"""A model that the native engine runs and that generates no text: it gives states, or says what texts or tokens are."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ....dsl.syntax.diagnostics import Fault
from ..inputs import check_mask, check_token_id_tensor, classification_loss, invalid_inputs
from ..model import DecoderModel, Output
from ..position_offsets import other_positions, refuse_visible_padding
from .plan_files import native_damaged

if TYPE_CHECKING:
    from ....kernels.engine import Engine

two_texts = Fault("two-texts-in-a-row", "The engine encodes one text a row, and a row holds two.", exit="usage")
no_generation = Fault("no-generation", "A model that encodes texts is asked to write some.", exit="usage")
_FIELDS = ("states", "whole", "first")


class NativeEncoder(DecoderModel):
    """`last_hidden_state` [b, t, d] of a model without a head, else `logits`, of tokens [b, t, n] or of texts [b, n].

    Of masked tokens there are zeros. `facts["gives"]` says which of these it is (`plan.Gives`), `facts["pad"]` with
    which token rows are filled up.
    """

    engine: "Engine"

    def __init__(self, *args: Any, **options: Any):
        super().__init__(*args, **options)
        output_form = self.facts["gives"]
        if not (isinstance(output_form, Mapping) and all(type(output_form.get(name)) is bool for name in _FIELDS)):
            raise native_damaged("plan.json does not say what its model gives", help="compile again").rejection()
        self.states, self.first = output_form["states"], output_form["first"]
        pad = self.facts.get("pad")
        self.config.pad_token_id = pad if type(pad) is int else None
        first_position = self.facts.get("position", 0)
        self.first_position = first_position if type(first_position) is int else 0

    def can_generate(self) -> bool:
        return False

    def generate(self, *_: Any, **__: Any) -> Any:  # type: ignore[override]
        raise no_generation(
            "this model encodes texts and generates none", help="call it, or `effc test` it"
        ).rejection()

    @torch.no_grad()
    def forward(  # type: ignore[override]  # as transformers calls an encoder: it has no cache, and has segments
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        return_dict: bool = True,
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
        labels: Tensor | None = None,
    ) -> Output:
        """Rows of one text each; positions are those of a text's own tokens. What is given is always a mapping.

        labels   classes [b, t] of tokens, -100 where none counts, or [b] of texts: `loss` is then theirs
        """
        self.refuse_states(output_hidden_states=output_hidden_states, output_attentions=output_attentions)
        check_token_id_tensor(input_ids)
        check_mask(attention_mask, input_ids)
        if labels is not None and self.states:
            raise invalid_inputs("the model has no head that `labels` are of", help="leave `labels` out").rejection()
        if token_type_ids is not None and bool((token_type_ids != 0).any()):
            raise two_texts(
                "`token_type_ids` tells two texts of a row apart", help="give the model one text a row"
            ).rejection()
        mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        if attention_mask is None and self.first_position and bool((input_ids == self.config.pad_token_id).any()):
            raise other_positions(
                "rows are filled up, and nothing says where", help="give the model their `attention_mask`"
            ).rejection()
        if position_ids is None:
            refuse_visible_padding(input_ids, mask, self.uncounted)
        self._refuse_other_positions(mask.bool(), position_ids)
        rows = [ids[is_token] for ids, is_token in zip(input_ids, mask.bool(), strict=True)]
        width = self.engine.width
        output = torch.zeros((len(rows), width) if self.first else (*input_ids.shape, width))
        for start in range(0, len(rows), max(1, self.num_free_sequences)):
            part = range(start, min(len(rows), start + max(1, self.num_free_sequences)))
            nonempty = [row for row in part if len(rows[row])]
            if nonempty:
                self._encode_rows_into(output, mask.bool(), nonempty, [rows[row] for row in nonempty])
        loss = {} if labels is None else {"loss": classification_loss(output, labels, mask)}
        return Output(**loss, **{"last_hidden_state" if self.states else "logits": output})

    def _refuse_other_positions(self, mask: Tensor, position_ids: Tensor | None) -> None:
        """Refuse rows whose tokens the model would count otherwise than a text's own."""
        expected = (mask.cumsum(-1) - 1).clamp(min=0)
        requested = torch.arange(mask.shape[1]) if position_ids is None else position_ids - self.first_position
        difference = requested.expand_as(expected) - expected
        if position_ids is None and not any(step["op"] == "positions" for step in self.plan["steps"]):
            difference = difference - difference.masked_fill(~mask, 1 << 40).amin(
                1, keepdim=True
            )  # how far apart is what counts
        if bool(difference[mask].any()):
            raise other_positions(
                "the tokens of a text would have other positions than 0, 1, 2 and so on",
                help='fill rows up behind their texts (`padding_side="right"`), or leave `position_ids` out',
            ).rejection()

    def _encode_rows_into(self, output: Tensor, mask: Tensor, row_indices: list[int], texts: list[Tensor]) -> None:
        """Write what the engine gives for some rows to where it belongs."""
        with self.temporary_sequences(len(texts)) as numbers:
            states_flat = self.append_tokens(dict(zip(numbers, texts, strict=True)), "first" if self.first else "all")
        if self.first:
            output[row_indices] = states_flat
            return
        for row, states in zip(row_indices, states_flat.split([len(text) for text in texts]), strict=True):
            output[row, mask[row]] = states
