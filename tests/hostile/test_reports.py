"""A page of what somebody sent is drawn in time, or says that there is nothing to draw."""

import json
import time
from pathlib import Path

import pytest
from effc.compiler.artifacts.manifest import read_manifest
from effc.compiler.artifacts.pages.listing import annotated_recipe_lines
from effc.compiler.artifacts.pages.report_data import ReportData
from effc.compiler.artifacts.pages.timings import paired_timing_charts

from tests.hostile.kinds import honest


@pytest.fixture(scope="module")
def artifact(tmp_path_factory) -> Path:
    return honest(tmp_path_factory.mktemp("reports")) / "native"


def changed(artifact: Path, file: str, **fields) -> ReportData:
    path = artifact / file
    before = path.read_text()
    path.write_text(json.dumps({**json.loads(before), **fields}))
    report = ReportData(artifact.name, read_manifest(artifact))
    path.write_text(before)
    return report


@pytest.mark.parametrize(("before", "after"), [(1e-290, 1e290), (1e290, 1e-290), (1e299, 1e299)])
def test_timings_whose_ratio_is_no_number_are_not_drawn(artifact, before, after):
    rounds = {"unit": "s", "original": [before] * 5, "compiled": [after] * 5}
    report = changed(artifact, "measures.json", run={"timings": {"decode.p50": rounds}})
    assert not paired_timing_charts(report.manifest)


def test_a_recipe_of_one_endless_line_is_listed_in_time(artifact):
    line = "emit " + "native(" * 200_000
    report = changed(artifact, "manifest.json", recipe={"name": "r", "text": line})
    started = time.process_time()
    (listed,) = annotated_recipe_lines([report])
    assert time.process_time() - started < 2 and len("".join(text for _, text in listed.tokens)) < 2000
