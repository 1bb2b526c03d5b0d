"""Sounds and time series as ONNX: written in float32 also where a model is of halves, and compared in a fresh process."""

import pytest
import torch
import transformers
from effc.compiler.artifacts.load import load
from effc.compiler.driver import api
from effc.dsl.syntax.diagnostics import Reject

from tests.architectures.table import randomized

pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")
pytestmark = pytest.mark.slow
torch.set_num_threads(1)
_SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
RECIPE = """effspec 1
model base = hf("./m")
data rows = synthetic(count: 4)
pipeline lean(base) {{ cut = prune.channels(keep: 75% of channels, align: 8) }}
expect lean {{ {bound} }}
emit lean {{ onnx("on") }}
"""


def wav2vec2():
    config = transformers.Wav2Vec2Config(
        **_SIZES, vocab_size=32, conv_dim=[16] * 7, num_conv_pos_embedding_groups=4, hidden_act="gelu"
    )
    return transformers.Wav2Vec2ForCTC(config)


def patchtst():
    sizes = {"d_model": 16, "ffn_dim": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = transformers.PatchTSTConfig(context_length=32, patch_length=8, num_input_channels=3, **sizes)
    return transformers.PatchTSTForPrediction(config)


@pytest.mark.parametrize(("make", "dtype"), [(wav2vec2, torch.bfloat16), (patchtst, torch.float32)])
def test_what_takes_samples_is_written_and_opened(tmp_path, make, dtype):
    model = randomized(make).to(dtype)
    model.save_pretrained(tmp_path / "m")
    (tmp_path / "r.effspec").write_text(RECIPE.format(bound="params <= 1 * base"))
    (result,) = api.compile(tmp_path / "r.effspec", tmp_path / "out", cache_dir=tmp_path / "cache", threads=1)
    assert all(check.holds for check in result.artifacts[0].manifest.checks)
    opened = load(tmp_path / "out" / "on")
    rows = torch.randn(2, 1600) if make is wav2vec2 else torch.randn(2, 32, 3)
    assert opened(rows).isfinite().all()


def test_states_are_not_compared_with_a_result(tmp_path):
    randomized(patchtst).save_pretrained(tmp_path / "m")
    (tmp_path / "r.effspec").write_text(RECIPE.format(bound="similarity(rows) >= 0.5"))
    with pytest.raises(Reject, match="similarity compares hidden states of"):
        api.compile(tmp_path / "r.effspec", tmp_path / "out", cache_dir=tmp_path / "cache", threads=1)
