"""Objects of remote storage, through fsspec: attempts with growing pauses, and a deadline."""

import errno
import os
import random
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from scfm_core.data.uri import SCHEMES
from scfm_core.errors import UserError
from scfm_core.secrets import scrub

# No byte for so long: the connection is dead. One of several attempts, so far below any deadline.
_CONNECT_SECONDS, _STALL_SECONDS = 10.0, 20.0
_OF_THE_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS)


def fetch(uri: str, target: Path, deadline: float) -> None:
    """One object into a file.

    Args:
        uri: of a whitelisted scheme.
        target: written over.
        deadline: seconds, attempts and pauses included.

    Raises:
        UserError: if it is not there, not allowed, or not to be had within the deadline.
        OSError: of the local disk.
    """

    def get(left: float) -> None:
        filesystem, path = _filesystem(uri, left)
        filesystem.get_file(path, str(target), timeout=left)

    _attempts(uri, get, deadline)


def read(uri: str, deadline: float) -> bytes:
    """A small object; errors as `fetch`."""

    def cat(left: float) -> bytes:
        filesystem, path = _filesystem(uri, left)
        return bytes(filesystem.cat_file(path, timeout=left))

    return _attempts(uri, cat, deadline)


def names_below(uri: str, deadline: float) -> list[str]:
    """The names of the objects in a folder; errors as `fetch`."""

    def ls(left: float) -> list[str]:
        filesystem, path = _filesystem(uri, left)
        return [str(name).rpartition("/")[2] for name in filesystem.ls(path, detail=False, timeout=left)]

    return list(_attempts(uri, ls, deadline))


def close_connections() -> None:
    """Forget open connections, before processes are forked that would share them."""
    for name, scheme in (("s3fs", "s3"), ("fsspec.implementations.http", "https")):
        if name in sys.modules:
            import fsspec

            fsspec.get_filesystem_class(scheme).clear_instance_cache()


def _filesystem(uri: str, left: float) -> tuple[Any, str]:
    import fsspec

    scheme = uri.partition("://")[0]
    # Of few values, since each makes a client of its own.
    stall = next((seconds for seconds in (_STALL_SECONDS, 5.0) if left > seconds), 1.0)
    options: dict[str, Any] = {}
    if scheme == "s3":
        endpoint = os.environ.get("S3_ENDPOINT_URL") or os.environ.get("AWS_ENDPOINT_URL")
        options = {
            "endpoint_url": endpoint,
            "use_listings_cache": False,
            "config_kwargs": {
                "connect_timeout": _CONNECT_SECONDS,
                "read_timeout": stall,
                "retries": {"total_max_attempts": 1},
            },
        }
    try:
        if scheme in ("http", "https"):
            import aiohttp

            timeout = aiohttp.ClientTimeout(total=None, sock_connect=_CONNECT_SECONDS, sock_read=stall)
            options = {"client_kwargs": {"timeout": timeout}}
        filesystem, path = fsspec.core.url_to_fs(uri, **options)
    except ImportError as error:
        raise UserError(f"data: {uri} needs one more package: {SCHEMES[scheme]}") from error
    if scheme == "s3":
        filesystem.retries = 1  # attempts are counted here, not in both
    return filesystem, str(path)


def _attempts(uri: str, call: Callable[[float], Any], deadline: float) -> Any:
    end, pause = time.monotonic() + deadline, 0.25
    while True:
        try:
            return call(max(1.0, end - time.monotonic()))
        except UserError:
            raise
        except FileNotFoundError as error:
            if error.filename is not None:  # the local side: the target's folder has gone
                raise
            raise UserError(f"data: there is no {uri} (404): {_said(error)}") from None  # it repeats the server's words
        except PermissionError as error:
            if error.filename is not None:
                raise
            raise UserError(
                f"data: {uri} may not be read (403): {_said(error)}. Check the credentials in the environment"
            ) from None
        except Exception as error:  # botocore, aiohttp, asyncio and OSError, of some twenty classes
            if isinstance(error, OSError) and (error.filename is not None or error.errno in _OF_THE_DISK):
                raise
            final = _final(error)
            if final:
                raise UserError(f"data: {uri} cannot be read: {final} ({_said(error)})") from None
            left = end - time.monotonic()
            if left <= pause:
                raise UserError(
                    f"data: {uri} could not be read within {deadline:.0f} s, the last attempt ended with: {_said(error)}. "
                    f"If the storage is slow, raise data.cache.timeout"
                ) from None
        time.sleep(pause * random.uniform(0.5, 1.0))  # not all processes at once
        pause = min(2 * pause, 10.0)


def _final(error: Exception) -> str | None:
    """Why another attempt would not help, or None."""
    status = getattr(error, "status", None)
    if isinstance(status, int) and 400 <= status < 500 and status not in (408, 429):
        return f"the server answers {status}"
    if type(error).__name__ in ("NoCredentialsError", "PartialCredentialsError"):
        return "there are no credentials. Set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or a profile"
    return None


def _said(error: Exception) -> str:
    """An error in one line, without what the environment keeps secret."""
    # aiohttp's repr holds the request with its headers.
    status = getattr(error, "status", None)
    text = f"status {status}" if isinstance(status, int) else f"{type(error).__name__}: {error}".strip(": ")
    return scrub(" ".join(text.split()))[:300]
