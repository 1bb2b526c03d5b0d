"""Trust report of a received artifact: what it would run here and which checks it passes; read, never loaded."""

import zipfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ...dsl.syntax.diagnostics import Reject
from ...dsl.syntax.render import shorten_for_message
from ..core.safe_read import MALFORMED, read_json
from .load import folder_use_sentence
from .manifest import Manifest, all_files, hashed_files, read_manifest, uncovered_files_text, verify_files
from .provenance import origin_text
from .signature import is_valid_signature, read_signatures
from .signature_bundle import Bundle, read_bundle, read_statement, signed_files_problem

_CODE = (".py", ".so", ".dll", ".dylib", ".pyd", ".sh", ".exe")
_PICKLES = (".pkl", ".pickle")
_MAX_BYTES = 1 << 20  # of a config that is read


@dataclass(frozen=True)
class TrustCheck:
    """One thing looked at. `state` is "ok", "note" or "bad"."""

    topic: str
    fact: str
    state: str = "ok"


def all_trust_checks(artifact: Path, check_forms: Callable[[Path, Manifest], list[str]]) -> list[TrustCheck]:
    """Run every check of an artifact: signatures, hashes, forms, files, config, recipe and folders. Raises Reject where
    there is no manifest to go by.

    check_forms    reads the forms as `effc verify` does, and returns them
    """
    manifest = read_manifest(artifact)
    signatures = list(_signature_checks(artifact))  # before any other file is read
    hashes = _hash_check(artifact, manifest)
    uncovered = uncovered_files_text(artifact)
    checks = [
        *signatures,
        hashes,
        *([TrustCheck("uncovered", uncovered, "note")] if uncovered else ()),
        *(_form_checks(artifact, manifest, check_forms) if hashes.state == "ok" else ()),
        *_file_checks(artifact),
        *_config_checks(artifact),
        *_recipe_checks(manifest),
        *_folder_checks(manifest),
    ]
    return [
        replace(check, topic=shorten_for_message(check.topic), fact=shorten_for_message(check.fact)) for check in checks
    ]


def _hash_check(artifact: Path, manifest: Manifest) -> TrustCheck:
    try:
        verify_files(artifact, manifest)
    except Reject as rejection:
        return TrustCheck("files", rejection.diagnostics[0].message, "bad")
    fact = f"{len(manifest.files)} have the content that the manifest records, and effc opens no others"
    return TrustCheck("files", fact)


def _form_checks(
    path: Path, manifest: Manifest, check_forms: Callable[[Path, Manifest], list[str]]
) -> Iterator[TrustCheck]:
    try:
        forms = check_forms(path, manifest)
    except Reject as rejection:
        yield TrustCheck("forms", rejection.diagnostics[0].message, "bad")
        return
    message = f"{', '.join(forms)} hold nothing that effc would refuse" if forms else "it has none that effc loads"
    yield TrustCheck("forms", message, "ok" if forms else "note")


def _signature_checks(artifact: Path) -> Iterator[TrustCheck]:
    """A signature says something to those alone who know its key."""
    try:
        present, bundle = read_signatures(artifact), read_bundle(artifact)
    except Reject as rejection:
        yield TrustCheck("signature", rejection.diagnostics[0].message, "bad")
        return
    if not present and bundle is None:
        yield TrustCheck("signature", "nobody signed it", "note")
    for one in present:
        yield from _checks_of_signer(one.key, one.signed, one.provenance if is_valid_signature(one, artifact) else None)
    if bundle is not None:
        yield from _bundle_checks(artifact, bundle)


def _bundle_checks(artifact: Path, bundle: Bundle) -> Iterator[TrustCheck]:
    """Checks of `model.sig`, which names its key where effc wrote it, and else the key's digest alone."""
    try:
        files = read_statement(bundle, artifact)
        problem = signed_files_problem(artifact, files)
    except Reject as rejection:
        yield TrustCheck("signature", rejection.diagnostics[0].message, "bad")
        return
    if problem:
        yield TrustCheck("signature", f"by the key {bundle.key_id} is of something else: {problem}", "bad")
    elif files.key:
        valid = bundle.is_signed_by(files.key)
        yield from _checks_of_signer(files.key, files.signed, files.provenance if valid else None)
    else:
        yield TrustCheck(
            "signature", f"it names the key {bundle.key_id}; check it by that key: --require-signature", "note"
        )


def _checks_of_signer(key: str, signed: str, provenance: Mapping[str, Any] | None) -> Iterator[TrustCheck]:
    """Checks of a signature that names its key.

    provenance   None where the signature is not by that key, or of other files
    """
    if provenance is None:
        yield TrustCheck("signature", f"of {key} is of something else", "bad")
        return
    time = f" at {signed}" if signed else ""
    yield TrustCheck("signature", f"by {key}{time}: whose key that is, you must know", "note")
    if provenance:
        try:
            yield TrustCheck("provenance", origin_text(provenance), "note")
        except MALFORMED:
            yield TrustCheck("provenance", "it is of another form than effc writes", "note")


def _file_checks(artifact: Path) -> Iterator[TrustCheck]:
    names = all_files(artifact)
    pickles = [n for n, file in names.items() if n.lower().endswith(_PICKLES) or has_pickle_content(file)]
    code = [name for name in names if name.lower().endswith(_CODE)]
    for kind, file_names, state in (("pickles", pickles, "bad"), ("code", code, "note")):  # apps bring code
        yield TrustCheck(
            kind,
            f"{', '.join(file_names[:3])}: effc would not read it" if file_names else "none among the files",
            state if file_names else "ok",
        )


def has_pickle_content(file: Path) -> bool:
    """Whether a file's content is a pickle of protocol 2 or later, or an archive that holds one, as `torch.save`
    writes."""
    with open(file, "rb") as stream:
        start = stream.read(4)
    if start[:2] == b"PK":
        try:
            with zipfile.ZipFile(file) as archive:
                return any(name.endswith(".pkl") for name in archive.namelist())
        except (zipfile.BadZipFile, OSError, ValueError):
            return False
    return start[:1] == b"\x80" and start[1:2] in (b"\x02", b"\x03", b"\x04", b"\x05")


def _config_checks(artifact: Path) -> Iterator[TrustCheck]:
    asking = []
    for name, file in hashed_files(artifact).items():
        if file.name.endswith("config.json") and file.stat().st_size <= _MAX_BYTES:
            try:
                body = read_json(file, _MAX_BYTES)
            except (ValueError, RecursionError):
                yield TrustCheck("config", f"{name} is not JSON", "bad")
                continue
            if isinstance(body, dict) and "auto_map" in body:
                asking.append(name)
    yield TrustCheck(
        "own code",
        f"{', '.join(asking)} asks for code of its author, which is refused"
        if asking
        else "no config asks for code of its author",
        "bad" if asking else "ok",
    )


def _recipe_checks(manifest: Manifest) -> Iterator[TrustCheck]:
    """Loading never reads the recipe; compiling it again may run what it names."""
    models = manifest.recipe.get("resolved", {}).get("models", {}) if isinstance(manifest.recipe, dict) else {}
    modules = [name for name, call in models.items() if isinstance(call, dict) and call.get("word") == "module"]
    if modules:
        yield TrustCheck(
            "recipe", f"model {modules[0]} is a Python file: `effc test` and `compile` would run it", "note"
        )


def _folder_checks(manifest: Manifest) -> Iterator[TrustCheck]:
    folders = dict.fromkeys(name.partition("/")[0] for name in manifest.files if "/" in name)
    for folder in folders:
        handling = folder_use_sentence(manifest.kind, folder)
        yield TrustCheck(folder, handling or "is nothing that effc loads", "ok" if handling else "note")
