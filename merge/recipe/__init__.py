"""Recipes: YAML to a checked `Recipe` with a position for every key, and `Recipe` to IR."""
