"""A small model that is part of effc."""

import sys
from pathlib import Path

from ....dsl.syntax.diagnostics import Fault
from ....dsl.syntax.nearest import nearest_name_help
from ...models.checkpoints.model_folder import origin_of_folder
from ...models.checkpoints.origin import Origin
from ...plugin.context import Context
from ...plugin.interfaces import Source, param

unknown_model = Fault("unknown-model", "The zoo has no model of that name.")


class Zoo(Source):
    """A small model that is part of effc.

    Trained far enough that pruning visibly costs and healing visibly repairs, small enough for a test; needs no
    network. Its folder holds a card with the data, the training and the measured quality.

    Source: own; recipes/zoo.
    Example: model base = zoo("tiny-llama")
    """

    plain = True

    name: str = param("Name of the model.", positional=True)

    def resolve(self, ctx: Context) -> Origin:
        known = zoo_folders_by_name()
        if self.name not in known:
            raise unknown_model(
                f"the zoo has no `{self.name}`", help=nearest_name_help(self.name, known, "it has")
            ).rejection()
        return origin_of_folder(known[self.name], f'zoo("{self.name}")', "auto", ctx.settings)


def zoo_folders_by_name() -> dict[str, Path]:
    """The models of the installed package by name."""
    folders = [Path(root) / "recipes" / "zoo" for root in sys.modules[__package__.split(".")[0]].__path__]
    entries = [f for folder in folders if folder.is_dir() for f in sorted(folder.iterdir()) if f.is_dir()]
    return {f.name: f for f in entries if not f.name.startswith((".", "_"))}
