"""The quick way to read the header of a file that `save` wrote: it is written again, and compared.

Our own text says of each array all that the header says of it. So the header is not parsed: what
`save` writes of these arrays has to be there, letter by letter. A header that differs in any way is
none of ours, or damaged, and nothing is said of it here: `_safetensors` parses it.
"""

from __future__ import annotations

import json
from typing import Any, NamedTuple

from . import _safetensors as form
from ._entries import StoredTensor, c_order, checked_tensor
from ._json import FileFormatError
from ._safetensors import Entry, Form
from ._tables import ARRAY, Said, pairs_of

_BEGIN = f'{{"__metadata__":{{"{form.CHECKSUMS}":"'
_MIDDLE = f'","{form.KEY}":'


class Parts(NamedTuple):
    """A header in three parts."""

    checks: str
    text: str
    rest: str
    """What the header says of the arrays, up to its end."""
    begin: int
    """Where the arrays begin."""
    size: int
    """Bytes of the whole file."""


def parted(source: form.Source) -> Parts | None:
    """Return the parts of a header; None if it does not begin as one of ours."""
    encoded, size = form.read_encoded(source)
    if not encoded.startswith(_BEGIN.encode("ascii")) or not encoded.isascii():
        return None
    said = encoded.decode("ascii")
    end = said.find('"', len(_BEGIN))
    at = end + len(_MIDDLE)
    if not said.startswith(f'{_MIDDLE}"', end):  # nothing but a text is parsed
        return None
    try:
        text, stop = json.JSONDecoder().raw_decode(said, at)
    except ValueError:
        return None
    return Parts(said[len(_BEGIN) : end], text, said[stop:], 8 + len(encoded), size)


def tensors_as_written(parts: Parts, told: Any) -> list[StoredTensor] | None:
    """Return the arrays of our text; None if the header is not what `save` writes of them."""
    if type(told) is not list or len(parts.rest) < _SHORTEST * len(told):
        return None
    names: list[str] = []
    forms: list[Form] = []
    known: dict[Said, Form] = {}
    for said in told:
        name, dtype, shape = _named(said)
        if type(name) is not str or type(shape) is not list:
            return None
        try:
            mark = (dtype, *shape)
            if mark not in known:
                if not form.is_shape(shape):
                    return None
                known[mark] = form.form_of(dtype, tuple(shape))
        except (TypeError, FileFormatError):  # of no dtype
            return None
        names.append(name)
        forms.append(known[mark])
    order, starts, text = form.laid_out([*map(form.quoted, names)], forms)
    end = starts[order[-1]] + forms[order[-1]].size if forms else 0
    if parts.rest.rstrip(" ") != f"}}{text}}}" or parts.begin + end != parts.size:
        return None
    checks = form.checksums(parts.checks, len(forms))[1:]
    layouts = {id(kind): c_order(mark[1:]) for mark, kind in known.items()}
    found: list[StoredTensor] = []
    begin, new = parts.begin, tuple.__new__
    for name, kind, start, said, check in zip(names, forms, starts, told, checks, strict=True):
        at = begin + start
        entry = new(Entry, (kind.tag, kind.shape, at, at + kind.size))
        if said[0] is ARRAY:
            layout = layouts[id(kind)]
            found.append(new(StoredTensor, (name, said[2], layout.shape, layout, entry, check)))
        else:
            found.append(checked_tensor(pairs_of(said), {name: entry}, check))
    return found


_SHORTEST = len(',"":{"dtype":"I8","shape":[],"data_offsets":[0,0]}')
"""Letters that the header has for an array, at least."""


def _named(said: Any) -> tuple[Any, Any, Any]:
    """Return the name, the dtype and the shape of an array in our text."""
    if type(said) is tuple and said[0] is ARRAY:
        _, name, dtype, shape = said
        return name, dtype, shape
    pairs = pairs_of(said) or {}
    return pairs.get("name"), pairs.get("dtype"), pairs.get("shape")
