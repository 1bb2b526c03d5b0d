"""Runtimes of artifacts: native engine, ONNX Runtime, GGUF."""
