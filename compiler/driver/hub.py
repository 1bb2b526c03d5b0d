"""Uploads of artifacts to the Hugging Face hub, by its own client."""

from pathlib import Path
from typing import TypedDict, Unpack

from ...dsl.syntax.diagnostics import Fault
from ..artifacts.load import verify_artifact_files
from ..core.json_errors import first_line

not_uploaded = Fault(
    "not-uploaded",
    "An artifact was to be uploaded to the Hugging Face hub, and the hub didn't take it.\n\n"
    "The name is `owner/name`, and the token is that of `hf auth login`, of `HF_TOKEN`, or `token=`. What was uploaded "
    "before it broke is not uploaded again. `HF_HUB_OFFLINE=1` keeps all uploads away.",
    exit="environment",
)


class HubOptions(TypedDict, total=False):
    """Options of uploads, as `push_to_hub` of transformers has them."""

    private: bool | None
    token: str | bool | None
    revision: str | None
    commit_message: str
    create_pr: bool


def upload_artifact(artifact: Path, repo_id: str, **options: Unpack[HubOptions]) -> str:
    """The address of the commit that has a whole artifact: its model card with the measures, weights, and manifest.

    Files are compared with the manifest first.
    Raises Reject (not-uploaded, artifact-edited).
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HTTPError  # of the client that it is built on

    verify_artifact_files(artifact)
    revision, create_pr = options.get("revision"), options.get("create_pr", False)
    message = options.get("commit_message") or f"Upload {artifact.name} with effc"
    api = HfApi(token=options.get("token"))
    try:
        repo = api.create_repo(repo_id, private=options.get("private"), exist_ok=True)
        if revision is not None and not create_pr:
            api.create_branch(repo.repo_id, branch=revision, exist_ok=True)
        commit = api.upload_folder(
            repo_id=repo.repo_id, folder_path=artifact, commit_message=message, revision=revision, create_pr=create_pr
        )
    except (HTTPError, OSError, ValueError) as error:
        raise not_uploaded(
            f"{artifact} was not uploaded to `{repo_id!s:.80}`: {first_line(error)}",
            help="`hf auth whoami` says who you are there, and `hf upload` uploads the same folder",
        ).rejection() from error
    return str(commit.commit_url)
