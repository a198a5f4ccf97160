"""The FP32 model as torch runs it: loaded, told its prompts, and its reference outputs."""
