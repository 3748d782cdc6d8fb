"""What a checkpoint's tensors are: so far, which layer each belongs to."""
