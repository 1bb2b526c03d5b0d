"""Images, each with a class, for models that look at them."""

from collections.abc import Iterator
from typing import Any

from ....dsl.syntax.nearest import nearest_name_help
from ...models.checkpoints.safetensors_header import read_safetensors_header
from ...plugin.context import Context
from ...plugin.interfaces import param
from ..records import invalid_record, no_field
from ..sampled_rows import SampledRows

INTEGER_DTYPES = ("U8", "I64", "I32", "I16", "I8")


class Images(SampledRows):
    """Images, each with a class, for models that look at them.

    Two tensors of a safetensors file: images [rows, channels, height, width], as bytes (then they are divided by 255)
    or in float32 as the model takes them, and the number of each one's class, [rows]. No file says what mean and spread
    a model expects: normalise them before.

    Source: own.
    Example: data digits = images("digits.safetensors", samples: 32)
    """

    path: str = param("A safetensors file, relative to the recipe.", positional=True)
    images: str = param("Name of the tensor of images.", default="images")
    classes: str | None = param("Name of the tensor of classes; rows have none where it is left out.", default=None)

    def identity_facts(self, ctx: Context) -> dict[str, Any]:
        facts = super().identity_facts(ctx)
        return {"tensors": [facts.pop("images"), facts.pop("classes")], **facts}

    def rows(self, tokenizer: Any, ctx: Context) -> Iterator[Any]:
        images = self._read_tensor(self.images, ("U8", "F32"), 4, ctx)
        return self.sample(images.float().div(255) if not images.is_floating_point() else images, ctx)

    def labels(self, tokenizer: Any, ctx: Context) -> Iterator[int] | None:
        if self.classes is None:
            return None
        return (int(n) for n in self.sample(self._read_tensor(self.classes, INTEGER_DTYPES, 1, ctx), ctx))

    def _read_tensor(self, name: str, dtypes: tuple[str, ...], ndim: int, ctx: Context) -> Any:
        from safetensors import safe_open

        (path,) = self.files(ctx)
        slots = read_safetensors_header(path).slots
        if name not in slots:
            raise no_field(f"{path} has no tensor `{name}`", help=nearest_name_help(name, slots, "it has")).rejection()
        slot = slots[name]
        if slot.dtype not in dtypes or len(slot.shape) != ndim or min(slot.shape) < 1:
            raise invalid_record(
                f"`{name}` of {path} is {slot.dtype} of shape {list(slot.shape)}",
                help=f"{' or '.join(dtypes)} with {ndim} axes, none of them empty",
            ).rejection()
        with safe_open(path, "pt") as file:
            return file.get_tensor(name)
