"""Modules that moved in 0.2, importable under the paths that documents and emitted artifacts of 0.1 name."""

import sys
import warnings
from collections.abc import Sequence
from importlib import import_module
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType

# Packages are here for their submodules' sake.
MODULE_ALIASES = {
    "effc.compiler.api": "effc.compiler.driver.api",
    "effc.compiler.federation": "effc.compiler.apps.federation",
    "effc.compiler.federation.flower": "effc.compiler.apps.federation.flower",
    "effc.compiler.report": "effc.compiler.core",
    "effc.compiler.report.progress": "effc.compiler.core.events",
    "effc.compiler.rows": "effc.compiler.models.rows",
    "effc.compiler.rows.prompts": "effc.compiler.models.rows.prompt_positions",
    "effc.dsl.builder": "effc.dsl.syntax.builder",
    "effc.dsl.diagnostics": "effc.dsl.syntax.diagnostics",
    "effc.dsl.render": "effc.dsl.syntax.render",
}


class ModuleAliases(MetaPathFinder, Loader):
    """Finder of the names in `MODULE_ALIASES`; importing one warns and gives the module at its new path."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        return ModuleSpec(fullname, self) if fullname in MODULE_ALIASES else None

    def exec_module(self, module: ModuleType) -> None:
        old = module.__name__
        warnings.warn(
            f"{old} is {MODULE_ALIASES[old]} now; the old path goes with 0.3", DeprecationWarning, stacklevel=2
        )
        sys.modules[old] = import_module(MODULE_ALIASES[old])


def install() -> None:
    """Let `import` know the old paths; nothing is imported before it is used."""
    if not any(isinstance(finder, ModuleAliases) for finder in sys.meta_path):
        sys.meta_path.append(ModuleAliases())
