"""Many checkpoints, many processes or machines: calibrate, export and verify all of them, as steps that can be run again."""
