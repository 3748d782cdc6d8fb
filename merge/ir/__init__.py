"""The weight-space IR: what is to be computed, as data."""
