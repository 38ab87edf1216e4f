"""Addresses of data: only allowed schemes, and no secrets, because addresses are stored in checkpoints."""

import itertools
import re
from urllib.parse import urlsplit

from scfm_core.errors import UserError

# scheme -> the extra with the package that fsspec needs for it
SCHEMES = {"s3": "s3", "https": "http", "http": "http", "gs": "gcs", "abfs": "azure", "az": "azure"}
_MAX_SHARDS, _MAX_BRACES = 1_000_000, 16


def is_remote(uri: str) -> bool:
    """Whether it must be downloaded; otherwise it is a path on this machine."""
    return "://" in uri and not uri.startswith("file://")


def refuse_uri(uri: str, where: str) -> None:
    """Refuse an address that is not allowed.

    Args:
        uri: an address or a path.
        where: the key of the recipe that has it, for the message.

    Raises:
        ValueError: for an unknown scheme, a pipe, or an address that contains a secret; the message does not repeat it.
    """
    if uri.startswith("pipe:") or "::" in uri or any(mark in uri for mark in ("$(", "`", "\0", "\n")):
        raise ValueError(
            f"{where}: commands and chained addresses are not supported; give a path or an address ({', '.join(SCHEMES)})"
        )
    if uri.startswith("file://"):
        raise ValueError(f"{where}: write only the path, without file://")
    if not is_remote(uri):
        if re.match(r"[A-Za-z][\w+.-]*:/", uri):
            raise ValueError(f"{where}: this is neither a path nor an address: an address has :// after its scheme")
        return
    scheme = uri.partition("://")[0]
    if scheme not in SCHEMES:
        named = f"scheme {scheme!r}" if re.fullmatch(r"[\w+.-]{1,20}", scheme) else "the text before ://"
        raise ValueError(f"{where}: {named} is unknown; give a path, or an address of {', '.join(SCHEMES)}")
    try:
        parts = urlsplit(uri)
    except ValueError:
        raise ValueError(f"{where}: the host of the {scheme} address is invalid") from None
    # abfs://container@account.dfs.core.windows.net is Azure's own form.
    if "@" in parts.netloc and not (scheme in ("abfs", "az") and ":" not in parts.netloc):
        raise ValueError(
            f"{where}: the address has a user or password before {parts.hostname!r}; the recipe is stored in every "
            f"checkpoint. Put credentials into the environment (AWS_ACCESS_KEY_ID, ...)"
        )
    if parts.query or parts.fragment:
        raise ValueError(
            f"{where}: the address {scheme}://{parts.netloc}{parts.path} has a query, which may hold a signature, and "
            f"the recipe is stored in every checkpoint. Give the address without it, and credentials in the environment"
        )
    if not parts.netloc:
        raise ValueError(f"{where}: {uri!r} names no {'bucket' if scheme in ('s3', 'gs') else 'host'}")


def join(base: str, name: str) -> str:
    """The address of `name` in the folder `base`."""
    return f"{base.rstrip('/')}/{name}"


def parent(uri: str) -> str:
    """The folder: the part before the last `/`."""
    return uri.rpartition("/")[0] or ("/" if uri.startswith("/") else ".")


def expand(uri: str, where: str) -> list[str]:
    """Expand braces: `{00..03}` and `{a,b}`.

    Args:
        uri: with any number of braces.
        where: the key of the recipe, for messages.

    Returns:
        the names, in order.

    Raises:
        UserError: if the braces do not close, or name a shard twice or too many shards.
    """
    import braceexpand

    # The library expands a whole range before the names can be counted, and it is recursive. So limit both first.
    ranges = re.findall(r"\{(-?\d+)\.\.(-?\d+)", uri)
    if any(abs(int(last) - int(first)) >= _MAX_SHARDS for first, last in ranges) or uri.count("{") > _MAX_BRACES:
        raise UserError(
            f"{where}: the braces name more than {_MAX_SHARDS} shards, or there are more than {_MAX_BRACES}"
        )
    try:
        names = list(itertools.islice(braceexpand.braceexpand(uri), _MAX_SHARDS + 1))
    except ValueError as error:
        raise UserError(f"{where}: the braces of {uri!r} do not close") from error
    if len(names) > _MAX_SHARDS:
        raise UserError(f"{where}: {uri!r} names more than {_MAX_SHARDS} shards")
    if len(set(names)) < len(names):
        raise UserError(f"{where}: {uri!r} names a shard twice")
    return names
