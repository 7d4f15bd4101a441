"""What this machine does, measured beside what it could do.

A module for each `pipeline bench` command; `planning` does the same on paper.
"""
