"""The exceptions that the command line prints without a traceback."""


class UserError(ValueError):
    """A mistake that the user can fix.

    The message says what is wrong, where, and how to fix it. Any other exception is a bug of this project and keeps its
    traceback.
    """

    exit_code = 2
    """Of a command that ends with this error."""
    agreed = False
    """Whether every process of the run raises this same message: then rank 0 alone prints it."""


def missing_extra(purpose: str, extra: str, error: ImportError, otherwise: str = "") -> UserError:
    """The error of an optional package that cannot be imported.

    Args:
        purpose: what needs the package.
        extra: the extra of scfm, in pyproject.toml, that installs it.
        error: of the import.
        otherwise: how to do without, as `set wandb.mode=disabled`.
    """
    choice = f", or {otherwise}" if otherwise else ""
    return UserError(
        f"{purpose} needs a package that cannot be imported ({error}): pip install 'scfm[{extra}]'{choice}"
    )


def agreed_error(message: str) -> UserError:
    """An error that every process of the run raises with the same message."""
    error = UserError(message)
    error.agreed = True
    return error


class RunBusy(UserError):
    """Another process trains in the folder of the run. Later the same command may work."""

    exit_code = 75  # sysexits.h, EX_TEMPFAIL


class PeerLost(RuntimeError):
    """Another process of the run has ended or makes no progress; the message names it."""

    exit_code = 70  # sysexits.h, EX_SOFTWARE: neither a user's mistake (2) nor a signal (128 + n)
