"""One file per question: `personalq bench NAME`. Prints a table, then one JSON object as the last line."""
