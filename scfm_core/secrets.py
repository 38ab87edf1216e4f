"""Keeping secrets out of messages and logs."""

import os
import re

_SECRET_NAME = re.compile(r"KEY|TOKEN|SECRET|PASSWORD|CREDENTIAL|CONNECTION_STRING|SIGNATURE")
_MIN_LENGTH = 8  # a shorter value may be part of ordinary words


def scrub(text: str) -> str:
    """Remove secrets from a text.

    Values of environment variables whose names look secret become `$NAME`. User, password, query and fragment are
    removed from addresses.
    """
    secrets = [(value, name) for name, value in os.environ.items() if _SECRET_NAME.search(name.upper())]
    for value, name in sorted(
        secrets, key=lambda secret: -len(secret[0])
    ):  # longest first: one secret may begin with another
        if len(value) >= _MIN_LENGTH:
            text = text.replace(value, f"${name}")
    return re.sub(r"(://[^\s?#'\"]*)[?#][^\s'\"]*", r"\1", re.sub(r"://[^\s/'\"]*@", "://", text))


def said(error: BaseException) -> str:
    """Type and first line of an error and of its cause, without secrets. Libraries often keep the reason in the cause."""
    parts = []
    for each in (error, error.__cause__):
        if each is not None:
            line = scrub((str(each).strip().splitlines() or [""])[0])[:200]
            parts.append(f"{type(each).__name__}: {line}" if line else type(each).__name__)
    return "; ".join(parts)
