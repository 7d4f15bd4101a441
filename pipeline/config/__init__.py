"""The settings of a training: their schema, defaults and checks, and how they are read.

`schema.Config` is all of them; `loading.load` reads a file and overrides.
"""
