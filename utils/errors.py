"""Errors that a user can mend: one sentence, exit code 2, no traceback."""


class InputError(Exception):
    """What the user gave cannot be used; the message is one sentence that names it and says what was expected."""
