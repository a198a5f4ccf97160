"""Texts to vectors: the sentence encoder, and vectors composed from token vectors."""
