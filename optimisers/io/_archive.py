"""A file that is open: what it holds, checked, and the trees that are made of it.

a) All that a file says is checked, and all that is missing or different is named, before an array
   is read: `Archive` on opening (`_contents`), then `build` or `fill`.
b) `build` makes trees of built-in nodes. `fill` follows given trees, with their classes and array
   libraries.
"""

from __future__ import annotations

import copy
import zlib
from typing import Any, Self

from . import _safetensors as form
from ._array_reader import ArrayReader
from ._as_written import parted, tensors_as_written
from ._build import build
from ._contents import Contents, refuse_version, tensors_of
from ._entries import StoredTensor, damaged
from ._fill import fill
from ._json import parse
from ._rule_reader import RuleReader
from ._safetensors import Source
from ._tables import packed, pairs_of, refuse_crowd

Tree = Any


class Archive:
    """A file whose header has been read and checked; its arrays are read when asked for."""

    def __init__(self, source: Source) -> None:
        self.is_plain = False
        self.strings: dict[str, str] = {}
        """The metadata of a file of another program."""
        self._contents = Contents()
        if not self._read_as_written(source):
            self._read(form.read_header(source))
        self.arrays = ArrayReader(source, self._contents.tensors)
        self._rules = RuleReader(self._contents, self.arrays)

    def _read_as_written(self, source: Source) -> bool:
        """Read a header that is as `save` writes it; False for any other."""
        parts = parted(source)
        if parts is None:
            return False
        told = _told(parts.text, parts.checks)
        tensors = tensors_as_written(parts, told.get("tensors"))
        if tensors is None:
            return False
        self._contents.read(told, tensors)
        return True

    def _read(self, header: form.Header) -> None:
        said = header.metadata
        if form.KEY not in said and form.CHECKSUMS not in said:
            self.is_plain, self.strings = True, said
            self._contents.read_plain(header)
            return
        if form.KEY not in said or form.CHECKSUMS not in said:
            damaged(f"of {form.KEY!r} and {form.CHECKSUMS!r} in its metadata, one is missing")
        checks = form.checksums(said[form.CHECKSUMS], len(header.entries))
        told = _told(said.pop(form.KEY), said.pop(form.CHECKSUMS))
        self._contents.read(told, tensors_of(told.get("tensors"), header.entries, checks[1:]))

    @property
    def tensors(self) -> list[StoredTensor]:
        """The arrays of the file."""
        return self._contents.tensors

    @property
    def roots(self) -> dict[str, int]:
        """The trees of the file, by name, as the numbers of their nodes."""
        return self._contents.roots

    def is_tuple(self, root: str) -> bool:
        """Tell whether a root is a tuple."""
        return self._contents.nodes[self.roots[root]][0] in ("tuple", "named")

    def anew(self) -> Self:
        """Return this archive with no array read yet, so that what it makes is no one else's."""
        new = copy.copy(self)
        new._contents = copy.copy(self._contents)
        new._contents.nodes = [*self._contents.nodes]
        new.arrays = ArrayReader(self.arrays.source, self.tensors)
        new._rules = RuleReader(new._contents, new.arrays)
        return new

    def build(self, *roots: str) -> dict[str, Tree]:
        """Make trees of what the file says alone, in the place of the tables: this is done once.

        Raises
        ------
        ValueError
            If there are nodes that only `fill` can make; the message names each.
        """
        return build(self._contents, self.arrays, self._rules, *roots)

    def fill(self, wanted: dict[str, Tree]) -> dict[str, Tree]:
        """Make trees like those given, by the name of their root; these are not changed.

        Raises
        ------
        ValueError
            If they differ; the message names every difference.
        """
        return fill(self._contents, self.arrays, self._rules, wanted)


def _told(text: str, checks: str) -> dict[str, Any]:
    """Return what our text says, if it has the first of the checksums."""
    if checks[:8] != f"{zlib.crc32(text.encode('utf-8', 'surrogatepass')):08x}":
        damaged("the text in its header has another checksum than when it was written")
    told = pairs_of(parse(text, "the text in the header", packed, refuse_crowd)) or {}
    refuse_version(told)
    return told
