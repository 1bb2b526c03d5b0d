"""Runs of MLflow in a folder: what artifacts were compiled with, what they measure, and their digests."""

import os
import re
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .pages.sheet import ReportData, number, word
from .results_table import label_of

_EXPERIMENT = "effc"
_MAX_VALUE = 500  # characters of a parameter, which every version of MLflow takes
_OTHER = re.compile(r"[^A-Za-z0-9_\-. :/]")  # not in names of MLflow


def write_mlflow_runs(sheets: Sequence[ReportData], folder: Path) -> list[str]:
    """Add a finished run for each artifact to a file store of MLflow, and return their ids. Nothing is sent anywhere.

    Metrics are the compiled model's; the original's end in `.original`. Digests lie in the run's `digests.json`.
    """
    os.environ["MLFLOW_DISABLE_TELEMETRY"] = "true"
    os.environ["MLFLOW_ALLOW_FILE_STORE"] = "true"  # without it MLflow 3.17 refuses to write and to read one
    from mlflow.entities import Metric, Param, RunTag
    from mlflow.tracking import MlflowClient

    client = MlflowClient(tracking_uri=folder.resolve().as_uri())
    experiment = client.get_experiment_by_name(_EXPERIMENT)
    experiment_id = experiment.experiment_id if experiment else client.create_experiment(_EXPERIMENT)
    ids, now_ms = [], int(time.time() * 1000)
    for sheet in sheets:
        run_id = client.create_run(experiment_id, run_name=label_of(sheet)).info.run_id
        client.log_batch(
            run_id,
            [Metric(name, value, now_ms, 0) for name, value in _metrics(sheet).items()],
            [Param(name, value) for name, value in _params(sheet).items()],
            [RunTag("effc.version", word(sheet.manifest.effc)), RunTag("effc.artifact_sha256", sheet.hash)],
        )
        digests = {path: {"bytes": size, "sha256": sha256} for path, (size, sha256) in sheet.manifest.files.items()}
        client.log_dict(run_id, digests, "digests.json")
        client.log_text(run_id, str(sheet.manifest.recipe.get("text", "")), "recipe.effspec")
        client.set_terminated(run_id)
        ids.append(run_id)
    return ids


def _metrics(sheet: ReportData) -> dict[str, float]:
    values: dict[str, float] = {}
    for measure in sheet.manifest.measures:
        name = _name(measure.metric)
        for key, value in ((name, number(measure.compiled)), (f"{name}.original", number(measure.original))):
            if value is not None:
                values[key] = value
    return values


def _params(sheet: ReportData) -> dict[str, str]:
    """Parameters of the recipe, and the arguments of each step."""
    manifest = sheet.manifest
    values: dict[str, Any] = {
        "artifact": sheet.location,
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
    return {_name(key): word(str(value), _MAX_VALUE) for key, value in values.items() if value not in (None, "")}


def _name(text: str) -> str:
    return _OTHER.sub("_", text)[:200].strip(" /.") or "_"
