"""What a delta does to its base: each kind of file, its spellings, and the edits of parameters that it becomes."""
