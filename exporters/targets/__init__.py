"""Bundles for one target or tool: TensorRT plans, Triton models, the optimum layout."""
