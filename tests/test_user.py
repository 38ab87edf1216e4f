"""A uid without a name and without a home, as in many containers."""

import getpass
import os
import pwd
import tempfile
from pathlib import Path

import pytest

from scfm_core.errors import UserError
from scfm_core.user import provide_user


@pytest.fixture
def nobody(monkeypatch, tmp_path):
    def unknown(uid: int) -> object:
        raise KeyError(f"getpwuid(): uid not found: {uid}")

    monkeypatch.setattr(pwd, "getpwuid", unknown)
    for name in ("USER", "LOGNAME", "LNAME", "USERNAME", "HOME"):
        monkeypatch.setenv(name, "before")  # restored at the end
        monkeypatch.delenv(name)
    monkeypatch.setattr(tempfile, "gettempdir", lambda: str(tmp_path))
    return tmp_path / f"scfm-home-{os.getuid()}"


def test_gets_a_name_and_a_home_of_its_own(nobody, capsys):
    for _ in range(2):  # the second time it is there
        os.environ.pop("HOME", None)
        provide_user()
    assert getpass.getuser() == f"uid{os.getuid()}"
    assert Path("~").expanduser() == nobody
    assert nobody.stat().st_mode & 0o777 == 0o700
    assert capsys.readouterr().err.count(f"HOME is {nobody}") == 2


def test_keeps_what_it_has(nobody, monkeypatch):
    monkeypatch.setenv("HOME", "/nonexistent")
    monkeypatch.setenv("USER", "me")
    provide_user()
    assert (os.environ["HOME"], os.environ["USER"]) == ("/nonexistent", "me")
    assert not nobody.exists()


@pytest.mark.parametrize("kind", ["link", "open to others"])
def test_never_uses_a_home_of_somebody_else(nobody, tmp_path, kind):
    if kind == "link":
        (tmp_path / "theirs").mkdir()
        nobody.symlink_to(tmp_path / "theirs")
    else:
        nobody.mkdir()
        nobody.chmod(0o777)
    with pytest.raises(UserError, match=r"belongs to somebody else. Set HOME"):
        provide_user()


def test_without_any_writable_folder(nobody, monkeypatch):
    def none() -> str:
        raise FileNotFoundError(2, "No usable temporary directory found in ['/tmp']")

    monkeypatch.setattr(tempfile, "gettempdir", none)
    with pytest.raises(UserError, match=r"No usable temporary directory.*Set HOME or TMPDIR"):
        provide_user()
