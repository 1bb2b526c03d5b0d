"""Rows of whatever a model takes, made elsewhere: a tensor for each input."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from ....dsl.syntax.nearest import nearest_name_help
from ...models.checkpoints.safetensors_header import Header, read_safetensors_header
from ...plugin.context import Context
from ...plugin.interfaces import param
from ...plugin.row_checks import refuse_rows_beyond_model
from ..records import invalid_record, no_field
from ..sampled_rows import SampledRows


class Tensors(SampledRows):
    """Rows of whatever a model takes, made elsewhere: a tensor for each input.

    A safetensors file has a tensor [rows, ...] under the name of each input: `sample`, `timestep` and
    `encoder_hidden_states` of a diffusion model, `pixel_values` and `input_ids` of one that sees and reads,
    `input_features` and `decoder_input_ids`, which is what is to be said, of one that hears. Shapes are those of the
    model's config, or of its `dummy_inputs`; token ids are checked against its vocabulary.

    Source: own.
    Example: data batch = tensors("batch.safetensors", samples: 2)
    """

    path: str = param("A safetensors file, relative to the recipe.", positional=True)

    def rows(self, tokenizer: Any, ctx: Context) -> Iterator[Any]:
        import torch
        from safetensors import safe_open

        from ...models.rows.packed_inputs import pack_inputs

        (path,) = self.files(ctx)
        header, expected = read_safetensors_header(path), _row_shape_by_input(ctx)
        names = _checked_tensor_names(header, expected, path)
        with safe_open(path, "pt") as file:
            tensors = {name: file.get_tensor(name) for name in names}
        for name, values in tensors.items():
            _refuse_incompatible_values(name, values, expected[name], path)
            if expected[name] is None:
                refuse_rows_beyond_model(values.long(), name, ctx.origin)
        if len({len(x) for x in tensors.values()}) > 1:
            counts = ", ".join(f"`{name}` {len(x)}" for name, x in tensors.items())
            raise invalid_record(f"the tensors of {path} have different numbers of rows: {counts}").rejection()
        (first, *remaining) = tensors.values()
        single = first if first.is_floating_point() else first.to(torch.int64)
        rows_tensor = pack_inputs(tensors, tuple(names)) if remaining else single
        return self.sample(rows_tensor, ctx)


def _row_shape_by_input(ctx: Context) -> dict[str, tuple[int, ...] | None]:
    """The shape of each input in a row, in the order of a packed row; None for tokens, of any number."""
    import torch

    from ...ir.capture.sample import sample_inputs
    from ...models.rows.packed_inputs import packed_input_parts, token_input_name

    with torch.device("meta"):
        model = ctx.origin.build().to("meta")
        inputs = {name: x for name, x in sample_inputs(model).items() if isinstance(x, torch.Tensor)}
    several = {part.name: part.shape for part in packed_input_parts(model)}
    if several:
        return several | ({token_input_name(model): None} if token_input_name(model) else {})
    name, first = next(iter(inputs.items()))
    return {name: None if name == "input_ids" else tuple(first.shape[1:])}


def _checked_tensor_names(header: Header, expected: Mapping[str, Any], path: Path) -> list[str]:
    """The names of what is read, in the order of a row; refuses a file that lacks one, or has another."""
    for name in expected:
        if name not in header.slots:
            raise no_field(
                f"{path} has no tensor `{name}`", help=nearest_name_help(name, header.slots, "it has")
            ).rejection()
    unknown = sorted(set(header.slots) - set(expected))
    if unknown:
        names_text = ", ".join(f"`{name}`" for name in expected)
        raise invalid_record(f"{path} has a tensor `{unknown[0]}`, and the model takes {names_text}").rejection()
    return list(expected)


def _refuse_incompatible_values(name: str, values: Any, shape: tuple[int, ...] | None, path: Path) -> None:
    """Refuse what is no row of that input, and numbers that a packed row would round."""
    from ...models.rows.packed_inputs import EXACT

    fits = values.dim() == 2 and not values.is_floating_point() if shape is None else values.shape[1:] == shape
    if not fits or not len(values):
        form = "rows, tokens" if shape is None else ", ".join(["rows", *map(str, shape)])
        raise invalid_record(
            f"`{name}` of {path} has the shape {list(values.shape)}", help=f"the model takes [{form}]"
        ).rejection()
    if values.is_floating_point() and not bool(values.isfinite().all()):
        raise invalid_record(f"`{name}` of {path} holds numbers that are not finite").rejection()
    if not values.is_floating_point() and bool((values.abs() >= EXACT).any()):
        raise invalid_record(f"`{name}` of {path} holds whole numbers of {EXACT} and more").rejection()
