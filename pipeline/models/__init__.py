"""The network, its weights by name, and its files for others.

`resnet.ResNet` is the network.
"""
