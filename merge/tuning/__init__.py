"""Values of a recipe that a score chooses: which numbers there are, what was tried, the result."""
