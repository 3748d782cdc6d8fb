"""Networks in other sizes: which units and blocks to keep, and what makes up for the rest."""
