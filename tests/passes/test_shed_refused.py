"""What can't be shed is refused before any weight is read, with a place and a remedy."""

import json
import re

import pytest
from effc.compiler.analysis.discovery.discover import skeleton_of
from effc.compiler.driver import api
from effc.dsl.syntax.diagnostics import Reject
from safetensors.torch import save_file

from tests import mixers

HEAD = 'effspec 1\nmodel base = config("m.json", seed: 0)\ndata rows = tokens("rows.safetensors")\n'
SCORED = "score: perplexity(rows)"


def checked(tmp_path, name, step):
    """Diagnostics of a one-step recipe on a tiny model of a kind; notes and warnings left out."""
    made = mixers.model(name)
    config = {**json.loads(made.config.to_json_string()), "architectures": [type(made).__name__]}
    (tmp_path / "m.json").write_text(json.dumps(config))
    save_file({"rows": mixers.rows()}, tmp_path / "rows.safetensors")
    path = tmp_path / "r.effspec"
    path.write_text(f'{HEAD}pipeline lean(base) {{\n  s = {step}\n}}\nemit lean {{\n  hf("out")\n}}\n')
    session = api.open_session(path, cache_dir=tmp_path / "cache")
    return [d for d in session.check(resolve=True).diagnostics if d.severity == "error"]


@pytest.mark.parametrize(
    ("name", "step", "slug", "said"),
    [
        ("llama", f"shed.ssm(remove: 1, {SCORED})", "nothing-to-select", "`prune`"),
        ("llama", f"shed.blocks(remove: 1, {SCORED})", "nothing-to-select", "`prune`"),
        ("llama", "shed.state(keep: 50% of states)", "nothing-to-select", "`prune`"),
        ("mamba", "shed.heads(keep: 50% of heads)", "nothing-to-select", "`shed.channels`"),
        ("mamba2", "shed.channels(keep: 50% of channels)", "nothing-to-select", "`shed.heads`"),
        ("qwen3_next", f"shed.ssm(remove: 1, {SCORED})", "nothing-to-select", ""),
        ("mamba2", f"shed.ssm(remove: 3, {SCORED})", "leaves-none", "at most 2"),
        ("bamba", f"shed.blocks(remove: 2, {SCORED})", "leaves-none", "at most 1"),
        ("mamba2", "shed.state(keep: 1% of states, step: 1)", "leaves-none", "0.2 of 16 states"),
        ("mamba2", "shed.heads(keep: 5% of heads)", "leaves-none", "0.4 of 8 heads"),
        ("mamba2", "shed.heads(keep: 100% of heads)", "no-effect", "changes nothing"),
        ("mamba2", "shed.heads(keep: 50% of params)", "needs-score", "score: perplexity"),
        ("mamba2", 'shed.heads(keep: 50% of heads, on: "*.attn")', "no-match", "backbone.layers.0.mixer"),
    ],
)
def test_what_is_impossible_is_refused_by_check_with_a_caret(tmp_path, name, step, slug, said):
    (found,) = checked(tmp_path, name, step)
    assert found.slug == slug and found.span is not None and found.span.text in step
    assert said in f"{found.message} {found.help} {found.note}"


def test_more_cuts_than_blocks_are_none_of_the_checks_business(tmp_path):
    """A cut may be a scan, some heads or some states of one of them."""
    step = f"shed.multi(remove: 8, {SCORED})"
    assert checked(tmp_path, "mamba2", step) == []
    (plan,) = api.plan(tmp_path / "r.effspec", cache_dir=tmp_path / "cache")
    assert len(plan.stages) == 1


@pytest.mark.parametrize(
    ("name", "step", "slug", "said"),
    [
        ("mamba2", f"shed.ssm(remove: 50% of params, {SCORED})", "out-of-reach", "at most 5.4%"),
        ("mamba2", f"shed.blocks(remove: 90% of params, {SCORED})", "out-of-reach", "at most 55.7%"),
        ("llama", f"shed.multi(remove: 10% of params, order: [scans], {SCORED})", "nothing-to-shed", "none of scans"),
        (
            "llama",
            f"shed.multi(remove: 3, order: [scans, states], {SCORED})",
            "nothing-to-shed",
            "none of scans, states",
        ),
        ("mamba", f"shed.multi(remove: 10% of flops, order: [scan_heads], {SCORED})", "nothing-to-shed", "scan_heads"),
    ],
)
def test_what_can_not_be_met_is_refused_by_plan_with_a_caret(tmp_path, name, step, slug, said):
    assert checked(tmp_path, name, step) == []
    with pytest.raises(Reject) as caught:
        api.plan(tmp_path / "r.effspec", cache_dir=tmp_path / "cache")
    (found,) = caught.value.diagnostics
    assert found.slug == slug and said in found.message and found.span.text in step


@pytest.mark.slow
def test_a_number_of_cuts_that_a_model_does_not_hold_is_refused_by_the_number_that_it_holds(tmp_path):
    checked(tmp_path, "mamba2", "shed.multi(remove: 60, score: divergence(rows))")
    with pytest.raises(Reject) as caught:
        api.compile(tmp_path / "r.effspec", tmp_path / "out", cache_dir=tmp_path / "cache", threads=1)
    (found,) = caught.value.diagnostics
    assert found.slug == "out-of-reach" and re.fullmatch(r"60 cuts are to be made, and \d+ can", found.message)


def test_items_with_an_entry_in_a_buffer_are_ranked_by_weights_and_take_it_along():
    """Falcon-H1 scales the rows of its input projection by a buffer."""
    from effc.compiler.ir.capture.capture import capture
    from effc.compiler.transforms.search.importance import l1_importance

    program = capture(mixers.model("falcon_h1"))
    for group in [g for g in skeleton_of(program).groups if g.kind in ("ssm_heads", "ssm_state")]:
        assert any(m.tensor.endswith("mup_vector") for m in group.members)
        assert (l1_importance(program, group) > 0).all()
