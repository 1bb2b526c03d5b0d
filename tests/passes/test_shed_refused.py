"""What can't be shed is refused before any weight is read, with a place and a remedy."""

import json

import pytest
from effc.compiler import api
from effc.dsl.diagnostics import Reject
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
    session = api.session(path, cache_dir=tmp_path / "cache")
    return [d for d in session.check(resolve=True).diagnostics if d.severity == "error"]


@pytest.mark.parametrize(("name", "step", "slug", "said"), [
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
])
def test_what_is_impossible_is_refused_by_check_with_a_caret(tmp_path, name, step, slug, said):
    (found,) = checked(tmp_path, name, step)
    assert found.slug == slug and found.span is not None and found.span.text in step
    assert said in f"{found.message} {found.help} {found.note}"


def test_a_budget_that_scans_can_not_meet_is_refused_by_plan(tmp_path):
    made = mixers.model("mamba2")
    config = {**json.loads(made.config.to_json_string()), "architectures": [type(made).__name__]}
    (tmp_path / "m.json").write_text(json.dumps(config))
    save_file({"rows": mixers.rows()}, tmp_path / "rows.safetensors")
    path = tmp_path / "r.effspec"
    path.write_text(f'{HEAD}pipeline lean(base) {{\n  s = shed.ssm(remove: 50% of params, {SCORED})\n}}\n'
                    'emit lean {\n  hf("out")\n}\n')
    with pytest.raises(Reject) as caught:
        api.compile(path, tmp_path / "out", cache_dir=tmp_path / "cache", threads=1)
    (found,) = caught.value.diagnostics
    assert found.slug == "out-of-reach" and "at most" in found.message


def test_items_with_an_entry_in_a_buffer_are_ranked_by_weights_and_take_it_along():
    """Falcon-H1 scales the rows of its input projection by a buffer."""
    from effc.compiler.search.mixers import magnitudes
    from effc.compiler.tracing.capture import capture

    program = capture(mixers.model("falcon_h1"))
    for group in [g for g in program.skeleton.groups if g.kind in ("ssm_heads", "ssm_state")]:
        assert any(m.tensor.endswith("mup_vector") for m in group.members)
        assert (magnitudes(program, group) > 0).all()
