"""The error of a request that cannot be carried out as it stands: its text is one line for the user."""


class UserError(ValueError):
    """A request that cannot be carried out as it stands; its text is one line for the user."""
