"""`effc sign`: vouch for an artifact, or see who did."""

from pathlib import Path
from typing import Annotated

import typer

from ...artifacts.signing_keys import KEY_TYPES
from .flags import SharedFlags, make_verb, note_uncovered_files
from .options import argument, option

_folder = argument("ARTIFACT", "A folder that `effc compile` wrote.")
_key = option("The secret key to sign with.", "--key", metavar="FILE")
_new = option("Make a secret key, and FILE.pub for those who check.", "--new-key", metavar="FILE")
_type = option(
    "Of a new key. Ed25519 keys sign signatures.json, the others model.sig, which other tools check, too.",
    "--key-type",
    metavar="|".join(KEY_TYPES),
    show_default=True,
)
_verify = option(
    "Sign nothing: check that this public key (`p256:...` or a file) signed the artifact; "
    "repeatable, one of them must.",
    "--require-signature",
    "--verify-key",
    metavar="KEY",
)
_note = option("A word that is signed too.", "--note", metavar="TEXT")


def register(app: typer.Typer) -> None:
    @make_verb(app)
    def sign(
        shared: SharedFlags,
        artifact: Annotated[Path | None, _folder] = None,
        key: Annotated[Path | None, _key] = None,
        new_key: Annotated[Path | None, _new] = None,
        key_type: Annotated[str, _type] = KEY_TYPES[0],
        verify_key: Annotated[list[str], _verify] = (),  # type: ignore[assignment]
        note: Annotated[str, _note] = "",
    ) -> None:
        """Sign an artifact as OpenSSF Model Signing does, make a key, or check a signature, offline."""
        modes = [key is not None, new_key is not None, bool(verify_key)]
        if sum(modes) != 1 or (artifact is None) != (new_key is not None):
            raise typer.BadParameter(
                "one of `ARTIFACT --key FILE`, `ARTIFACT --require-signature KEY` and `--new-key FILE`"
            )
        if new_key is not None:
            from ...artifacts.signing_keys import write_key_pair

            if key_type not in KEY_TYPES:
                raise typer.BadParameter(f"`--key-type` is {', '.join(KEY_TYPES[:-1])} or {KEY_TYPES[-1]}")
            return _print_signer(shared, "made", write_key_pair(new_key, key_type), new_key)
        assert artifact is not None, "both other ways name one"
        if verify_key:
            from ...artifacts.load import verify_signature_and_files

            signer = verify_signature_and_files(artifact, verify_key)
            note_uncovered_files(artifact, shared.screen)
            return _print_signer(shared, "signed", signer, artifact)
        from ...artifacts.signature import sign_artifact

        assert key is not None, "what is left"
        signature = sign_artifact(artifact, key, note)
        note_uncovered_files(artifact, shared.screen)
        return _print_signer(shared, "signed", signature.key, artifact)


def _print_signer(shared: SharedFlags, outcome: str, key: str, path: Path) -> None:
    from ...artifacts.signing_keys import key_id

    if shared.format == "json":
        shared.screen.answer_json("sign", outcome=outcome, key=key, id=key_id(key), path=str(path))
    elif outcome == "made":
        shared.screen.answer(f"{key}\n{path} is secret; give {path}.pub to those who check; its id is {key_id(key)}")
    else:
        shared.screen.answer(f"{path} is signed by {key}")
