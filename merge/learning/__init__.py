"""Choices made by a score: which models to average, which value of a parameter to take."""
