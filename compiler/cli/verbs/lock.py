"""`effc lock`: write down all that decides a recipe's artifacts."""

from pathlib import Path
from typing import Annotated

import typer

from .flags import SharedFlags, make_verb
from .options import argument

_recipe = argument("RECIPE", "A recipe file.", readable=False)


def register(app: typer.Typer) -> None:
    @make_verb(app, flag_panels=("inputs", "cache", "machine", "progress"))
    def lock(recipe: Annotated[Path, _recipe], shared: SharedFlags) -> None:
        """Write effspec.lock beside a recipe: hashes of model and data, versions, every default. See --locked."""
        from ...core.quantity import count_text
        from ...driver import api
        from ...plugin.recipe_library import refuse_library_recipe

        refuse_library_recipe(recipe)
        shared.require_environment()
        with shared.listening() as listener:
            path, facts = api.lock(shared.session(recipe, listener))
        if shared.format == "json":
            return shared.screen.answer_json("lock", path=str(path), facts=facts)
        shared.screen.answer(str(path))
        return shared.screen.note(f"locked: {count_text(len(facts), 'fact')} of {recipe.name}")
