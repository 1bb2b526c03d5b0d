"""Runs in MLflow's file store, read by MLflow itself."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
from effc.compiler.artifacts.manifest import Measure
from effc.compiler.artifacts.mlflow_runs import StoreError, write_mlflow_runs
from effc.compiler.core import environment
from effc.dsl.checker.values import DataRef, MetricRef, Ratio, value_to_json

from tests.compiler.artifacts.pages.report_data import report
from tests.compiler.artifacts.pages.test_page import kinds  # noqa: F401
from tests.compiler.cli.verbs.conftest import effc, own_cache  # noqa: F401

tracking = pytest.importorskip("mlflow.tracking")


def runs(folder: Path) -> list:
    client = tracking.MlflowClient(tracking_uri=folder.as_uri())
    experiment = client.get_experiment_by_name("effc")
    return client.search_runs([experiment.experiment_id])


def test_mlflow_reads_what_an_artifact_was_compiled_with_and_what_it_measures(tmp_path):
    measures = (Measure("perplexity(heldout)", "", 16.25, 17.5), Measure("decode", "ms", None, float("nan")))
    data = report(measures=measures, files={"hf/model.safetensors": (12, "ab" * 32)})
    (stored,) = write_mlflow_runs([replace(data, hash="cd" * 32)], tmp_path / "runs")
    (run,) = runs(tmp_path / "runs")
    assert (run.info.run_id, run.info.status) == (stored.id, "FINISHED")
    assert run.data.metrics == {"perplexity_heldout_": 17.5, "perplexity_heldout_.original": 16.25}
    assert run.data.params["target"] == data.manifest.kind and run.data.params["pipeline"] == data.manifest.name
    assert run.data.params["step.0"] == data.manifest.steps[0]["word"]
    assert run.data.tags["effc.artifact_sha256"] == "cd" * 32
    digests = json.loads(
        (tmp_path / "runs" / run.info.experiment_id / stored.id / "artifacts/digests.json").read_text()
    )
    assert digests == {"hf/model.safetensors": {"bytes": 12, "sha256": "ab" * 32}}


def test_runs_are_added_to_a_store_that_is_there_and_strange_names_lead_nowhere_else(tmp_path):
    folder = tmp_path / "runs"
    write_mlflow_runs([report()], folder)
    strange = report(
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


def test_the_same_artifact_is_one_run_until_it_measures_something_else(tmp_path):
    faster = report(measures=(Measure("decode", "ms", 20.0, 17.1),))
    added = [
        run.added for one in ([report()], [report(), faster], [faster]) for run in write_mlflow_runs(one, tmp_path)
    ]
    assert added == [True, False, True, False] and len(runs(tmp_path)) == 2


def test_params_are_what_a_recipe_says_and_other_values_are_json(tmp_path):
    args = {
        "data": value_to_json(DataRef("text.calib")),
        "keep": value_to_json(Ratio(0.85, "channels")),
        "score": value_to_json(MetricRef("perplexity", (("data", DataRef("text.heldout")),))),
        "align": 8,
        "exact": True,
        "order": "any",
        "odd": {"Ratio": {"value": []}},
        "strange": {"a": 1, "b": None},
    }
    write_mlflow_runs([report(steps=({"word": "prune.channels", "args": args},))], tmp_path)
    (run,) = runs(tmp_path)
    texts = {key.removeprefix("step.0."): value for key, value in run.data.params.items() if "step.0." in key}
    assert texts == {
        "data": "text.calib",
        "keep": "85% of channels",
        "score": "perplexity(text.heldout)",
        "align": "8",
        "exact": "true",
        "order": "any",
        "odd": '{"Ratio": {"value": []}}',
        "strange": '{"a": 1, "b": null}',
    }


def test_a_store_that_mlflow_refuses_is_a_sentence_and_nothing_is_logged(tmp_path, capfd):
    write_mlflow_runs([report()], tmp_path)
    client = tracking.MlflowClient(tracking_uri=tmp_path.as_uri())
    client.delete_experiment(client.get_experiment_by_name("effc").experiment_id)
    capfd.readouterr()
    with pytest.raises(StoreError, match="MLflow can't add a run"):
        write_mlflow_runs([report()], tmp_path)
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("text", ["", "x", "a: [", "experiment_id: 7", "- 1"])
def test_an_experiment_that_is_none_stops_nothing_or_is_a_sentence(tmp_path, capfd, text):
    (tmp_path / "7").mkdir()
    (tmp_path / "7" / "meta.yaml").write_text(text)
    try:
        write_mlflow_runs([report()], tmp_path)
    except StoreError as error:
        assert "\n" not in str(error)
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize(
    ("folder", "sentence"),
    [
        ("", "names no folder"),
        ("  ", "names no folder"),
        ("http://127.0.0.1:9/x", "is an address"),
        ("file:///x", "is an address"),
        ("sqlite:///mlflow.db", "is an address"),
        ("other", "holds notes, which is no experiment of MLflow"),
        ("front/runs", "lies in an artifact"),
        (".", "which is no experiment of MLflow"),
    ],
)
def test_a_folder_that_is_no_store_is_refused(effc, kinds, tmp_path, monkeypatch, folder, sentence):  # noqa: F811
    shutil.copytree(kinds / "front", tmp_path / "front")
    (tmp_path / "other" / "notes").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    before = sorted(tmp_path.rglob("*"))
    run = effc("report", "front", "--mlflow", folder)
    assert run.code == 2 and sentence in run.err and sorted(tmp_path.rglob("*")) == before


def test_the_command_names_the_run_it_added_and_the_one_that_is_there(effc, kinds, tmp_path, monkeypatch):  # noqa: F811
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / ".gitignore").write_text("*")
    first, again = (effc("report", str(kinds / "front"), "--mlflow", "runs") for _ in range(2))
    (run,) = runs(tmp_path / "runs")
    assert first.code == 0 and first.err == f"runs: run {run.info.run_id} of front added\n"
    assert again.err == f"runs: run {run.info.run_id} of front is there already: same digest, same measures\n"
    answer = json.loads(effc("report", str(kinds / "front"), "--mlflow", "runs", "--format", "json").out)
    assert answer["runs"] == [{"id": run.info.run_id, "artifact": "front", "added": False}]


@pytest.mark.parametrize(
    "verb", [("report", "front", "--mlflow", "runs"), ("report", "front"), ("diff", "front", "front")]
)
def test_an_edited_artifact_is_neither_reported_nor_compared(effc, kinds, tmp_path, monkeypatch, verb):  # noqa: F811
    shutil.copytree(kinds / "front", tmp_path / "front")
    monkeypatch.chdir(tmp_path)
    file = next((tmp_path / "front").rglob("*.safetensors"))
    file.write_bytes(file.read_bytes()[:-1] + b"!")
    run = effc(*verb)
    assert run.code == 5 and "error[artifact-edited]" in run.err and file.name in run.err
    assert [path.name for path in tmp_path.iterdir()] == ["front"]
