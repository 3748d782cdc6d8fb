"""Examples from files as batches of a task: texts, tables, pictures, arrays, or one's own code."""
