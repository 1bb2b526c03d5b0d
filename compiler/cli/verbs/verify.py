"""`effc verify`: whether an artifact is the one that was written, and of forms that effc takes."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from .flags import SharedFlags, make_verb, note_uncovered_files
from .options import argument, option

if TYPE_CHECKING:
    from ...artifacts.manifest import Manifest

_folder = argument("ARTIFACT", "A folder that `effc compile` wrote.")
_key = option(
    "A public key (`p256:...` or a file), one of which must have signed the artifact; repeatable.",
    "--require-signature",
    "--verify-key",
    metavar="KEY",
)


def register(app: typer.Typer) -> None:
    @make_verb(app)
    def verify(
        artifact: Annotated[Path, _folder],
        shared: SharedFlags,
        verify_key: Annotated[list[str], _key] = (),  # type: ignore[assignment]
    ) -> None:
        """Check an artifact: hashes of all files, what each form holds, that weights are numbers, and signatures.

        Nothing of it is run."""
        from ...artifacts.load import verify_signature_and_files
        from ...artifacts.manifest import read_manifest, uncovered_files
        from ...core.quantity import count_text

        signed = verify_signature_and_files(artifact, verify_key) if verify_key else ""
        manifest = read_manifest(artifact)
        forms = check_artifact_files(artifact, manifest, shared.cache_folder)
        note_uncovered_files(artifact, shared.screen)
        if shared.format == "json":
            return shared.screen.answer_json(
                "verify",
                path=str(artifact),
                kind=manifest.kind,
                forms=forms,
                files=len(manifest.files),
                signed_by=signed or None,
                uncovered=uncovered_files(artifact),
            )
        message = f"ok: {count_text(len(manifest.files), 'file')} as the manifest has them"
        message += f", forms {', '.join(forms)}" if forms else ""
        shared.screen.answer(message + (f", signed by {signed}" if signed else ""))
        if not signed:
            shared.screen.note(
                "no hash covers the measures, the model card and the bill of materials; a signature does: verify it by "
                "`--require-signature KEY`"
            )
        return None


def check_artifact_files(artifact: Path, manifest: "Manifest", cache: Path) -> list[str]:
    """The forms of an artifact. Raises Reject for what loading one, or running the artifact, would refuse of its files;
    `effc doctor --trust` reads them by this, too."""
    from ...artifacts.finite_weights import refuse_non_finite_weights
    from ...artifacts.form_checks import check_forms_and_list_paths
    from ...artifacts.load import target_class

    forms = check_forms_and_list_paths(artifact, manifest)
    refuse_non_finite_weights(artifact, manifest)
    target_class(manifest.kind).check_artifact(artifact, cache)
    return forms
