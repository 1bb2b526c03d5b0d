"""Options and arguments of verbs."""

from typing import Any

import typer


def option(help: str, *names: str, show_default: bool = False, **settings: Any) -> Any:
    """Option of a verb; most say in their help what holds where they are left out."""
    return typer.Option(*names, help=help, show_default=show_default, **settings)


def argument(metavar: str, help: str, *, show_default: bool = False, **settings: Any) -> Any:
    return typer.Argument(metavar=metavar, help=help, show_default=show_default, **settings)
