"""Networks brought into one another's coordinates: costs, solvers, matching; tensors, no files."""
