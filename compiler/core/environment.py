"""Environment of this machine and this Python: package versions against the ranges effc states, instruction sets.

The ranges are read from the installed metadata, so pyproject.toml is the one place that states them.
"""

import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cache
from importlib import metadata
from pathlib import Path
from types import MappingProxyType

from ...dsl.syntax.diagnostics import Diagnostic, Fault, Reject

package_missing = Fault(
    "package-missing",
    "A package that this work needs is not installed.\n\n"
    'Optional packages come in groups: `pip install "effc[gguf]"` installs what the gguf target needs. '
    "`effc doctor` lists all of them.",
    exit="environment",
)
package_version = Fault(
    "package-version",
    "An installed package lies outside the range of versions that effc is tested with.\n\n"
    "Install a version inside the range; `effc doctor` shows every package and its range.",
    exit="environment",
)


@dataclass(frozen=True)
class Package:
    """A distribution that effc names, its range and what is here. `group` is "" for required ones."""

    name: str
    range: str
    group: str = ""
    version: str = ""  # "" where it is missing

    @property
    def state(self) -> str:
        """ "ok", "missing" or "outside" its range."""
        if not self.version:
            return "missing"
        from packaging.specifiers import SpecifierSet

        return "ok" if SpecifierSet(self.range).contains(self.version, prereleases=True) else "outside"

    @property
    def remedy(self) -> str:
        if self.group and self.state == "missing":
            return f'pip install "effc[{self.group}]"'
        return f'pip install "{self.name}{self.range}"'


def required_packages_with_state() -> list[Package]:
    """List the packages that effc requires or can use, with their installed versions, required ones first, test tools
    left out."""
    result = []
    for text in metadata.requires("effc") or ():
        name, version_range, group = _parse_requirement(text)
        if group not in ("test", "dev"):
            result.append(Package(name, version_range, group, installed_version(name)))
    return sorted(result, key=lambda p: p.group != "")


@cache  # parsing the metadata of a hundred packages takes half a second, and each artifact of a front lists them
def distributions_of_dependencies() -> Mapping[str, metadata.Distribution]:
    """Installed distributions that effc asks for, and that these ask for without an extra, by plain name."""
    from packaging.utils import canonicalize_name

    closure: dict[str, metadata.Distribution] = {}
    waiting = ["effc", *(p.name for p in required_packages_with_state())]
    while waiting:
        name = canonicalize_name(waiting.pop())
        if name in closure:
            continue
        try:
            closure[name] = package = metadata.distribution(name)
        except metadata.PackageNotFoundError:
            continue
        if name != "effc":
            waiting += [name for name, _, group in map(_parse_requirement, package.requires or ()) if not group]
    return MappingProxyType(closure)


def refuse_missing_packages(required_names: Iterable[str] = ()) -> None:
    """Reject required packages (or those named) that are missing or outside their range."""
    from packaging.utils import canonicalize_name

    selected = {canonicalize_name(n) for n in required_names}
    chosen = [
        p
        for p in required_packages_with_state()
        if (canonicalize_name(p.name) in selected if selected else not p.group)
    ]
    problems = [package_problem_diagnostic(p) for p in dict.fromkeys(chosen) if p.state != "ok"]
    if problems:
        raise Reject(*problems)


def check_modules(modules: Iterable[str], extra: str, feature: str) -> None:
    """Reject where a module of an optional group does not exist. `feature` names who needs it: "target gguf"."""
    missing = [module for module in modules if not _has_module(module)]
    if missing:
        raise package_missing(
            f"{feature} needs {' and '.join(missing)}, not installed here",
            help=f'pip install "effc[{extra}]"' if extra else f"pip install {' '.join(missing)}",
        ).rejection()


def _has_module(module: str) -> bool:
    from importlib.util import find_spec

    try:
        return find_spec(module) is not None
    except ModuleNotFoundError:  # a package that it lies in
        return False


def package_problem_diagnostic(package: Package) -> Diagnostic:
    if package.state == "missing":
        return package_missing(
            f"{package.name} is not installed, effc needs {package.name}{package.range}", help=package.remedy
        )
    return package_version(
        f"{package.name} {package.version} is installed, effc needs {package.range}", help=package.remedy
    )


def _parse_requirement(requirement: str) -> tuple[str, str, str]:
    """Name, range and extra of a metadata line such as `gguf>=0.17; extra == "gguf"`."""
    from packaging.requirements import Requirement

    need = Requirement(requirement)
    extra = str(need.marker or "").rpartition("extra == ")[2].strip('"')
    clauses = sorted(map(str, need.specifier), key=lambda clause: not clause.startswith(">"))
    return need.name, ",".join(clauses), extra


def installed_version(distribution_name: str) -> str:
    """The version of a package; "" where it is missing."""
    try:
        return metadata.version(distribution_name)
    except metadata.PackageNotFoundError:
        return ""


@cache
def cpu_flags() -> frozenset[str]:
    """Instruction sets as Linux names them: `avx2`, `amx_bf16`; the kernels' level elsewhere."""
    from ...kernels.levels import NAMES, active_level, runs_kernels_of_level

    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text(errors="replace").splitlines():
            if line.startswith(("flags", "Features")):
                return frozenset(line.partition(":")[2].split())
    return frozenset(name for name in NAMES if runs_kernels_of_level(active_level(), name))


def cpu_model_name() -> str:
    """The processor as its maker calls it."""
    import platform

    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text(errors="replace").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def python_version() -> str:
    return ".".join(map(str, sys.version_info[:3]))
