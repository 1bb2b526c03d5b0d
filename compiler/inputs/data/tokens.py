"""Rows of token ids that were made elsewhere."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ....dsl.syntax.nearest import nearest_name_help
from ...models.checkpoints.safetensors_header import Header, read_safetensors_header
from ...plugin.context import Context
from ...plugin.interfaces import param
from ...plugin.row_checks import invalid_rows
from ..records import invalid_record, no_field
from ..sampled_rows import SampledRows

INTEGERS = ("I64", "I32", "I16", "I8", "U8", "U16", "U32")


class Tokens(SampledRows):
    """Rows of token ids that were made elsewhere.

    One integer tensor [rows, length] in a safetensors file. Ids are checked against the model's vocabulary.
    The tokenizer plays no part.

    Source: own.
    Example: data calib = tokens("rows.safetensors", samples: 64)
    """

    path: str = param("A safetensors file, relative to the recipe.", positional=True)
    tensor: str | None = param("Name of the tensor; the only one where it is left out.", default=None)

    def rows(self, tokenizer: Any, ctx: Context) -> Iterator[Any]:
        import torch
        from safetensors import safe_open

        (path,) = self.files(ctx)
        header = read_safetensors_header(path)
        name = self._resolve_tensor_name(header, path)
        slot = header.slots[name]
        if slot.dtype not in INTEGERS or len(slot.shape) != 2:
            raise invalid_record(
                f"`{name}` of {path} is {slot.dtype} of {len(slot.shape)} dimensions",
                help="token rows are integers of shape [rows, length]",
            ).rejection()
        if min(slot.shape) < 1 or slot.shape[1] < 2:
            raise invalid_rows(
                f"`{name}` of {path} has {slot.shape[0]} rows of {slot.shape[1]} tokens",
                help="at least one row of two tokens",
            ).rejection()
        with safe_open(path, "pt") as file:
            ids = file.get_tensor(name).to(torch.int64)
        return self.sample(ids, ctx)

    def _resolve_tensor_name(self, header: Header, path: Path) -> str:
        if self.tensor is None and len(header.slots) == 1:
            return next(iter(header.slots))
        if self.tensor is None or self.tensor not in header.slots:
            fact = f"has no tensor `{self.tensor}`" if self.tensor else f"has {len(header.slots)} tensors"
            raise no_field(
                f"{path} {fact}", help=nearest_name_help(self.tensor or "", header.slots, "it has")
            ).rejection()
        return self.tensor
