"""The levels of the gate, one file each, and the limits they hold a bundle to."""
