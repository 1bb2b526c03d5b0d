"""A folder by the `open` of the target that wrote it, without kernels that the recipe has not put in."""

from torch import nn


def load(folder: str, attention: str) -> nn.Module:
    from effc.compiler.artifacts.load import load as load_model

    model = load_model(folder, kernels=False)  # as the recipe says, like the model in memory
    if attention:
        model.set_attn_implementation(attention)
    return model.eval()
