"""A run in its storage: whose it is, its checkpoints, which of them stay, and from which it goes on.

`checkpoint` writes and reads one, `async_checkpointer` writes beside training, `resume` finds the newest valid one.
"""
