"""What may be exchanged in a network without changing its function, as data; no torch here."""
