"""Usage data, which ONNX Runtime sends to its maker unless it is told not to."""

import os
import subprocess
import sys

import pytest

RUN = """
import effc.compiler.runtimes.onnx.session
import numpy, onnxruntime
from onnx import helper
values = [helper.make_tensor_value_info(name, 1, [1]) for name in "xy"]
graph = helper.make_graph([helper.make_node("Identity", ["x"], ["y"])], "g", values[:1], values[1:])
model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)
session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
session.run(None, {"x": numpy.ones(1, numpy.float32)})
"""


@pytest.mark.slow
def test_onnx_runtime_keeps_and_sends_no_usage_data(tmp_path):
    variables = {name: value for name, value in os.environ.items() if name not in ("CI", "ORT_DISABLE_TELEMETRY")}
    variables |= {"HOME": str(tmp_path), "XDG_CACHE_HOME": str(tmp_path / "cache")}
    subprocess.run([sys.executable, "-c", RUN], env=variables, check=True)
    assert not list(tmp_path.rglob("*Microsoft*"))
