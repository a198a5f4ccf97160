"""A checkpoint's tensors by their parameter's name, from every layout, with its delta merged. The one reader for all rooms."""
