"""A recipe written in Python is the recipe that its text says."""

import pytest
from effc.dsl.syntax.builder import call, name, percent, quantity, recipe, select
from effc.dsl.syntax.diagnostics import Reject
from effc.dsl.syntax.parse import parse
from effc.dsl.syntax.source import Source


def slim():
    r = recipe("Prune SmolLM2, keep it as good")
    r.use("std.text")
    r.use("./mine.effspec", alias="mine")
    keep = r.param("keep", "ratio", percent(85), within=percent(60).to(percent(100)), doc="share of channels")
    base = r.model("base", call("hf", "./ckpt", revision="main"))
    heldout = r.data("heldout", call("text", "heldout.txt", length=512))
    zen4 = r.profile("zen4", isa=name("avx512_bf16"), memory=quantity(24, "GiB"), pinned=True)
    r.matrix(keep=[percent(80), percent(85)])
    lean = r.pipeline("lean", base, doc="Three dimensions.")
    slim = lean.step("slim", "prune.blocks", remove=4, score=call("perplexity", heldout))
    mlps = (select("*.mlp") - "layers.0.*" | select("*.mlp") & "layers.9.*").allow_empty()
    lean.step("thin", "prune.channels", on=mlps, keep=keep.of("channels"), from_=slim)
    lean.expect("perplexity(heldout) <= 1.15 * base", f"decode.p50 <= 30ms on {zen4}")
    lean.emit(call("hf", "hf"), call("native", "cpu"))
    return r


SLIM = '''\
effspec 1
"""Prune SmolLM2, keep it as good"""

use std.text
use "./mine.effspec" as mine

param keep: ratio = 85% in 60%..100% "share of channels"

model base = hf("./ckpt", revision: "main")
data heldout = text("heldout.txt", length: 512)

profile zen4 { isa: avx512_bf16  memory: 24GiB  pinned: true }

matrix keep: [80%, 85%]

pipeline lean(base) {
  """Three dimensions."""
  slim = prune.blocks(remove: 4, score: perplexity(heldout))
  thin = prune.channels(
    on: "*.mlp" - "layers.0.*" | ("*.mlp" & "layers.9.*") allow empty,
    keep: keep of channels,
    from: slim,
  )
}

expect lean {
  perplexity(heldout) <= 1.15 * base
  decode.p50 <= 30ms on zen4
}

emit lean {
  hf("hf")
  native("cpu")
}
'''


def test_the_text_is_canonical():
    assert str(slim()) == SLIM


def test_the_tree_is_that_of_the_text():
    file = slim().file
    assert file == parse(Source("a", SLIM)).file
    assert file.statements[3].call.span.text == 'hf("./ckpt", revision: "main")'


def test_a_dict_is_named_shares():
    r = recipe()
    r.model("m", call("f", split={"blocks": 44, "heads": percent(4), "on": name("share")}, none={}))
    assert "f(split: {blocks: 44, heads: 4%, on: share}, none: {})" in str(r)
    assert r.file == parse(Source("a", str(r))).file


def test_numbers_keep_their_value():
    r = recipe()
    r.model("m", call("f", 3e-4, -1, 0.1 + 0.2, 10**12, True, "é\n", [1, ("a", 2)]))
    assert 'f(0.0003, -1, 0.30000000000000004, 1000000000000, true, "é\\n", [1, ["a", 2]])' in str(r)


@pytest.mark.parametrize(
    "write",
    [
        lambda r: r.model("a b", call("hf")),
        lambda r: r.model("a", call("hf", name("x) }"))),
        lambda r: r.model("a", call("hf", quantity(1, " GiB }"))),
        lambda r: r.model("a", call("hf", float("nan"))),
        lambda r: r.model("a", call("hf", object())),
        lambda r: r.model("a", call("hf", {1: 2})),
        lambda r: r.model("a", call("hf", {"a b": 2})),
        lambda r: r.model("a", call("hf", {"a.b": 2})),
        lambda r: r.model("a", call("hf", None)),
        lambda r: r.model("a", call("hf", "\ud800")),
        lambda r: r.model("a", "hf"),
        lambda r: r.pipeline("p", name("m")).expect("params <= "),
        lambda r: r.pipeline("p", name("m")).expect("params <= 1 } emit x { hf()"),
    ],
)
def test_what_no_recipe_can_say_is_refused(write):
    with pytest.raises(Reject):
        r = recipe()
        write(r)
        str(r)
