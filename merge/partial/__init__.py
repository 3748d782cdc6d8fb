"""Networks joined in part: units of several that become one, and units that stay apart."""
