"""Runs in MLflow's file store, read by MLflow itself."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
from effc.compiler.artifacts.manifest import Measure
from effc.compiler.artifacts.mlflow_runs import write_mlflow_runs
from effc.compiler.core import environment

from tests.compiler.artifacts.pages.sheets import sheet
from tests.compiler.cli.verbs.conftest import effc, own_cache  # noqa: F401

tracking = pytest.importorskip("mlflow.tracking")


def runs(folder: Path) -> list:
    client = tracking.MlflowClient(tracking_uri=folder.as_uri())
    experiment = client.get_experiment_by_name("effc")
    return client.search_runs([experiment.experiment_id])


def test_mlflow_reads_what_an_artifact_was_compiled_with_and_what_it_measures(tmp_path):
    measures = (Measure("perplexity(heldout)", "", 16.25, 17.5), Measure("decode", "ms", None, float("nan")))
    data = sheet(measures=measures, files={"hf/model.safetensors": (12, "ab" * 32)})
    (run_id,) = write_mlflow_runs([replace(data, hash="cd" * 32)], tmp_path / "runs")
    (run,) = runs(tmp_path / "runs")
    assert (run.info.run_id, run.info.status) == (run_id, "FINISHED")
    assert run.data.metrics == {"perplexity_heldout_": 17.5, "perplexity_heldout_.original": 16.25}
    assert run.data.params["target"] == data.manifest.kind and run.data.params["pipeline"] == data.manifest.name
    assert run.data.params["step.0"] == data.manifest.steps[0]["word"]
    assert run.data.tags["effc.artifact_sha256"] == "cd" * 32
    digests = json.loads((tmp_path / "runs" / run.info.experiment_id / run_id / "artifacts/digests.json").read_text())
    assert digests == {"hf/model.safetensors": {"bytes": 12, "sha256": "ab" * 32}}


def test_runs_are_added_to_a_store_that_is_there_and_strange_names_lead_nowhere_else(tmp_path):
    folder = tmp_path / "runs"
    write_mlflow_runs([sheet()], folder)
    strange = sheet(
        name="../../x\n", measures=(Measure("../../a", "", None, 1.0),), steps=({"word": "w" * 9000, "args": {"": 1}},)
    )
    write_mlflow_runs([strange], folder)
    assert len(runs(folder)) == 2
    assert {path.name for path in tmp_path.iterdir()} == {"runs"}


def test_without_mlflow_the_command_names_the_extra(effc, monkeypatch, tmp_path):  # noqa: F811
    known = environment.check_modules
    monkeypatch.setattr(environment, "check_modules", lambda modules, *rest: known(["mlflow_absent"], *rest))
    run = effc("report", str(tmp_path), "--mlflow", str(tmp_path / "runs"), "--format", "json")
    (diagnostic,) = json.loads(run.out)["diagnostics"]
    assert run.code == 5 and diagnostic["help"] == 'pip install "effc[mlflow]"'


def test_a_file_is_no_store(effc, tmp_path):  # noqa: F811
    (tmp_path / "file").write_text("")
    run = effc("report", str(tmp_path), "--mlflow", str(tmp_path / "file"))
    assert run.code == 2 and "MLflow keeps runs in a folder" in run.err
