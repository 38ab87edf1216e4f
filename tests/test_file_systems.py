"""The file system of a folder, from the table of mounts."""

from pathlib import Path

import pytest

from scfm_core import file_systems

MOUNTS = r"""22 1 254:0 / / rw,relatime shared:1 - ext4 /dev/vda rw
23 22 0:21 / /tmp rw - tmpfs tmpfs rw
24 22 0:22 / /home rw,relatime shared:9 - nfs4 filer:/home rw,vers=4.1
25 22 0:23 / /home/a\040b rw - xfs /dev/sdb rw
26 22 0:24 / /work rw - lustre 10.0.0.1@o2ib:/work rw,flock
27 22 0:25 / /twice rw - nfs filer:/old rw
28 22 0:26 / /twice rw - ext4 /dev/sdc rw
"""


@pytest.fixture(autouse=True)
def mounts(tmp_path, monkeypatch):
    (tmp_path / "mountinfo").write_text(MOUNTS)
    monkeypatch.setattr(file_systems, "_MOUNTS", tmp_path / "mountinfo")


@pytest.mark.parametrize(
    ("path", "kind"),
    [
        ("/", "ext4"),
        ("/homes/me", "ext4"),
        ("/tmp", "tmpfs"),
        ("/home/me/.cache/not/yet", "nfs4"),
        ("/home/a b/x", "xfs"),
        ("/work/x/../y", "lustre"),
        ("/twice/x", "ext4"),
    ],
)
def test_the_nearest_mount_counts(path, kind):
    assert file_systems.type_of(Path(path)) == kind


def test_an_unknown_table_is_no_answer(tmp_path):
    (tmp_path / "mountinfo").unlink()
    assert file_systems.type_of(Path("/home")) is None
    assert not file_systems.is_network(None) and not file_systems.is_memory(None)


@pytest.mark.parametrize(
    ("kind", "network", "memory"),
    [
        *((name, True, False) for name in ("nfs", "nfs4", "lustre", "gpfs", "beegfs", "cifs", "fuse.sshfs", "fuse.s3fs")),
        *((name, False, False) for name in ("ext4", "xfs", "btrfs", "overlay", "fuse.fuse-overlayfs", "fuseblk", "zfs")),
        ("tmpfs", False, True),
    ],
)  # fmt: skip
def test_network_and_memory(kind, network, memory):
    assert (file_systems.is_network(kind), file_systems.is_memory(kind)) == (network, memory)
