"""Types that went wrong in a lot once: each is pruned, emitted and reopened by a whole recipe."""

import pytest
import torch
from effc.compiler.driver import api
from effc.compiler.ir.layers import scan_chunks
from effc.compiler.ir.layers.fast_mixers import use_mixer_kernels

from tests.architectures import lot

pytestmark = pytest.mark.slow

_CUT = "prune.multi(remove: 10% of params, group: 8, score: {}(rows))"
_ZEROS = "sparsify.wanda(sparsity: 50%, data: rows)"
TYPES = [
    ("encoder-decoder", _CUT.format("perplexity")),  # its config has two others, each with a vocabulary
    ("clipseg", _CUT.format("similarity")),  # has a scalar parameter, and no vocabulary at the top
    ("inkling2_loop", _CUT.format("perplexity").replace("10%", "8%")),  # cut branches left convolutions with a state
    ("speech-encoder-decoder", _CUT.format("perplexity")),  # calls what its encoder hears `inputs`
    ("fsmt", _CUT.format("similarity")),  # hands on a causal mask only where no cache is kept
    ("levit", _CUT.format("similarity")),  # keeps biases by device, those of heads that are gone among them
    ("granite_speech5_ctc", _ZEROS),  # its first layer takes features of four frames in a row
    ("cpmant", _ZEROS),  # its forward takes `use_cache`, and no single token behind what it cached
]


@pytest.mark.parametrize(("kind", "step"), TYPES, ids=[kind for kind, _ in TYPES])
def test_a_type_that_went_wrong_in_a_lot_is_compiled_and_reopened(kind, step, tmp_path):
    lot.made(kind, lot.classes()[kind]).save_pretrained(tmp_path / "model")
    (tmp_path / "r.effspec").write_text(
        'effspec 1\nmodel base = hf("./model")\ndata rows = synthetic(count: 4)\n'
        f"pipeline small(base) {{ slim = {step} }}\n"
        'emit small { hf("small") }\n'
    )
    api.compile(tmp_path / "r.effspec", tmp_path / "out", cache_dir=tmp_path / "cache", threads=1)
    assert (tmp_path / "out" / "small" / "manifest.json").exists()


def test_a_convolution_whose_forward_takes_other_arguments_than_a_mixers_runs_as_the_library_runs_it():
    model = lot.made("inkling2_loop", "Inkling2LoopForConditionalGeneration").eval()
    ids = torch.arange(2 * scan_chunks.LEAST).view(2, -1) % 100
    with torch.no_grad():
        before = model(ids).logits
        assert any("sconv" in path for path in use_mixer_kernels(model))
        assert torch.allclose(model(ids).logits, before, atol=1e-4)
