"""The FP32 model in torch: building it from the reader's weights, calling it, recording its reference outputs."""
