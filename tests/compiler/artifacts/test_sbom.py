"""`sbom.json`, by the schema of CycloneDX as its own library has it."""

import json

import pytest
from cyclonedx.schema import SchemaVersion
from cyclonedx.validation.json import JsonStrictValidator
from effc.compiler.artifacts.manifest import Manifest
from effc.compiler.artifacts.sbom import cyclonedx_json

INPUTS = {"base": "a" * 64, "data calib": "b" * 64}


def complaints(text: str) -> list[str]:
    errors = JsonStrictValidator(SchemaVersion.V1_6).validate_str(text, all_errors=True)
    return [] if errors is None else [error.data.message for error in errors]


@pytest.mark.parametrize("manifest", [Manifest("hf"), Manifest("native", name="small", lock={"inputs": INPUTS})])
def test_a_bill_of_materials_is_valid_by_the_strict_schema_of_its_version(manifest):
    assert complaints(cyclonedx_json(manifest).decode()) == []


@pytest.mark.parametrize(
    "broken", [{"serialNumber": "urn:uuid:1"}, {"extra": "field"}, {"components": [{"name": "a"}]}]
)
def test_the_schema_refuses_what_is_no_bill_of_materials(broken):
    body = json.loads(cyclonedx_json(Manifest("hf")))
    assert complaints(json.dumps(body | broken))
