"""The Check-in index: built from the cards, published beside them, memory-mapped to read."""
