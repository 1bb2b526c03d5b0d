"""`effc add`, `effc update`, `effc vendor`: recipe packages of others. Only these verbs fetch any."""

import os
import re
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ....dsl.syntax.diagnostics import Fault, Reject
from .flags import SharedFlags, make_verb
from .options import argument, option

if TYPE_CHECKING:
    from ...plugin.recipe_packages import Package

package_unreachable = Fault(
    "package-unreachable",
    "A package's repository could not be fetched.\n\nSee what git says, and whether the revision exists.",
    exit="network",
)
secret_source = Fault(
    "secret-source", "A password was given in the address of a package, which `effspec.lock` would show.", exit="usage"
)
unknown_source = Fault(
    "unknown-source", "`effc add` was given neither a folder nor an address of a git repository.", exit="usage"
)
unknown_package = Fault("unknown-package", "`effspec.lock` names no such package.", exit="usage")

_GIT = re.compile(r"(https|ssh|file)://[^\s]+|[\w.-]+@[\w.-]+:[^\s]+")
# Of what a repository or a configuration could run when files are fetched and written: nothing does.
_TAME = ("core.hooksPath=/dev/null", "core.symlinks=false", "core.fsmonitor=false", "protocol.ext.allow=never")
_IRREGULAR_MODES = {"120000": "a link", "160000": "a submodule"}  # modes of git's trees
SECONDS, _LARGEST = 300, 512 << 20  # for git; bytes of a file that it writes

_source = argument(
    "[FOLDER|REPOSITORY[@REVISION]]",
    "A folder, or what git fetches: https://…, ssh://…; all that effspec.lock names unless given.",
)
_name = argument("[PACKAGE]", "One package; all unless given.")
_project = option(
    "The folder of the recipes, with their effspec.lock.", "--project", metavar="FOLDER", show_default=True
)


def register(app: typer.Typer) -> None:
    @make_verb(app, flag_panels=("cache", "machine"))
    def add(
        shared: SharedFlags, source: Annotated[str, _source] = "", project: Annotated[Path, _project] = Path()
    ) -> None:
        """Add a recipe package: copy it, and pin it in effspec.lock by the hash of its tree."""
        if source:
            return _print_packages("add", [_copy_and_pin_package(source, project, shared)], shared)
        return _print_packages(
            "add",
            [
                _fetch_pinned_package(name, facts, project, shared)
                for name, facts in _locked_packages_with_source(project, "")
            ],
            shared,
        )

    @make_verb(app, flag_panels=("cache", "machine"))
    def update(
        shared: SharedFlags, name: Annotated[str, _name] = "", project: Annotated[Path, _project] = Path()
    ) -> None:
        """Take what the sources of packages hold now, and pin that."""
        _print_packages(
            "update",
            [
                _copy_and_pin_package(facts["source"], project, shared)
                for _, facts in _locked_packages_with_source(project, name)
            ],
            shared,
        )

    @make_verb(app, flag_panels=("cache",))
    def vendor(
        shared: SharedFlags, name: Annotated[str, _name] = "", project: Annotated[Path, _project] = Path()
    ) -> None:
        """Copy packages beside the recipes, so that a clone of the project has them."""
        from ...plugin.recipe_packages import VENDORED, copy_package, read_recipe_package

        done = []
        for called, facts in _locked_packages_with_source(project, name):
            package = read_recipe_package(_cached_or_vendored_folder(called, facts, project, shared.cache_folder))
            into = project / VENDORED / called
            into.parent.mkdir(parents=True, exist_ok=True)
            copy_package(package, into)
            done.append(package)
        _print_packages("vendor", done, shared)


def _cached_or_vendored_folder(name: str, facts: dict[str, str], project: Path, cache: Path) -> Path:
    """The cache's copy, else the one beside the recipes, which an update of the lock leaves behind."""
    from ...plugin.recipe_packages import package_gone, verified_package_folder

    try:
        return verified_package_folder(name, facts, project, cache, vendored=False)
    except Reject as rejection:
        if any(d.fault is not package_gone for d in rejection.diagnostics):
            raise
    return verified_package_folder(name, facts, project, cache)


def _locked_packages_with_source(project: Path, name_or_empty: str) -> list[tuple[str, dict[str, str]]]:
    from ....dsl.syntax.nearest import nearest_name_help
    from ...plugin import lockfile

    packages = lockfile.read_package_lock(project)["packages"]
    if name_or_empty and name_or_empty not in packages:
        raise unknown_package(
            f"the lock has no package `{name_or_empty}`", help=nearest_name_help(name_or_empty, packages, "it has")
        ).rejection()
    chosen = [(n, facts) for n, facts in packages.items() if not name_or_empty or n == name_or_empty]
    for called, facts in chosen:
        if not facts.get("source"):
            message = f"the lock says no source of `{called}`"
            raise lockfile.broken_lock(message, help="add the package again").rejection()
    return chosen


def _copy_and_pin_package(source: str, project: Path, shared: SharedFlags) -> "Package":
    """Copy a package into the cache and write it into the lock."""
    from ...plugin import lockfile
    from ...plugin.recipe_packages import (
        cached_package_folder,
        copy_package,
        read_recipe_package,
        refuse_paths_outside_package,
    )

    with _checked_out_source(source, shared) as (folder, commit):
        package = read_recipe_package(folder)
        refuse_paths_outside_package(package)
        into = cached_package_folder(shared.cache_folder, package.tree)
        into.parent.mkdir(parents=True, exist_ok=True)
        copy_package(package, into)
    lock = lockfile.read_package_lock(project)
    facts = {"source": source, "version": package.version, "tree": package.tree}
    lock["packages"][package.name] = facts | ({"commit": commit} if commit else {})
    lockfile.write_package_lock(project, lock)
    return package


def _fetch_pinned_package(name: str, facts: dict[str, str], project: Path, shared: SharedFlags) -> "Package":
    """A package as the lock pins it, fetched where this machine lacks it."""
    from ...plugin.recipe_packages import (
        cached_package_folder,
        copy_package,
        package_edited,
        package_gone,
        read_recipe_package,
        refuse_paths_outside_package,
        verified_package_folder,
    )

    try:
        return read_recipe_package(verified_package_folder(name, facts, project, shared.cache_folder))
    except Reject as rejection:
        if any(d.fault not in (package_gone, package_edited) for d in rejection.diagnostics):
            raise
    plain, commit = facts.get("source", ""), facts.get("commit", "")
    source = f"{plain.rpartition('@')[0] or plain}@{commit}" if commit else plain
    with _checked_out_source(source, shared) as (folder, _):
        package = read_recipe_package(folder)
        if package.tree != facts["tree"]:
            message = f"{source} does not hold the `{name}` that effspec.lock pins"
            raise package_edited(message, help=f"`effc update {name}` takes what it holds now").rejection()
        refuse_paths_outside_package(package)
        into = cached_package_folder(shared.cache_folder, package.tree)
        into.parent.mkdir(parents=True, exist_ok=True)
        copy_package(package, into)
    return package


@contextmanager
def _checked_out_source(source: str, shared: SharedFlags) -> Iterator[tuple[Path, str]]:
    """The folder of a source, and the commit where it is a repository."""
    if not _GIT.fullmatch(source):
        folder = Path(source).expanduser()
        if not folder.is_dir():
            raise unknown_source(
                f"`{source}` is no folder, and no address that a package is fetched from",
                help="a repository is named by https://, ssh:// or file://, or as user@host:path",
            ).rejection()
        yield folder, ""
        return
    if re.search(r"://[^/@\s]*:[^/@\s]*@", source):  # it would stand in the lock, under version control
        raise secret_source(
            "the address holds a password", help="leave it out: git's credential helper has it"
        ).rejection()
    if shared.offline:
        raise package_unreachable(f"{source} was to be fetched with --offline", help="leave --offline out").rejection()
    with tempfile.TemporaryDirectory(prefix="effc-package-") as scratch:
        yield Path(scratch), _fetch_commit(source, Path(scratch))


def _fetch_commit(source: str, destination: Path) -> str:
    """Fetch one commit and write its files; the commit's hash."""
    url, _, revision = source.rpartition("@") if re.search(r"[^/@]@[^@/:]+$", source) else (source, "", "")
    _run_git(destination, "init", "-q")
    options = ("-q", "--depth", "1", "--no-tags", "--no-recurse-submodules")
    _run_git(destination, "fetch", *options, "--", url, revision or "HEAD")
    _refuse_large_tree(destination, source)
    _run_git(destination, "checkout", "-q", "FETCH_HEAD")
    return _run_git(destination, "rev-parse", "FETCH_HEAD").strip()


def _refuse_large_tree(repository: Path, source: str) -> None:
    """Reject what was fetched where it has more files than a package may, before one is written: a dozen objects can
    stand for as many as one likes."""
    from ...plugin.recipe_packages import MAX_BYTES, MAX_FILES, invalid_package, too_large_diagnostic

    count, bytes = 0, 0
    command = _git_command(repository, "ls-tree", "-r", "-l", "-z", "FETCH_HEAD")
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as listing:
        assert listing.stdout is not None, "it is a pipe"
        partial = b""
        while chunk := listing.stdout.read(1 << 16):
            *entries, partial = (partial + chunk).split(b"\0")
            count += len(entries)
            for mode, name in (_parse_mode_and_name(entry) for entry in entries):
                if mode in _IRREGULAR_MODES and not any(part.startswith(".") for part in name.split("/")):
                    message = f"{name!a} in {source} is {_IRREGULAR_MODES[mode]}"
                    raise invalid_package(message, help="a package holds plain files").rejection()
            bytes += sum(int(size) for entry in entries if (size := entry.split(b"\t")[0].split()[-1]).isdigit())
            if count > MAX_FILES or bytes > MAX_BYTES or len(partial) > 1 << 16:
                listing.kill()
                raise too_large_diagnostic(source).rejection()


def _parse_mode_and_name(line: bytes) -> tuple[str, str]:
    """Mode and name of what `git ls-tree` lists."""
    metadata, _, name = line.partition(b"\t")
    return metadata.split(b" ")[0].decode(), name.decode(errors="replace")


def _with_file_size_limit(max_bytes: int, command: list[str]) -> list[str]:
    """The command, none of whose files may be larger."""
    return ["sh", "-c", f'ulimit -f {max_bytes // 512}; exec "$@"', "sh", *command] if os.name == "posix" else command


def _git_command(folder: Path, *args: str) -> list[str]:
    return ["git", *(word for setting in _TAME for word in ("-c", setting)), "-C", str(folder), *args]


def _run_git(folder: Path, *args: str) -> str:
    environment = {**os.environ, "GIT_TERMINAL_PROMPT": "0", "GIT_LFS_SKIP_SMUDGE": "1"}
    try:
        done = subprocess.run(
            _with_file_size_limit(_LARGEST, _git_command(folder, *args)),
            env=environment,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=SECONDS,
            stdin=subprocess.DEVNULL,
        )
    except FileNotFoundError as error:
        raise package_unreachable("git is not installed", help="install git, or add a folder").rejection() from error
    except subprocess.TimeoutExpired as error:
        raise package_unreachable(f"git took longer than {SECONDS} s").rejection() from error
    if done.returncode:
        lines = done.stderr.strip().splitlines() or ["nothing"]
        message = next((line for line in lines if line.startswith(("fatal:", "error:"))), lines[-1])
        raise package_unreachable(
            f"git could not fetch it: {message[:200]}", help="check address and revision"
        ).rejection()
    return done.stdout


def _print_packages(action: str, packages: "list[Package]", shared: SharedFlags) -> None:
    if shared.format == "json":
        rows = [{"name": p.name, "version": p.version, "tree": p.tree} for p in packages]
        return shared.screen.answer_json(action, packages=rows)
    for p in packages:
        sentence_text = f"  {p.sentence}" if p.sentence else ""
        shared.screen.answer(f"{p.name} {p.version}  {p.tree[:12]}{sentence_text}")
    if not packages:
        shared.screen.note("effspec.lock names no package")
    return None
