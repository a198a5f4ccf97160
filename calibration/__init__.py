"""Run a checkpoint, collect trigger-token statistics, apply a policy, emit a TAQ spec. Needs torch and diffusers."""
