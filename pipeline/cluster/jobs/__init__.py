"""Trainings as jobs on a Ray cluster, over HTTP.

`submission.plan` checks one, `client.submit` sends it.
"""
