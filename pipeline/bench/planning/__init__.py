"""`pipeline plan`: hours, cost and goodput on a number of GPUs, on paper.

`plan.plan` is the way in.
"""
