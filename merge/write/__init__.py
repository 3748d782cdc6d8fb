"""Sinks: where results go. A folder that appears whole or not at all, or memory."""
