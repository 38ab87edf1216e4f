"""The one exception that the command line prints without a traceback."""


class UserError(ValueError):
    """A mistake that the person at the keyboard can mend.

    The message says what is wrong, where, and how to mend it. Anything else that is raised is a defect of
    this project and keeps its traceback.
    """
