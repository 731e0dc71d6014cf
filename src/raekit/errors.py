"""The one exception that a user is meant to see."""


class UserError(Exception):
    """Bad input or a failing environment.

    The message names the file, field or value at fault and says what to do. The command line prints it
    alone, without a traceback, and exits with 1.
    """
