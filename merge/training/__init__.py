"""Merging while networks are trained: coefficients as parameters, averages, pulls to an anchor."""
