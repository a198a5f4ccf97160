"""Passes over onnx_ir graphs, and the nodes they are made of."""
