"""What is measured while a checkpoint runs: activation ranges, attention, text rows, sensitivity."""
