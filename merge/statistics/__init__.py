"""What data says of a network's weights: Gram matrices of inputs, Fisher information."""
