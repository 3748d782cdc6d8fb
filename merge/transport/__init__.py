"""Optimal transport between the units of networks, whose widths may differ; tensors only."""
