"""What a module answers to where it is one of transformers', or one of effc's that stands for one."""

import sys
from typing import TYPE_CHECKING, TypeGuard, cast

from torch import nn

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def pretrained(model: nn.Module) -> "PreTrainedModel":
    """The same module, for the type checker: who asks it for its config, head or generation knows what it is.

    No check while it runs: a model of the native engine, or of ONNX, is no `PreTrainedModel` and answers like one.
    """
    return cast("PreTrainedModel", model)


def is_pretrained(model: object) -> "TypeGuard[PreTrainedModel]":
    """Whether it is one of transformers' own. Their half is not imported to tell, which takes seconds that a native
    artifact need not wait: before somebody imported it, nothing is."""
    modeling = sys.modules.get("transformers.modeling_utils")
    return modeling is not None and isinstance(model, modeling.PreTrainedModel)
