"""The exception for errors that the user can fix."""


class UserError(Exception):
    """Bad input or a failing environment.

    The message says what is wrong, where, and what to do. The command line prints the message without a traceback and
    exits with 1.
    """
