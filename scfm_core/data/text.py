"""Text that people and their tools write: captions, prompts, metadata. One rule decides what is text and what is invalid.

UTF-8 is read, with or without a byte order mark, and UTF-16 and UTF-32 with their mark (Windows' Notepad writes them).
Nothing is guessed: other bytes, such as Latin-1, are invalid, and so are NUL characters and lone surrogates. A tokenizer
drops other control characters, so they are kept.
"""

import codecs

from scfm_core.data.schema import BadData

MAX_TEXT = 16 << 20
"""Bytes of the longest caption or JSON of a sample. Parsed JSON needs some twenty times its bytes of memory."""
# UTF-32 first: its little-endian mark begins with that of UTF-16.
_MARKS = (
    (codecs.BOM_UTF32_LE, "utf-32"),
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)


def check_size(size: int, where: str) -> None:
    """BadData if the text of a sample has more than `MAX_TEXT` bytes."""
    if size > MAX_TEXT:
        raise BadData(f"data: {where} has {size / 2**20:,.0f} MiB, and may have {MAX_TEXT >> 20}. Shorten it")


def decode_text(content: bytes, where: str) -> str:
    """The text of a file or a field.

    Args:
        content: its bytes.
        where: the file or field, for messages.

    Raises:
        BadData: if it is not text; the message says how to mend it.
    """
    encoding = next((name for mark, name in _MARKS if content.startswith(mark)), "utf-8-sig")
    try:
        return check_text(content.decode(encoding), where)
    except UnicodeDecodeError as error:
        kind = "UTF-8 text" if encoding == "utf-8-sig" else f"text of its byte order mark, {encoding.upper()}"
        raise BadData(
            f"data: {where} is not {kind} ({error.reason} at byte {error.start}). Save it as UTF-8"
        ) from error


def check_text(text: str, where: str) -> str:
    r"""`text` itself, if a tokenizer can take it.

    JSON can hold half of an emoji: `"\ud83d"` is a lone surrogate, which is not a character and has no UTF-8. A byte order
    mark that a tool took for text is removed.

    Args:
        text: decoded.
        where: its file or field, for messages.

    Raises:
        BadData: if it has a NUL character or a lone surrogate.
    """
    if "\0" in text:
        only = not text.strip("\0")
        raise BadData(
            f"data: {where} "
            + (
                "has only NUL characters, as a power failure leaves a file. Write it again"
                if only
                else f"has a NUL character at {text.index(chr(0))}: perhaps it is UTF-16 without a byte order mark. Save it as UTF-8"
            )
        )
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise BadData(
            f"data: {where} has half of a character, {text[error.start]!a}, at {error.start}: it was probably cut in the middle "
            f"of an emoji. Remove it, or write the whole character"
        ) from error
    return text.lstrip("\ufeff")


def shown_name(name: str) -> str:
    r"""A file's name as text that can be stored and printed: bytes that are not UTF-8 become `\xe9`.

    Linux allows any bytes in a name, and archives from Windows bring Latin-1. Python represents them by lone surrogates.
    """
    try:
        content = name.encode(errors="surrogateescape")
    except UnicodeEncodeError:  # not from the file system, but from JSON
        content = name.encode(errors="backslashreplace")
    return content.decode(errors="backslashreplace")
