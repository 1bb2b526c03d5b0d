"""Shares of heads where a module has one head alone."""

from dataclasses import replace

import pytest
from effc.compiler.plugin.registry import Registry
from effc.dsl.checker.check import check_recipe_file
from effc.dsl.syntax.parse import parse
from effc.dsl.syntax.source import Source

from tests.dsl import tiny_llama

RECIPE = """effspec 1
model base = zoo("tiny-llama")
pipeline p(base) {
  bald = prune.heads(keep: 50% of heads)
}
"""


@pytest.mark.parametrize(
    ("count", "per_block", "fact", "remedy"),
    [
        (1, 0, "means 0.5 of 1 head of `model.layers.0.self_attn`", 'by `on: "*" - "model.layers.0.self_attn"`'),
        (4, 1, "means 2 of 4 query heads of `model.layers.0.self_attn`", "write `50% of kv_heads`"),
    ],
)
def test_a_module_that_can_lose_no_head_is_named_with_its_heads_and_a_remedy(count, per_block, fact, remedy):
    skeleton = tiny_llama.skeleton()
    first = replace(skeleton.groups[0], count=count, per_block=per_block)
    changed = replace(skeleton, groups=(first, *skeleton.groups[1:]))
    checked = check_recipe_file(
        parse(Source("r", RECIPE)).file, Registry().vocabulary, find_skeleton=lambda model: changed
    )
    (diagnostic,) = [d for d in checked.diagnostics if d.slug == "illegal-head-count"]
    assert fact in diagnostic.message and remedy in diagnostic.help
    assert "100%" not in diagnostic.message + diagnostic.help and diagnostic.offer is None
