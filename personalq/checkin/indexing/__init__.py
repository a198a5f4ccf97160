"""The Check-in index: built from the cards, published beside them, read by memory map."""
