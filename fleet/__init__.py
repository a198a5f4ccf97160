"""Many checkpoints over many processes or machines: calibrate, export, verify and serve them, in steps that can be rerun."""
