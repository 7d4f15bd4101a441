"""From image files to batches: what to read, in which order, and how it becomes pixels.

`stream` says which images form a batch, `batch_spec` what is drawn for them; `indexing` makes an index of a source,
`loading` reads, decodes and augments.
"""
