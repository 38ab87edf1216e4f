"""The user of a container: a uid that /etc/passwd does not have, without a name and a home."""

import os
import pwd
import sys
import tempfile
from pathlib import Path

from scfm_core.errors import UserError


def provide_user() -> None:
    """Set USER and HOME if this user has none: torch, streaming, wandb and others ask for them, and fail.

    Raises:
        UserError: if there is no folder that could be the home.
    """
    try:
        pwd.getpwuid(os.getuid())
        return
    except KeyError:
        os.environ.setdefault("USER", f"uid{os.getuid()}")
    if os.environ.get("HOME"):
        return
    try:
        home = Path(tempfile.gettempdir()) / f"scfm-home-{os.getuid()}"
        home.mkdir(mode=0o700, exist_ok=True)
        status = home.lstat()
    except OSError as error:
        raise UserError(f"this user has no home folder, and none can be made ({error}). Set HOME or TMPDIR") from error
    if not home.is_dir() or home.is_symlink() or status.st_uid != os.getuid() or status.st_mode & 0o022:
        raise UserError(f"this user has no home folder, and {home} belongs to somebody else. Set HOME")
    os.environ["HOME"] = str(home)
    print(f"scfm: this user has no home folder: HOME is {home}", file=sys.stderr)
