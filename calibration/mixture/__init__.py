"""What a base is calibrated over: prompts that span what it draws, and the checkpoints that will be attached to it."""
