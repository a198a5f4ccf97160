"""What running a checkpoint shows: activation ranges, attention, text rows, sensitivity."""
