"""What a module answers to where it is one of transformers', or one of effc's that stands for one."""

from typing import TYPE_CHECKING, cast

from torch import nn

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def pretrained(model: nn.Module) -> "PreTrainedModel":
    """The same module, for the type checker: who asks it for its config, head or generation knows what it is.

    No check while it runs: a model of the native engine, or of ONNX, is no `PreTrainedModel` and answers like one.
    """
    return cast("PreTrainedModel", model)
