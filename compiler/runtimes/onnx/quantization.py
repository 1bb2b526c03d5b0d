"""Weights of matrix products in int8, what they multiply rounded as it comes: ONNX Runtime's dynamic quantization."""

import logging
import tempfile
from pathlib import Path

from .checking import graphs_in, read_checked_onnx
from .nbits_checking import FLOAT_INPUTS, INT8_INPUTS, OPERATOR


def quantize_graphs(folder: Path) -> None:
    """Replace every graph of a folder, and the file of its weights, by one in int8.

    Weights of `MatMulNBits` keep their codes, and meet inputs in int8, too.
    """
    from onnxruntime.quantization import QuantType, quantize_dynamic

    before = logging.root.manager.disable
    logging.disable(logging.WARNING)  # it recommends steps of its own
    try:
        for name in graphs_in(folder):
            file = folder / f"{name}.onnx"
            with tempfile.TemporaryDirectory(dir=folder) as scratch:
                rounded = Path(scratch, file.name)  # the file of weights is named after it
                quantize_dynamic(
                    file, rounded, per_channel=True, weight_type=QuantType.QInt8, use_external_data_format=True
                )
                for path in (rounded, rounded.with_name(f"{file.name}.data")):
                    path.replace(folder / path.name)
            _round_inputs_of_nbits(file)
            read_checked_onnx(folder, name)
    finally:
        logging.disable(before)


def _round_inputs_of_nbits(file: Path) -> None:
    import onnx

    model = onnx.load(file, load_external_data=False)
    levels = [
        attribute
        for node in model.graph.node
        for attribute in node.attribute
        if (node.op_type, attribute.name, attribute.i) == (OPERATOR, "accuracy_level", FLOAT_INPUTS)
    ]
    for attribute in levels:
        attribute.i = INT8_INPUTS
    if levels:
        file.write_bytes(model.SerializeToString())
