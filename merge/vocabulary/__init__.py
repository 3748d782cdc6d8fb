"""Tokenizers as data: vocabularies, their union, whose rows go where, the files of the result."""
