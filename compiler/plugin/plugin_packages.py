"""Installed packages of plug-ins: passes, targets, metrics, data and sources of models by others.

A package names its import package in the entry point group `effc.plugins`:

    [project.entry-points."effc.plugins"]
    acme = "effc_acme"

`effc_acme/passes/acme/halve.py` is then the pass `acme.halve`. Folders are looked up and headers read without importing
anything: code of a package runs where a recipe is compiled that names a plug-in of it, or an artifact of its target is
opened.
"""

import os
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from importlib.metadata import Distribution, distributions
from importlib.util import find_spec
from pathlib import Path

from ...dsl.syntax.diagnostics import Fault

GROUP = "effc.plugins"
FOLDERS = {"pass": "passes", "target": "targets", "metric": "metrics", "data": "data", "model": "models"}

invalid_plugin = Fault(
    "bad-plugin",
    "An installed package brings a plug-in that effc can't take.\n\n"
    "A package in the entry point group `effc.plugins` has folders `passes`, `targets`, `metrics`, `data` or `models` "
    "with one class a file, whose header is literal, and no name that effc or another package has: `effc explain` and "
    "docs/plugins.md show one.",
    exit="environment",
)


@dataclass(frozen=True)
class PluginPackage:
    """Import package with plug-ins, its folder, and the distribution that brought it."""

    name: str
    folder: Path
    distribution: Distribution


def plugin_folders(kind: str) -> Mapping[str, Path]:
    """Import package -> folder on disk, of every installed package that has plug-ins of a kind."""
    roots = {f"{p.name}.{FOLDERS[kind]}": p.folder / FOLDERS[kind] for p in installed_plugin_packages()}
    return {package: folder for package, folder in roots.items() if folder.is_dir()}


def installed_plugin_packages() -> tuple[PluginPackage, ...]:
    """Installed packages with plug-ins. Raises Reject (bad-plugin) where one's folder is missing.

    The working directory is no place to install packages: whoever writes there must not bring code.
    """
    return _installed_plugin_packages(tuple(path for path in sys.path if path and not _is_working_directory(path)))


def _is_working_directory(path: str) -> bool:
    try:
        return os.path.samefile(path, os.curdir)
    except OSError:  # there is no such folder
        return False


@cache
def _installed_plugin_packages(search_paths: tuple[str, ...]) -> tuple[PluginPackage, ...]:
    plugins: dict[str, PluginPackage] = {}
    for distribution in distributions(path=list(search_paths)):
        for entry in distribution.entry_points.select(group=GROUP):
            if entry.value not in plugins:  # the first on the path is the one that is imported
                folder = _package_folder_or_reject(entry.name, entry.value)
                plugins[entry.value] = PluginPackage(entry.value, folder, distribution)
    return tuple(plugins[name] for name in sorted(plugins))


def _package_folder_or_reject(name: str, package: str) -> Path:
    top, *inner = package.split(".")
    spec = find_spec(top) if top.isidentifier() else None
    for location in (spec and spec.submodule_search_locations) or ():
        if (folder := Path(location, *inner)).is_dir():
            return folder
    raise invalid_plugin(
        f"the entry point `{name}` of {GROUP} names `{package}`, which is no package here",
        help="install the package that has it again, or remove it",
    ).rejection()
