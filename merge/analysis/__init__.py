"""What networks do: tasks as data, the loss along the line between two of them, pictures."""
