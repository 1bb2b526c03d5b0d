"""Runs of MLflow in a folder: what artifacts were compiled with, what they measure, and their digests."""

import json
import logging
import os
import re
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...dsl.checker.value_text import plain_value_text
from ...dsl.checker.values import value_from_json
from ..core.safe_read import MALFORMED
from .pages.report_data import ReportData, finite_number_or_none, one_line_or_empty
from .results_table import pipeline_and_variant_label

if TYPE_CHECKING:
    from mlflow.tracking import MlflowClient

_EXPERIMENT = "effc"
_DIGEST = "effc.artifact_sha256"
_SCHEME = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+:/")
_OTHER_FOLDERS = (".trash", "models")  # of a file store, beside those of experiments
_MAX_VALUE = 500  # characters of a parameter, which every version of MLflow takes
_OTHER = re.compile(r"[^A-Za-z0-9_\-. :/]")  # not in names of MLflow


class StoreError(Exception):
    """A file store that MLflow can't add a run to."""


@dataclass(frozen=True)
class StoredRun:
    """`added` is False of a run that the store had: of the same digest, with the same measures."""

    id: str
    added: bool


def unusable_store_reason(folder: str) -> str:
    """Why a folder can't be MLflow's file store; "" where it is one, or would become one."""
    path = Path(folder)
    if not folder.strip():
        return "names no folder: name one, such as runs"
    if _SCHEME.match(folder):
        return "is an address, and runs are written to a folder: name one, such as runs"
    if path.exists() and not path.is_dir():
        return "is a file, and MLflow keeps runs in a folder"
    if other := next((p.name for p in sorted(path.glob("*")) if not _may_lie_in_store(p)), ""):
        return f"holds {other}, which is no experiment of MLflow: name a new folder, or one that MLflow wrote"
    return ""


def _may_lie_in_store(path: Path) -> bool:
    """Whether MLflow's file store may hold it; a hidden file (.gitignore) is no matter to it."""
    if not path.is_dir():
        return path.name.startswith(".")
    return path.name in _OTHER_FOLDERS or (path / "meta.yaml").is_file()


def write_mlflow_runs(reports: Sequence[ReportData], folder: Path) -> list[StoredRun]:
    """Add a finished run for each artifact to a file store of MLflow, unless it has the same; nothing is sent anywhere.

    Metrics are the compiled model's; the original's end in `.original`. Digests lie in the run's `digests.json`.
    Raises StoreError where MLflow refuses the store.
    """
    os.environ["MLFLOW_DISABLE_TELEMETRY"] = "true"
    os.environ["MLFLOW_ALLOW_FILE_STORE"] = "true"  # without it MLflow 3.17 refuses to write and to read one
    with _without_logging():
        from mlflow.exceptions import MlflowException
        from mlflow.tracking import MlflowClient

        client = MlflowClient(tracking_uri=folder.resolve().as_uri())
        try:
            with _malformed_as_store_error():
                experiment = client.get_experiment_by_name(_EXPERIMENT)
            experiment_id = experiment.experiment_id if experiment else client.create_experiment(_EXPERIMENT)
            return [_add_unless_stored(client, experiment_id, report) for report in reports]
        except MlflowException as error:
            raise StoreError(f"MLflow can't add a run: {one_line_or_empty(str(error))}") from error


@contextmanager
def _malformed_as_store_error() -> Iterator[None]:
    """Turn what MLflow raises on files of another form into StoreError."""
    from yaml import YAMLError

    try:
        yield
    except (YAMLError, *MALFORMED) as error:
        raise StoreError(f"MLflow can't read a file of the store: {one_line_or_empty(str(error))}") from error


@contextmanager
def _without_logging() -> Iterator[None]:
    """Without records of MLflow, which go to its own loggers and to the root's."""
    level = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        yield
    finally:
        logging.disable(level)


def _add_unless_stored(client: "MlflowClient", experiment_id: str, report: ReportData) -> StoredRun:
    metrics = _run_metrics(report)
    with _malformed_as_store_error():
        same_digest = client.search_runs([experiment_id], f"tags.`{_DIGEST}` = '{report.hash}'") if report.hash else ()
    for run in same_digest:
        if run.info.status == "FINISHED" and run.data.metrics == metrics:
            return StoredRun(run.info.run_id, added=False)
    return StoredRun(_add_run(client, experiment_id, report, metrics), added=True)


def _add_run(client: "MlflowClient", experiment_id: str, report: ReportData, metrics: dict[str, float]) -> str:
    from mlflow.entities import Metric, Param, RunTag

    now_ms = int(time.time() * 1000)
    run_id: str = client.create_run(experiment_id, run_name=pipeline_and_variant_label(report)).info.run_id
    client.log_batch(
        run_id,
        [Metric(name, value, now_ms, 0) for name, value in metrics.items()],
        [Param(name, value) for name, value in _run_params(report).items()],
        [RunTag("effc.version", one_line_or_empty(report.manifest.effc)), RunTag(_DIGEST, report.hash)],
    )
    digests = {path: {"bytes": size, "sha256": sha256} for path, (size, sha256) in report.manifest.files.items()}
    client.log_dict(run_id, digests, "digests.json")
    client.log_text(run_id, str(report.manifest.recipe.get("text", "")), "recipe.effspec")
    client.set_terminated(run_id)
    return run_id


def _run_metrics(report: ReportData) -> dict[str, float]:
    values: dict[str, float] = {}
    for measure in report.manifest.measures:
        name = _allowed_mlflow_key(measure.metric)
        for key, value in (
            (name, finite_number_or_none(measure.compiled)),
            (f"{name}.original", finite_number_or_none(measure.original)),
        ):
            if value is not None:
                values[key] = value
    return values


def _run_params(report: ReportData) -> dict[str, str]:
    """Parameters of the recipe, and the arguments of each step."""
    manifest = report.manifest
    values: dict[str, Any] = {
        "artifact": report.location,
        "target": manifest.kind,
        "pipeline": manifest.name,
        "recipe": manifest.recipe.get("name"),
        "variant": manifest.recipe.get("variant"),
    }
    params = manifest.recipe.get("params")
    values |= {f"param.{name}": value for name, value in (params.items() if isinstance(params, dict) else ())}
    for index, step in enumerate(manifest.steps):
        values[f"step.{index}"] = step.get("word")
        args = step.get("args")
        values |= {f"step.{index}.{key}": value for key, value in (args.items() if isinstance(args, dict) else ())}
    return {
        _allowed_mlflow_key(key): one_line_or_empty(_recipe_text(value), _MAX_VALUE)
        for key, value in values.items()
        if value not in (None, "")
    }


def _recipe_text(value: Any) -> str:
    """A value of a manifest as a recipe says it; JSON where it is of another form."""
    if isinstance(value, str):
        return value
    try:
        return plain_value_text(value_from_json(value))
    except MALFORMED:
        return json.dumps(value)


def _allowed_mlflow_key(text: str) -> str:
    return _OTHER.sub("_", text)[:200].strip(" /.") or "_"
