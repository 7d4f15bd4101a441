"""The command line: what each command takes, does and prints.

`app.main` is the way in.
"""
