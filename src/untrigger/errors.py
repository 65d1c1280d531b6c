"""The one error that users see: a line that says what is wrong, where, and how to mend it."""


class InputError(Exception):
    """Bad input from the user. The CLI prints it as one line, without a traceback, and exits with 2.

    Write the message as ``FILE: row N: what is wrong; what to do``.
    """
