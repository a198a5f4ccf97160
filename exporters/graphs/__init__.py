"""The ONNX graphs of a family: traced once, changed by passes, lowered for a target, counted."""
