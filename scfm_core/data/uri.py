"""Where data may come from: a whitelist of schemes, and nothing in an address that must not be stored."""

import itertools
import re
from urllib.parse import urlsplit

from scfm_core.errors import UserError

# scheme -> what fsspec needs beside itself
SCHEMES = {
    "s3": "pip install 'scfm[s3]'",
    "https": "pip install aiohttp",
    "http": "pip install aiohttp",
    "gs": "pip install gcsfs",
    "abfs": "pip install adlfs",
    "az": "pip install adlfs",
}
_MOST_SHARDS, _MOST_BRACES = 1_000_000, 16


def is_remote(uri: str) -> bool:
    """Whether it must be fetched; a path of this machine otherwise."""
    return "://" in uri and not uri.startswith("file://")


def refuse_uri(uri: str, where: str) -> None:
    """Hold an address against the whitelist.

    Raises:
        ValueError: for another scheme, a pipe, or an address with a secret in it; the secret is not repeated.
    """
    if uri.startswith("pipe:") or "::" in uri or any(mark in uri for mark in ("$(", "`", "\0", "\n")):
        raise ValueError(
            f"{where}: commands are not run, nor chains of addresses; give a path or an address ({', '.join(SCHEMES)})"
        )
    if uri.startswith("file://"):
        raise ValueError(f"{where}: write the path itself, without file://")
    if not is_remote(uri):
        if re.match(r"[A-Za-z][\w+.-]*:/", uri):
            raise ValueError(f"{where}: this is neither a path nor an address, which has :// behind its scheme")
        return
    scheme = uri.partition("://")[0]
    if scheme not in SCHEMES:
        named = f"scheme {scheme!r}" if re.fullmatch(r"[\w+.-]{1,20}", scheme) else "what stands before ://"
        raise ValueError(f"{where}: {named} is not known; a path, or one of {', '.join(SCHEMES)}")
    try:
        parts = urlsplit(uri)
    except ValueError:
        raise ValueError(f"{where}: the host of the {scheme} address is none") from None
    # abfs://container@account.dfs.core.windows.net is Azure's own form.
    if "@" in parts.netloc and not (scheme in ("abfs", "az") and ":" not in parts.netloc):
        raise ValueError(
            f"{where}: the address has a user or password before {parts.hostname!r}; the recipe is stored with every "
            f"checkpoint. Put credentials into the environment (AWS_ACCESS_KEY_ID, ...)"
        )
    if parts.query or parts.fragment:
        raise ValueError(
            f"{where}: the address {scheme}://{parts.netloc}{parts.path} has a query, which may hold a signature, and "
            f"the recipe is stored with every checkpoint. Give the address alone, and credentials in the environment"
        )
    if not parts.netloc:
        raise ValueError(f"{where}: {uri!r} names no {'bucket' if scheme in ('s3', 'gs') else 'host'}")


def join(base: str, name: str) -> str:
    """`name` below `base`."""
    return f"{base.rstrip('/')}/{name}"


def parent(uri: str) -> str:
    """All before the last `/`."""
    return uri.rpartition("/")[0] or ("/" if uri.startswith("/") else ".")


def expand(uri: str, where: str) -> list[str]:
    """`{00..03}` and `{a,b}` written out.

    Raises:
        UserError: if the braces do not close or name too many.
    """
    import braceexpand

    # The library writes a range out before anyone could count it, and recurses.
    ranges = re.findall(r"\{(-?\d+)\.\.(-?\d+)", uri)
    if any(abs(int(last) - int(first)) >= _MOST_SHARDS for first, last in ranges) or uri.count("{") > _MOST_BRACES:
        raise UserError(
            f"{where}: the braces name more than {_MOST_SHARDS} shards, or there are more than {_MOST_BRACES}"
        )
    try:
        names = list(itertools.islice(braceexpand.braceexpand(uri), _MOST_SHARDS + 1))
    except ValueError as error:
        raise UserError(f"{where}: the braces of {uri!r} do not close") from error
    if len(names) > _MOST_SHARDS:
        raise UserError(f"{where}: {uri!r} names more than {_MOST_SHARDS} shards")
    if len(set(names)) < len(names):
        raise UserError(f"{where}: {uri!r} names a shard twice")
    return names
