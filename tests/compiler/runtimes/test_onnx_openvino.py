"""The files of `onnx` in OpenVINO's reader: codes stay codes, and its logits are ONNX Runtime's."""

import pytest
import torch

pytest.importorskip("onnx")
pytest.importorskip("onnxscript")
pytest.importorskip("onnxruntime")
pytest.importorskip("openvino", reason="openvino is not installed")

from bench.openvino_onnx import EXACT, FORMATS, OpenVinoDecoder, largest_differences, write_onnx

torch.set_num_threads(1)


@pytest.mark.parametrize(
    ("name", "types"),
    [("dense", "23 f32"), ("codes of 4 bits", "2 f32, 21 u4"), ("codes of 8 bits, 0 in the middle", "2 f32, 21 u8")],
)
def test_openvino_computes_the_logits_that_onnx_runtime_computes(tmp_path, name, types):
    folder = write_onnx(tmp_path, *FORMATS[name])
    decoder = OpenVinoDecoder(folder, EXACT)
    assert decoder.types_of_weights() == types
    differences = largest_differences(folder, decoder)
    # Another order of sums; a NaN is below nothing.
    assert len(differences) == 3 and all(share < 1e-4 for share in differences.values()), differences
