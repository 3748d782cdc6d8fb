"""PEFT adapters as data: what they add to a model, and models' differences as adapters."""
