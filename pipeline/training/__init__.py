"""One rank's work, without Ray: the loop, the step, evaluation, and what a run leaves behind.

`loop.fit` is the way in.
"""
