"""From image files to batches: what to read, in which order, and how it becomes pixels."""
