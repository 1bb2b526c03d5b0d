"""What ships with effc is what its own tools make."""

import json

import pytest
from effc.compiler.api import discovered
from effc.compiler.opened import origin_of
from effc.compiler.sources.zoo import zoo
from effc.dsl.skeleton import Skeleton

from tests.worlds import context


@pytest.mark.parametrize("name", sorted(zoo()))
def test_the_shipped_skeleton_is_the_one_that_is_discovered(tmp_path, name):
    shipped = json.loads((zoo()[name] / "skeleton.json").read_text())
    found = discovered(origin_of(f"zoo:{name}", context(tmp_path).settings))
    assert Skeleton.from_json(shipped) == found
