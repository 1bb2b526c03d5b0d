"""Versions are compared with the ranges of the installed metadata, before work starts."""

from importlib import metadata

import pytest
from effc.compiler.core import environment
from effc.compiler.core.environment import Package, check_modules, refuse_missing_packages, required_packages_with_state
from effc.dsl.syntax.diagnostics import Reject


@pytest.mark.parametrize(
    ("version", "spread", "state"),
    [
        ("2.13.0+cpu", ">=2.8", "ok"),
        ("2.8", ">=2.8", "ok"),
        ("2.8.0", ">=2.8", "ok"),
        ("2.10", ">=2.9", "ok"),
        ("2.7.1", ">=2.8", "outside"),
        ("6.0.0", ">=5.24,<6", "outside"),
        ("5.24.0", ">=5.24,<6", "ok"),
        ("5.23.0", ">=5.24,<6", "outside"),
        ("6.0.0rc1", "<6", "outside"),
        ("", ">=1", "missing"),
        ("1.0", "", "ok"),
    ],
)
def test_a_version_lies_in_its_range_or_not(version, spread, state):
    assert Package("p", spread, version=version).state == state


def test_the_ranges_are_those_of_the_metadata():
    named = {p.name: p for p in required_packages_with_state()}
    assert named["torch"].group == "" and named["gguf"].group == "gguf" and "pytest" not in named
    assert all(p.state == "ok" for p in named.values() if not p.group)


def test_a_missing_optional_package_names_its_group():
    package = Package("gguf", ">=0.17", "gguf")
    assert environment.package_problem_diagnostic(package).help == 'pip install "effc[gguf]"'


def test_a_package_outside_its_range_is_refused_with_exit_5(monkeypatch):
    true = metadata.version
    monkeypatch.setattr(metadata, "version", lambda name: "5.23.0" if name == "transformers" else true(name))
    with pytest.raises(Reject) as caught:
        refuse_missing_packages()
    (fault,) = caught.value.diagnostics
    assert fault.message == "transformers 5.23.0 is installed, effc needs >=5.24,<6"
    assert fault.help == 'pip install "transformers>=5.24,<6"' and caught.value.exit == 5


def test_a_missing_module_is_refused_with_its_group():
    check_modules(["json"], "gguf", "target gguf")
    with pytest.raises(Reject) as caught:
        check_modules(["json", "no_such_module"], "gguf", "target gguf")
    (fault,) = caught.value.diagnostics
    assert fault.message == "target gguf needs no_such_module, not installed here"
