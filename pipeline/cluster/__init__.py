"""Processes and machines: who starts what, attempts after failures, and workers that come and go.

A command starts `supervisor`, which keeps a `driver` running; its `controller` has Ray
start a `worker` for each rank.
"""
