"""Values as messages show them."""

from __future__ import annotations

import math
import sys
import warnings
from typing import Any

import numpy as np

_WIDTH = 60
_MANY = 9


def short(x: Any) -> str:
    """Return a value as messages show it: in one line, and never cut off inside an array.

    Examples
    --------
    >>> import numpy as np
    >>> short("adam"), short([1.0, 2.0]), short(dict)
    ("'adam' (str)", '[1.0, 2.0] (list)', "<class 'dict'>")
    >>> short({"w": np.ones((64, 32)), "b": np.ones(32)}), short([np.ones(99)] * 3)
    ("dict with 'w', 'b'", 'list of 3')
    >>> short(np.ones((64, 32)))
    'ndarray of shape (64, 32) and dtype float64'
    """
    kind = type(x).__name__
    shape, dtype = _array_parts(x)
    is_array = dtype is not None
    if is_array and math.prod(shape) > _MANY:
        return f"{kind} of shape {shape} and dtype {dtype}"
    text = "" if isinstance(x, dict | list | tuple | set) and len(x) > _MANY else _line(x)
    if text and len(text) <= _WIDTH:
        return text if isinstance(x, type) else f"{text} ({kind})"
    if is_array:
        return f"{kind} of shape {shape} and dtype {dtype}"
    if isinstance(x, dict):
        keys = ", ".join(_cut(_line(key)) for key in list(x)[:_MANY])
        return f"{kind} with {keys}{', ...' * (len(x) > _MANY)}"
    if isinstance(x, list | tuple | set):
        return f"{kind} of {len(x)}"
    return f"{_cut(text)} ({kind})"


def plain(x: Any) -> str:
    """Return a value as messages show it where its class does not matter."""
    return _cut(_line(x))


def _array_parts(x: Any) -> tuple[tuple[int, ...], str | None]:
    """Return the shape and the dtype of an array; anything else has no dtype."""
    if isinstance(x, type | np.generic):
        return (), None
    try:
        return tuple(map(int, x.shape)), str(x.dtype)
    except Exception:  # attributes of an object may do anything
        return (), None


def _line(x: Any) -> str:
    try:
        text = repr(x)
    except Exception:  # the `repr` of an object may fail, and the message must come all the same
        return f"<{type(x).__name__}>"
    return printable(" ".join(text.split()) if "\n" in text else text)


def _cut(text: str) -> str:
    return text if len(text) <= _WIDTH else f"{text[: _WIDTH - 3]}..."


def warn_caller(message: str, through: str = "") -> None:
    """Warn, by a `UserWarning`, at the line that called this library.

    Parameters
    ----------
    message : str
        What to say.
    through : str, optional
        Another package that may stand between the caller and this library.
    """
    packages = {__name__.partition(".")[0], through}
    level, frame = 1, sys._getframe()
    while frame.f_back and frame.f_globals.get("__name__", "").partition(".")[0] in packages:
        level, frame = level + 1, frame.f_back
    warnings.warn(message, UserWarning, stacklevel=level)


def printable(text: str) -> str:
    """Return a text with its control characters escaped.

    A message could otherwise clear the screen, or forge lines of a log.
    """
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
