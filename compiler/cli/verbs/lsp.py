"""`effc lsp`: the language server that editors start."""

import typer

from .flags import SharedFlags, make_verb


def register(app: typer.Typer) -> None:
    @make_verb(app)
    def lsp(shared: SharedFlags) -> int:
        """Serve an editor over stdin and stdout; its extension starts this (docs/editor.md)."""
        from ...core.environment import check_modules

        check_modules(("pygls",), "editor", "`effc lsp`")
        from ..editor.handlers import run_language_server

        return run_language_server()
