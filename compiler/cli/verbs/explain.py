"""`effc explain`: the manual page of a word of the language or of a diagnostic."""

from typing import Annotated

import typer

from .flags import SharedFlags, make_verb
from .help_sections import SECTIONS
from .options import argument

_name = argument(
    "NAME", "A pass, target, metric, ..., a concept such as `selector`, a shipped recipe, or the slug of a diagnostic."
)


def register(app: typer.Typer) -> None:
    @make_verb(app)
    def explain(name: Annotated[str, _name], shared: SharedFlags) -> None:
        """Explain a word of recipes, or a diagnostic by its slug."""
        from ....dsl.syntax.diagnostics import Reject
        from ..explain import explain_page

        is_verb = any(name in verbs for verbs in SECTIONS.values())
        verb_line = f"`effc {name} --help` says what this verb does and takes"
        try:
            text = explain_page(name) + (f"\n\n{verb_line}" if is_verb else "")
        except Reject:
            if not is_verb:
                raise
            text = verb_line
        if shared.format == "json":
            shared.screen.answer_json("explain", name=name, text=text)
        else:
            shared.screen.answer(text.rstrip("\n"))
