"""Errors caused by invalid input: one sentence, exit code 2, no traceback."""


class InputError(Exception):
    """Invalid input; the message is one sentence that says what is wrong, where, and what was expected."""
