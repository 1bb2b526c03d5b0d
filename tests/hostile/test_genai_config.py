"""`genai_config.json` of anybody, which onnxruntime-genai would read: it may name files and libraries."""

import json

import pytest
from effc.compiler.runtimes.onnx.genai import check_genai_config
from effc.dsl.syntax.diagnostics import Reject

WRITTEN = {
    "model": {"type": "decoder", "eos_token_id": [1, 2], "decoder": {"filename": "model.onnx"}},
    "search": {"top_k": 50},
}


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"decoder": {"filename": "../../etc/passwd"}}, "the text `../../etc/passwd`"),
        ({"decoder": {"session_options": {"custom_ops_library": "x.so"}}}, "a field `custom_ops_library`"),
        ({"decoder": {"session_options": {"provider_options": [{"cuda": {}}]}}}, "a field `cuda`"),
        ({"type": "phi3"}, "the text `phi3`"),
    ],
)
def test_what_effc_does_not_write_is_refused(tmp_path, change, words):
    (tmp_path / "genai_config.json").write_text(json.dumps(WRITTEN))
    check_genai_config(tmp_path)
    (tmp_path / "genai_config.json").write_text(json.dumps({"model": {**WRITTEN["model"], **change}}))
    with pytest.raises(Reject, match="which effc does not write") as refused:
        check_genai_config(tmp_path)
    assert words in refused.value.diagnostics[0].message


@pytest.mark.parametrize("text", ["{", "", '{"model": 1, "model": 2}', "[" * 10_000])
def test_what_is_no_json_is_one_sentence(tmp_path, text):
    (tmp_path / "genai_config.json").write_text(text)
    with pytest.raises(Reject, match=r"genai_config\.json is no JSON"):
        check_genai_config(tmp_path)
