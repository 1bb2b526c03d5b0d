"""Weights of matrix products in int8, what they multiply rounded as it comes: ONNX Runtime's dynamic quantization."""

import logging
import tempfile
from pathlib import Path

from .checking import graphs_in, read_checked_onnx


def quantize_graphs(folder: Path) -> None:
    """Replace every graph of a folder, and the file of its weights, by one in int8."""
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
            read_checked_onnx(folder, name)
    finally:
        logging.disable(before)
