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
from ._build import build
from ._contents import Contents
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
        header = form.read_header(source)
        said = header.metadata
        self.is_plain = form.KEY not in said and form.CHECKSUMS not in said
        self.strings = said if self.is_plain else {}
        self._contents = Contents()
        if self.is_plain:
            self._contents.read_plain(header)
        else:
            if form.KEY not in said or form.CHECKSUMS not in said:
                damaged(f"of {form.KEY!r} and {form.CHECKSUMS!r} in its metadata, one is missing")
            text = said.pop(form.KEY)
            checks = form.checksums(said, len(header.entries))
            if checks[0] != zlib.crc32(text.encode("utf-8", "surrogatepass")):
                damaged("the text in its header has another checksum than when it was written")
            told = pairs_of(parse(text, "the text in the header", packed, refuse_crowd))
            del text
            self._contents.read(told or {}, header.entries, checks[1:])
        self.arrays = ArrayReader(source, self._contents.tensors)
        self._rules = RuleReader(self._contents, self.arrays)

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
