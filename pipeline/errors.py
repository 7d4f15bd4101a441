"""The error of users' mistakes, and other errors in a line."""


class UserError(ValueError):
    """A request that cannot be carried out as it stands; its text is one line for the user."""


class NonRetryableError(UserError):
    """A request that would be refused each time: whoever makes requests by himself should not make it again."""


def one_line(error: BaseException) -> str:
    """An error's class and the first line of its text."""
    return f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0]}"
