"""A flag of Mamba's configs by which transformers makes weights smaller whenever it loads them.

`rescale_prenorm_residual` says how output projections begin: divided by the root of the number of layers. The classes
divide once more after a checkpoint was read, so what it holds is never what runs. NemotronH's class asks first whether
a weight was read.
"""

from collections.abc import Mapping
from typing import Any

FLAG = "rescale_prenorm_residual"
_MODEL_TYPES = ("mamba", "mamba2", "falcon_mamba")
NOTE = (
    f"the config says `{FLAG}`, by which transformers divides `out_proj` by the root of the number of layers at "
    "every load; effc takes the weights as they are stored, and writes `false`"
)


def rescales_residual_weights(config: Mapping[str, Any]) -> bool:
    return config.get("model_type") in _MODEL_TYPES and bool(config.get(FLAG))


def disable_rescaling(config: Any) -> None:
    """Let transformers load and save the weights as they are."""
    if rescales_residual_weights(config.to_dict()):
        setattr(config, FLAG, False)
