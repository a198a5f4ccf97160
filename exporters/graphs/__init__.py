"""The ONNX graphs of a family: traced once, rewritten by passes, lowered for a target, audited by a census."""
