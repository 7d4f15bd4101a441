"""A training's report: one HTML page and its figures.

`page.write_report` is the way in.
"""
