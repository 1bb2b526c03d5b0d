"""ONNX files, and ONNX Runtime, which sends no usage data to its maker from here."""

import os

# Since 1.29 it does on Linux and macOS, too, unless this is set before its import (microsoft/onnxruntime #27379).
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
