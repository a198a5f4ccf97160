"""What an author wrote about a checkpoint: cards, model cards, sidecars, file headers, catalogues."""
