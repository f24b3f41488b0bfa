"""JSON out of files that may be hostile: strict, and bounded before it is parsed.

Python's parser makes objects of all that a text has before the first can be looked at. Where these
would be many times as large as the text, it is refused ahead.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from typing import Any

from .._messages.text import printable


class FileFormatError(ValueError):
    """A file that is not what `save` writes: damaged, cut short, of a later version, or hostile."""


def shown(text: str) -> str:
    """Return text, some of it out of a file, as a message may have it: printable, and short.

    A file could otherwise clear the screen, forge lines of a log, or fill it.
    """
    return printable(shortened(text))


def shortened(text: str) -> str:
    """Return a text without its middle if it is very long."""
    return text if len(text) <= 500 else f"{text[:240]}...{text[-240:]}"


def decoded(encoded: bytearray, what: str) -> str:
    """Return bytes of a file as the text that they are."""
    try:
        return encoded.decode("utf-8")
    except ValueError as error:
        raise FileFormatError(f"{what} is no JSON text: {error}") from None


def parse(
    text: str,
    what: str,
    hook: Callable[[list[tuple[str, Any]]], Any],
    limit: Callable[[str], None],
) -> Any:
    """Parse JSON, strictly: no key twice, no NaN, nothing but an object.

    `hook` makes of each object, given as its pairs, something small. `limit` refuses a text that
    has more of what no object makes small than there can be.
    """
    if text[:1] != "{":
        raise FileFormatError(f"{what} is no JSON object")
    _refuse_brackets(text, what)
    limit(text)
    try:
        return json.loads(text, object_pairs_hook=hook, parse_constant=_refuse_constant)
    except FileFormatError as error:
        raise FileFormatError(f"{what} is damaged: {error}") from None
    except (ValueError, RecursionError) as error:
        raise FileFormatError(f"{what} is no JSON text: {error}") from None


def _refuse_brackets(text: str, what: str) -> None:
    """Refuse a text of very many lists: nothing is asked before these are all there.

    A list takes 64 bytes, an empty one 2 letters of text; no file of ours or of other programs has
    more than one in 6. Brackets in strings are not counted, which is only looked at if need be.
    """
    most = len(text) // 6 + 100
    if text.count("[") > most and without_strings(text).count("[") > most:
        raise FileFormatError(f"{what} is no JSON text of a file: it is made of too many lists")


def without_strings(text: str) -> str:
    """Return a JSON text without the strings in it."""
    return _STRING.sub("", text)


_STRING = re.compile(r'"[^"\\]*(?:\\.[^"\\]*)*"', re.DOTALL)


def _refuse_constant(text: str) -> None:
    raise FileFormatError(f"it has the number {text}")
