"""What personalised checkpoints are, and which one a request means."""
