"""The exceptions that the command line prints without a traceback."""


class UserError(ValueError):
    """A mistake that the person at the keyboard can mend.

    The message says what is wrong, where, and how to mend it. Anything else that is raised is a defect of
    this project and keeps its traceback.
    """

    agreed = False
    """Whether every process of the run raises this same message, so that one of them is enough to print it."""


class PeerLost(RuntimeError):
    """Another process of the run is gone or stands still; the message names it."""

    exit_code = 70  # sysexits.h, EX_SOFTWARE: neither a user's mistake (2) nor a signal (128 + n)
