"""Which file system holds a folder: a local disk, a network, or memory."""

import re
from pathlib import Path

_MOUNTS = Path("/proc/self/mountinfo")
_NETWORK = re.compile(
    r"nfs\d?|lustre|gpfs|beegfs|ceph|cifs|smb\d?|afs|glusterfs|pvfs2|panfs|wekafs|9p|virtiofs|"
    r"fuse\.(?!fuseblk|overlay|fuse-overlayfs).*"
)
_MEMORY = re.compile(r"tmpfs|ramfs|devtmpfs")


def type_of(path: Path) -> str | None:
    """Type of the file system of a path, as `ext4`, `nfs4` or `lustre`; None if the system does not tell (not Linux).

    Args:
        path: may not exist yet; then its nearest existing parent counts.
    """
    place = path.expanduser().resolve()
    best, found = -1, None
    try:
        lines = _MOUNTS.read_text(encoding="utf-8", errors="surrogateescape").splitlines()
    except OSError:
        return None
    # https://man7.org/linux/man-pages/man5/proc_pid_mountinfo.5.html: ... MOUNT-POINT OPTIONS ... - TYPE SOURCE OPTIONS
    for line in lines:
        before, _, after = line.partition(" - ")
        point = Path(re.sub(r"\\([0-7]{3})", lambda octal: chr(int(octal[1], 8)), before.split(" ")[4]))
        if len(point.parts) >= best and place.is_relative_to(
            point
        ):  # a later mount on the same folder hides the earlier
            best, found = len(point.parts), after.split(" ")[0]
    return found


def is_network(kind: str | None) -> bool:
    """Whether a type of `type_of` is a file system of several machines."""
    return kind is not None and bool(_NETWORK.fullmatch(kind))


def is_memory(kind: str | None) -> bool:
    """Whether a type of `type_of` keeps files in memory."""
    return kind is not None and bool(_MEMORY.fullmatch(kind))
