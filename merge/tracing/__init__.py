"""The symmetry of any network: derived from one run under a tracer, verified by numbers."""
