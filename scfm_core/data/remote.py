"""Reading of remote storage through fsspec, with retries, growing pauses between them, and a deadline."""

import errno
import os
import random
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from scfm_core.data.uri import SCHEMES
from scfm_core.errors import UserError, missing_extra
from scfm_core.progress import beat
from scfm_core.secrets import scrub

# Timeouts of one attempt, far below any deadline. Without a byte for _STALL_SECONDS the connection counts as dead.
_CONNECT_SECONDS, _STALL_SECONDS = 10.0, 20.0
_DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS)


class MissingObject(UserError):
    """There is no object of this address."""


def fetch(uri: str, target: Path, deadline: float) -> None:
    """Download one object into a file.

    Args:
        uri: of an allowed scheme.
        target: overwritten.
        deadline: seconds, with all retries and the pauses between them.

    Raises:
        MissingObject: if there is no such object.
        UserError: if it is not permitted, or unavailable until the deadline.
        OSError: from the local disk.
    """

    def get(left: float) -> None:
        from fsspec.callbacks import Callback

        filesystem, path = _filesystem(uri, left)
        progress = Callback(hooks={"beat": lambda *_: beat(f"downloading {uri}")})
        filesystem.get_file(path, str(target), timeout=left, callback=progress)

    _retry(uri, get, deadline)


def read(uri: str, deadline: float) -> bytes:
    """The content of a small object; arguments and errors as `fetch`."""

    def cat(left: float) -> bytes:
        filesystem, path = _filesystem(uri, left)
        return bytes(filesystem.cat_file(path, timeout=left))

    return _retry(uri, cat, deadline)


def names_below(uri: str, deadline: float) -> list[str]:
    """The names of the objects in a folder, without its subfolders; arguments and errors as `fetch`."""

    def ls(left: float) -> list[str]:
        filesystem, path = _filesystem(uri, left)
        return [str(name).rpartition("/")[2] for name in filesystem.ls(path, detail=False, timeout=left)]

    return list(_retry(uri, ls, deadline))


def close_connections() -> None:
    """Drop open connections. Call before a fork: the child process would share them."""
    for name, scheme in (("s3fs", "s3"), ("fsspec.implementations.http", "https")):
        if name in sys.modules:
            import fsspec

            fsspec.get_filesystem_class(scheme).clear_instance_cache()


def _filesystem(uri: str, left: float) -> tuple[Any, str]:
    import fsspec

    scheme = uri.partition("://")[0]
    # One of few values, because fsspec makes a client for each value.
    stall = next((seconds for seconds in (_STALL_SECONDS, 5.0) if left > seconds), 1.0)
    options: dict[str, Any] = {}
    if scheme == "s3":
        endpoint = os.environ.get("S3_ENDPOINT_URL") or os.environ.get("AWS_ENDPOINT_URL")
        options = {
            "endpoint_url": endpoint,
            "use_listings_cache": False,
            # Parts of 50 MiB at once would be in memory, ten for each download, and be no sign of progress until all are there.
            "max_concurrency": 1,
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
        raise missing_extra(f"data: {uri}", SCHEMES[scheme], error) from error
    if scheme == "s3":
        filesystem.retries = 1  # `_retry` does the retries; without this both would
    return filesystem, str(path)


def _retry(uri: str, call: Callable[[float], Any], deadline: float) -> Any:
    """The result of `call(seconds left)`, called again after errors that may pass."""
    end, pause = time.monotonic() + deadline, 0.25
    while True:
        try:
            return call(max(1.0, end - time.monotonic()))
        except UserError:
            raise
        except FileNotFoundError as error:
            if error.filename is not None:  # of the local disk: the target's folder was deleted
                raise
            raise MissingObject(
                f"data: there is no {uri} (404): {_summary(error)}"
            ) from None  # the cause may hold secrets
        except PermissionError as error:
            if error.filename is not None:
                raise
            raise UserError(
                f"data: no permission to read {uri} (403): {_summary(error)}. Check the credentials in the environment"
            ) from None
        except Exception as error:  # some twenty classes, of botocore, aiohttp, asyncio and OSError
            if isinstance(error, OSError) and (error.filename is not None or error.errno in _DISK_ERRORS):
                raise
            reason = _permanent_reason(error)
            if reason:
                raise UserError(f"data: {uri} cannot be read: {reason} ({_summary(error)})") from None
            left = end - time.monotonic()
            if left <= pause:
                raise UserError(
                    f"data: {uri} could not be read within {deadline:.0f} s; the last attempt failed with: {_summary(error)}. "
                    f"If the storage is slow, raise data.cache.timeout"
                ) from None
        beat(f"waiting to read {uri} again")
        time.sleep(pause * random.uniform(0.5, 1.0))  # jitter, so that not all processes retry at once
        pause = min(2 * pause, 10.0)


def _permanent_reason(error: Exception) -> str | None:
    """Why a retry would not help; None if it may help."""
    status = getattr(error, "status", None)
    if isinstance(status, int) and 400 <= status < 500 and status not in (408, 429):
        return f"the server answers {status}"
    if type(error).__name__ in ("NoCredentialsError", "PartialCredentialsError"):
        return "there are no credentials. Set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or a profile"
    return None


def _summary(error: Exception) -> str:
    """An error in one line, without the secrets of the environment."""
    # The repr of aiohttp's errors holds the headers of the request, so only their status is used.
    status = getattr(error, "status", None)
    text = f"status {status}" if isinstance(status, int) else f"{type(error).__name__}: {error}".strip(": ")
    return scrub(" ".join(text.split()))[:300]
