"""Whether rows of tokens are such as a model can take."""

from typing import TYPE_CHECKING

from ...dsl.syntax.diagnostics import Fault, Reject

if TYPE_CHECKING:
    import torch

    from ..models.checkpoints.origin import Origin

invalid_rows = Fault(
    "bad-rows", "Rows of tokens do not fit the model: ids that its embedding lacks, or more positions than it has."
)


def refuse_rows_beyond_model(rows: "torch.Tensor", name: str, origin: "Origin") -> None:
    """Reject ids that the model's embedding lacks and rows that are longer than its positions."""
    if rows.is_floating_point():
        return
    faults = []
    top, low = int(rows.max()), int(rows.min())
    if low < 0:
        faults.append(invalid_rows(f"`{name}` holds the token id {low}"))
    highest_decoded = int(rows[:, rows.shape[1] // 2 :].max())  # by the decoder of two vocabularies
    for highest, known in ((top, origin.token_id_count), (highest_decoded, origin.target_token_id_count)):
        if known is not None and highest >= known:
            faults.append(
                invalid_rows(
                    f"`{name}` holds the token id {highest}; {origin.label} has {known}",
                    help="take the tokenizer that the model was trained with",
                )
            )
            break
    if origin.positions is not None and rows.shape[1] > origin.positions:
        faults.append(
            invalid_rows(
                f"`{name}` has rows of {rows.shape[1]} tokens; {origin.label} has {origin.positions} positions",
                help=f"at most `length: {origin.positions}`",
            )
        )
    if faults:
        raise Reject(*faults)
