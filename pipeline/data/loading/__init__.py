"""From rows of an index to batches on the device.

`loader.TrainLoader` and `loader.EvalLoader` are the way in.
"""
