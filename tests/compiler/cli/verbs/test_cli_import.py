"""`effc import`: recipes of llm-compressor and Olive as text that checks, and nothing that harms on the way."""

import json

import pytest

LLMC = """
prune_stage:
  prune_modifiers:
    SparseGPTModifier: {sparsity: 0.5, mask_structure: "2:4", targets: ["re:.*mlp.*"], ignore: ["lm_head"], dampening_frac: 0.01}
quant_stage:
  quant_modifiers:
    SmoothQuantModifier: {smoothing_strength: 0.8}
    GPTQModifier:
      ignore: ["lm_head", "re:.*down_proj"]
      targets: Linear
      scheme: W4A16
    QuantizationModifier: {scheme: FP8_DYNAMIC, targets: Linear}
"""
OLIVE = {
    "input_model": {"type": "HfModel", "model_path": "org/name"},
    "passes": {
        "s": {"type": "SparseGPT", "sparsity": [2, 4]},
        "q": {"type": "Gptq", "bits": 4, "group_size": 64, "sym": True, "desc_act": False},
        "l": {"type": "LoRA", "r": 16, "alpha": 32, "training_args": {"max_steps": 100, "learning_rate": 1e-4}},
        "e": {"type": "SliceGPT"},
    },
    "evaluators": {"a": {}},
}


def test_modifiers_become_steps_in_their_order(effc, tmp_path):
    (tmp_path / "r.yaml").write_text(LLMC)
    run = effc("import", "r.yaml", "-o", "r.effspec")
    assert run.code == 0, run.err
    text = (tmp_path / "r.effspec").read_text()
    assert 'on: "**.*mlp*.**"' in text and 'pattern: "2:4"' in text and "sparsity: 50% of weights" in text
    assert "bits: 4," in text and "group: 128," in text and 'on: "layers.**" - "**.*down_proj",' in text
    assert "# SmoothQuantModifier: effc has nothing that does the same" in text and "FP8_DYNAMIC" in text
    assert effc("check", "r.effspec").code == 0
    assert effc("import", "r.yaml", "-o", "r.effspec").code == 2  # it is there


def test_awq_becomes_scaling_and_rounding_on_one_grid(effc, tmp_path):
    (tmp_path / "r.yaml").write_text('s: {m: {AWQModifier: {ignore: ["lm_head"], scheme: W4A16_ASYM, n_grid: 20}}}')
    assert effc("import", "r.yaml", "-o", "r.effspec").code == 0
    text = (tmp_path / "r.effspec").read_text()
    assert text.index("s = quantize.scale(") < text.index("q = quantize.round(") and text.count("group: 128") == 2
    assert effc("check", "r.effspec").code == 0


def test_olives_passes_become_steps_and_what_has_no_equivalent_a_comment(effc, tmp_path):
    (tmp_path / "r.json").write_text(json.dumps(OLIVE))
    run = effc("import", "r.json", "--format", "json")
    body = json.loads(run.out)
    text = body["text"]
    assert 'model base = hf("org/name")' in text and 'pattern: "2:4"' in text
    assert "zero: middle" in text and "order: given" in text
    assert any("SliceGPT" in said for said in body["left"]) and any("evaluators" in said for said in body["left"])
    assert any(
        "tune.heal(data: text.calib, rank: 16, alpha: 32" in said for said in body["left"]
    )  # it would fill the grid
    (tmp_path / "r.effspec").write_text(text)
    assert {d["slug"] for d in json.loads(effc("check", "r.effspec", "--format", "json").out)["diagnostics"]} == {
        "unseen-model"
    }


BOMB = "a: &a [x, x, x, x, x, x, x, x, x]\n" + "\n".join(
    f"{chr(98 + i)}: &{chr(98 + i)} [{', '.join([f'*{chr(97 + i)}'] * 9)}]" for i in range(9)
)


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("x.yaml", BOMB, "this has an anchor or its use"),
        ("x.yaml", "a: !!python/object/apply:os.system ['touch owned']", "this has a tag"),
        ("x.yaml", "a: 1\na: 2\n", "the key `a` stands twice"),
        ("x.yaml", "[" * 250_000, "x.yaml:1:41"),  # a scanner that goes on takes hours
        ("x.yaml", "a: {" * 60 + "}" * 60, "nested deeper than 40 levels"),
        ("x.yaml", "- " * 100_000, "nested deeper than 40 levels"),
        ("x.yaml", "a: [", "this is no YAML"),
        ("x.yaml", "a: 2020-01-01\n", "holds a date"),
        ("x.yaml", "x" * (300 << 10), "bytes"),
        ("x.json", "[" * 100_000, "this is no JSON"),
        ("x.json", '{"a": 1, "a": 2}', "twice"),
        ("x.json", '{"passes": ', "x.json:1:11"),
        ("x.yaml", "a: 1\n", "nothing-to-import"),
        ("x.yaml", "s: {m: {AWQModifier: {}}}", "nothing of x.yaml has an equivalent here"),
    ],
)
def test_what_is_no_recipe_or_harms_is_refused(effc, tmp_path, name, content, said):
    (tmp_path / name).write_text(content)
    run = effc("import", name)
    assert run.code in (2, 3, 5) and said in run.err and "Traceback" not in run.err and run.out == ""
    assert not (tmp_path / "owned").exists()


def test_foreign_texts_stay_comments(effc, tmp_path):
    evil = {"passes": {'x\n}\nemit made { hf("/etc") }': {"type": "A\u001b[31m"}, "q": {"type": "Rtn", "bits": 8}}}
    (tmp_path / "r.json").write_text(json.dumps(evil))
    text = json.loads(effc("import", "r.json", "--format", "json").out)["text"]
    assert text.count("\nemit ") == 1 and "\x1b" not in text
