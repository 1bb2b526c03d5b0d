"""Type of modules that are transformers' models, or effc's replacements of them."""

import sys
from typing import TYPE_CHECKING, TypeGuard, cast

from torch import nn

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def pretrained(model: nn.Module) -> "PreTrainedModel":
    """Cast of a module for the type checker, for callers that read its config or head, or generate.

    No check while it runs: a model of the native engine, or of ONNX, is no `PreTrainedModel` and answers like one.
    """
    return cast("PreTrainedModel", model)


def is_pretrained(model: object) -> "TypeGuard[PreTrainedModel]":
    """Whether it is one of transformers' own. Their half is not imported to tell, which takes seconds that a native
    artifact need not wait: before somebody imported it, nothing is."""
    modeling = sys.modules.get("transformers.modeling_utils")
    return modeling is not None and isinstance(model, modeling.PreTrainedModel)
