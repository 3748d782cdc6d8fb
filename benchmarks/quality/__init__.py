"""Eight text tasks, an expert for each, and every way to make one model of them."""
