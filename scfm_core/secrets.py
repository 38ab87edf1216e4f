"""Keeping secrets out of messages and logs."""

import os
import re

_SECRET_NAME = re.compile(r"KEY|TOKEN|SECRET|PASSWORD|CREDENTIAL|CONNECTION_STRING|SIGNATURE")
_MIN_LENGTH = 8  # replacing a shorter value would cut ordinary words to pieces


def scrub(text: str) -> str:
    """Remove secrets from a text.

    Values of environment variables whose names look secret become `$NAME`. Addresses lose their user, password,
    query and fragment.
    """
    secrets = [(value, name) for name, value in os.environ.items() if _SECRET_NAME.search(name.upper())]
    for value, name in sorted(secrets, key=lambda secret: -len(secret[0])):  # one secret may begin with another
        if len(value) >= _MIN_LENGTH:
            text = text.replace(value, f"${name}")
    return re.sub(r"(://[^\s?#'\"]*)[?#][^\s'\"]*", r"\1", re.sub(r"://[^\s/'\"]*@", "://", text))
