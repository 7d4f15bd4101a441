"""`pipeline doctor`: what is wrong with a cluster, and what to do.

`examine.examine` is the way in for Ray, `examine_kubernetes.examine` for Kubernetes.
"""
