"""Provenance of an artifact: an in-toto statement, which `effc sign` puts under its signature.

Recipe, inputs and versions are the manifest's. Who signs need not be who compiled: commit and address of a CI job that
signs are in a field apart.
Source: in-toto attestation framework, Statement v1; SLSA v1.0, provenance.
"""

import hashlib
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from .manifest import NAME, Manifest, file_sha256

_BUILD_TYPE = "urn:effc:compile:1"
_LOCAL = "urn:effc:local"  # a builder that no CI vouches for
_SIGNER = "effc_signer"  # {"commit": resource, "job": address}, as far as the environment says


def provenance_statement(artifact: Path, manifest: Manifest) -> dict[str, Any]:
    """In-toto statement about an artifact: its subject is `manifest.json`, which holds the hash of every other file."""
    recipe, lock = manifest.recipe, manifest.lock
    parameters = {
        "recipe": recipe.get("name", ""),
        "sha256": hashlib.sha256(str(recipe.get("text", "")).encode()).hexdigest(),
        "params": recipe.get("params", {}),
        "variant": recipe.get("variant", ""),
        "pipeline": manifest.name,
        "target": manifest.kind,
    }
    inputs = [{"name": label, "uri": f"effc:{identity}"} for label, identity in sorted(lock.get("inputs", {}).items())]
    versions = sorted(lock.get("versions", {}).items())
    packages = [{"name": name, "uri": f"pkg:generic/{name}@{version}"} for name, version in versions]
    signer = {"commit": ci_commit(), "job": ci_job()}
    return {
        "_type": "https://in-toto.io/Statement/v1",
        "subject": [{"name": NAME, "digest": {"sha256": file_sha256(artifact / NAME)}}],
        "predicateType": "https://slsa.dev/provenance/v1",
        "predicate": {
            "buildDefinition": {
                "buildType": _BUILD_TYPE,
                "externalParameters": parameters,
                "resolvedDependencies": [*inputs, *packages],
            },
            "runDetails": {"builder": {"id": _LOCAL, "version": {"effc": manifest.effc}}},
            _SIGNER: {name: value for name, value in signer.items() if value},
        },
    }


def ci_commit() -> dict[str, Any] | None:
    """The commit of a job of GitHub or GitLab, as a resource; None elsewhere."""
    env = os.environ
    repository = f"{env.get('GITHUB_SERVER_URL', '')}/{env.get('GITHUB_REPOSITORY', '')}"
    for url, commit in ((repository, env.get("GITHUB_SHA")), (env.get("CI_PROJECT_URL"), env.get("CI_COMMIT_SHA"))):
        if url and commit:
            return {"name": "commit", "uri": f"git+{url}", "digest": {"gitCommit": commit}}
    return None


def ci_job() -> str:
    """Address of a job of GitHub or GitLab; "" elsewhere."""
    env = os.environ
    if run := env.get("GITHUB_RUN_ID"):
        return f"{env.get('GITHUB_SERVER_URL', '')}/{env.get('GITHUB_REPOSITORY', '')}/actions/runs/{run}"
    return env.get("CI_JOB_URL", "")


def origin_text(statement: Mapping[str, Any]) -> str:
    """One line about a statement's recipe, and the commit and job that signed it. Raises LookupError, TypeError or
    AttributeError of another form."""
    predicate = statement["predicate"]
    definition = predicate["buildDefinition"]
    signer = predicate.get(_SIGNER, {})
    commit = f" at commit {signer['commit']['digest']['gitCommit']}" if "commit" in signer else ""
    job = signer.get("job") or predicate["runDetails"]["builder"]["id"]  # earlier statements name the job there
    origin = f"{definition['externalParameters']['recipe']}, built by effc"
    return origin if job == _LOCAL else f"{origin}, signed in {job}{commit}"
