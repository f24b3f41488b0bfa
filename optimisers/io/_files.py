"""One file: what `save` writes, `load` reads, and `File` opens to read single arrays."""

from __future__ import annotations

import contextlib
import gc
import mmap
import os
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Self

import numpy as np

from .._leaf import Leaf
from .._messages.text import short
from .._trees.walks import walk
from . import _safetensors as form
from ._archive import Archive
from ._encoder import Encoder, raw
from ._json import FileFormatError, shown

Tree = Any
Name = str | os.PathLike[str]


# --- save and load ---------------------------------------------------------------------------


def save(
    path: str | os.PathLike[str],
    state: Tree,
    model: Tree = None,
    metadata: Tree = None,
    *,
    leave_out: bool = False,
) -> None:
    """Save a state tree, and a model with it.

    Parameters
    ----------
    path : str or path
        Where to; what is there is replaced, in one step and when all is written.
    state : tree
        A state tree from `setup`; or any tree of arrays.
    model : tree, optional
        The model. Arrays that are one in memory, also views such as ``w`` and ``w.T``, stay one.
    metadata : tree, optional
        What else to keep: a step, losses, the state of a random generator. See `File.metadata`.
    leave_out : bool
        Whether to leave out what cannot be saved, such as functions. Loading then needs `like`.

    Raises
    ------
    TypeError
        If the trees hold what cannot be saved: anything but arrays, numbers, strings, truth values
        and None. The message names the path.
    ValueError
        If arrays overlap in memory only in part, or if a tree contains itself.
    OSError
        If the file cannot be written (`FileNotFoundError`, `PermissionError`, ... say why). What
        was there before is as it was.

    See Also
    --------
    Checkpointer : numbered files of a long run.

    Notes
    -----
    Saved are: arrays of NumPy, PyTorch, JAX, CuPy and Numba with their dtype, order in memory and
    ties; rules with their hyperparameters, to the last bit; what the rules remember; what is
    frozen. Not saved are attributes of objects that are no children of a node.

    Examples
    --------
    >>> import tempfile, numpy as np, optimisers
    >>> from optimisers.io import File, load, save
    >>> model = {"layers": [{"weight": np.ones((2, 3))}], "name": "tiny"}
    >>> state = optimisers.setup(optimisers.Adam(), model)
    >>> path = tempfile.mkdtemp() + "/tiny.safetensors"
    >>> save(path, state, model, metadata={"epoch": 3})
    >>> state, model = load(path)
    >>> state["layers"][0]["weight"].rule, model["name"]
    (Adam(eta=0.001, beta=(0.9, 0.999), epsilon=1e-08), 'tiny')
    >>> with File(path) as file:
    ...     print(file.metadata, *file, sep="; ")
    {'epoch': 3}; state.layers.0.weight.m; state.layers.0.weight.v; state.layers.0.weight.t;
    model.layers.0.weight
    """
    path = file_path(path, "save(path, state, model)")
    with _collector_paused():
        encoder = Encoder(leave_out)
        roots = {"state": encoder.add("state", state)}
        if model is not None:
            roots["model"] = encoder.add("model", model)
        if metadata is not None:
            roots["metadata"] = encoder.add("metadata", metadata)
        tensors, text = encoder.finish(roots)
        form.write(path, tensors, text, raw)


def load(path: str | os.PathLike[str], like: Tree = None) -> Tree:
    """Load what `save` saved, or any safetensors file.

    Parameters
    ----------
    path : str or path
        The file.
    like : tree, or (state, model), optional
        Trees of the structure that is expected. They are not changed; what is returned has their
        classes, and arrays of their libraries, devices included. Without it, nodes must be
        built-in ones (dictionaries, lists, tuples, named tuples, namespaces), and arrays come as
        NumPy arrays.

    Returns
    -------
    state, or (state, model)
        The pair if a model was saved, else the state. With `like`, as much as that has: a state
        alone is loaded without its model. Of a file that `save` did not write: a dictionary of
        arrays by name. Hyperparameters, counts and what is frozen are those of the file.

    Raises
    ------
    FileFormatError
        If the file is damaged, or no such file, or has a rule that is unknown here: import the
        module that defines it first.
    ValueError
        If the file does not fit `like`: missing and unexpected parts, shapes, dtypes, rules and
        ties, all named in one message. Or if it needs `like`.
    OSError
        If it cannot be read.

    Examples
    --------
    >>> import tempfile, numpy as np, optimisers
    >>> from optimisers.io import load, save
    >>> class Affine:
    ...     def __init__(self, n, m):
    ...         self.weight, self.bias = np.zeros((n, m)), np.zeros(m)
    >>> optimisers.functor(Affine) is Affine
    True
    >>> model = Affine(2, 3)
    >>> state = optimisers.setup(optimisers.Descent(), model)
    >>> path = tempfile.mkdtemp() + "/affine.safetensors"
    >>> save(path, state, model)
    >>> state, model = load(path, like=(state, model))
    >>> type(model).__name__
    'Affine'
    >>> load(path, like=(state, Affine(2, 4)))
    Traceback (most recent call last):
        ...
    ValueError: the file does not fit what was given as `like`:
      model.weight: the file has shape (2, 3), `like` (2, 4)
      model.bias: the file has shape (3,), `like` (4,)
    """
    path = file_path(path, "load(path, like=...)")
    with _naming(path), contextlib.closing(form.Source(path)) as source, _collector_paused():
        return _loaded(Archive(source), like)


def file_path(path: Any, call: str) -> str:
    """Return a path as text; raise if it is none, with how the function is called."""
    if isinstance(path, str | bytes) or hasattr(type(path), "__fspath__"):
        return os.fsdecode(path)
    if hasattr(path, "fileno") or isinstance(path, int):
        mend = "a file is read and written by its path, not by a number or an open file"
    else:
        mend = "the path comes first"
    raise TypeError(f"{call} takes a path, as text or a pathlib.Path; got {short(path)}; {mend}")


@contextlib.contextmanager
def _collector_paused() -> Iterator[None]:
    """Let Python not look for garbage while a tree is made, all of which is needed.

    It would go through all that is made so far, again and again: a third of the time.
    """
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


def _loaded(archive: Archive, like: Tree) -> Tree:
    has_model = "model" in archive.roots
    if _is_swapped(like):
        raise ValueError("like takes (state, model), in this order; got the model first")
    if like is None:
        made = archive.build("state", "model") if has_model else archive.build("state")
    elif has_model and _is_pair(like):
        made = archive.fill({"state": like[0], "model": like[1]})
    elif _is_pair(like) and not archive.is_tuple("state"):
        raise ValueError("the file holds no model: load it with like=state")
    else:
        made = archive.fill({"state": like})
    return (made["state"], made["model"]) if "model" in made else made["state"]


def _is_pair(like: Tree) -> bool:
    """Tell a state tree and a model from a state tree that happens to be a tuple of two."""
    if not _is_two(like):
        return False
    for _, x in walk(like[1]):
        return not isinstance(x, Leaf)
    return not any(isinstance(x, Leaf) for _, x in walk(like[0]))


def _is_swapped(like: Tree) -> bool:
    """Tell a model and a state tree, in this order; mostly by a look at the first leaf."""
    if not _is_two(like) or any(isinstance(x, Leaf) for _, x in walk(like[0])):
        return False
    has_any = next(walk(like[0]), None) is not None
    second = [isinstance(x, Leaf) for _, x in walk(like[1])]
    return has_any and bool(second) and all(second)


def _is_two(like: Tree) -> bool:
    return type(like) is tuple and len(like) == 2


@contextlib.contextmanager
def _naming(path: Name) -> Iterator[None]:
    """Put the path of a file before what is wrong with it."""
    try:
        yield
    except FileFormatError as error:
        where = shown(os.fsdecode(path))  # names of files may come from anyone, too
        raise FileFormatError(f"{where}: {shown(str(error))}") from None


# --- single arrays ---------------------------------------------------------------------------


class File(Mapping[str, np.ndarray]):
    """The arrays of a file by name, read when they are asked for.

    Parameters
    ----------
    path : str or path
        A file of `save`, or any safetensors file.
    verify : bool
        Whether to check arrays against their checksums. Files of other programs have none.
    mapped : bool
        Whether to give read-only windows into the file instead of arrays in memory. The system
        then reads what is looked at, when it is looked at: a few rows of an array larger than the
        memory, say. With `verify`, an array is read through once, when it is first asked for.

    Raises
    ------
    FileFormatError
        If the file is damaged or none of this format; from ``file[name]`` if the array is damaged,
        or if the file has been cut short since it was opened.
    OSError
        If it cannot be read.

    Notes
    -----
    An array in memory is a copy, checked after it was made: whatever becomes of the file, the
    array is right, or there was an error. So several threads may read one file.

    A window is only as good as the file. It stays good after `close`, and when another file takes
    the place of this one, as `save` does it. But it shows what other programs write into the file
    later, and where one cuts the file short, looking at the window ends the process (SIGBUS). That
    is asked for with `mapped`, for files that nobody else writes to, and never done unasked.

    Examples
    --------
    >>> import tempfile, numpy as np
    >>> from optimisers.io import File, save
    >>> path = tempfile.mkdtemp() + "/model.safetensors"
    >>> save(path, {"encoder": np.ones((1000, 3)), "decoder": [np.arange(4.0)]})
    >>> with File(path) as file:
    ...     print(list(file), file.shape("state.encoder"), file["state.decoder.0"][1:3])
    ['state.encoder', 'state.decoder.0'] (1000, 3) [1. 2.]
    >>> with File(path, verify=False, mapped=True) as file:
    ...     print(file["state.encoder"][500:502])
    [[1. 1. 1.]
     [1. 1. 1.]]
    """

    def __init__(
        self, path: str | os.PathLike[str], verify: bool = True, *, mapped: bool = False
    ) -> None:
        self.path = Path(file_path(path, "File(path)"))
        self._verify = verify
        self._map: np.ndarray | None = None
        self._seen: set[int] = set()
        with _naming(self.path):
            self._source = form.Source(self.path)
            try:
                self._archive = Archive(self._source)
                if mapped:
                    window = mmap.mmap(self._source.fileno(), 0, access=mmap.ACCESS_READ)
                    self._map = np.frombuffer(window, np.uint8)
            except BaseException:
                self._source.close()
                raise
        self._numbers = {tensor.name: k for k, tensor in enumerate(self._archive.tensors)}

    def __getitem__(self, name: str) -> np.ndarray:
        k = self._numbers[name]
        tensor = self._archive.tensors[k]
        with _naming(self.path):
            if self._map is None:
                raw = self._archive.arrays.raw(k, self._verify)
            else:
                raw = self._window(self._map, k)
            return form.typed(raw, tensor.dtype, tensor.shape)

    def _window(self, window: np.ndarray, k: int) -> np.ndarray:
        """Return the bytes of an array where they lie in the file."""
        tensor = self._archive.tensors[k]
        entry = tensor.entry
        if min(len(window), self._source.size()) < entry.stop:
            raise FileFormatError("the file has been cut short since it was opened")
        raw = window[entry.start : entry.stop]
        if self._verify and k not in self._seen:
            self._archive.arrays.check(
                k, raw, None if tensor.check is None else zlib.crc32(raw.data)
            )
            self._seen.add(k)
        return raw

    def __iter__(self) -> Iterator[str]:
        return iter(self._numbers)

    def __len__(self) -> int:
        return len(self._numbers)

    def __repr__(self) -> str:
        return f"File({str(self.path)!r}, {len(self)} arrays)"

    def shape(self, name: str) -> tuple[int, ...]:
        """Return the shape of an array, which is not read for that."""
        return self._archive.tensors[self._numbers[name]].shape

    def dtype(self, name: str) -> np.dtype[Any]:
        """Return the dtype of an array, which is not read for that."""
        return form.numpy_dtype(self._archive.tensors[self._numbers[name]].dtype)

    @property
    def metadata(self) -> Any:
        """What `save` was given as metadata, or None; the strings of another program's file."""
        if self._archive.is_plain:
            return dict(self._archive.strings)
        with _naming(self.path):
            has_any = "metadata" in self._archive.roots
            return self._archive.build("metadata")["metadata"] if has_any else None

    def verify(self) -> None:
        """Read the whole file and check it against its checksums.

        Raises
        ------
        FileFormatError
            If an array is damaged.
        """
        with _naming(self.path):
            for k in range(len(self)):
                self._archive.arrays.verify(k)

    def load(self, like: Tree = None) -> Tree:
        """Do what `load` does, with this file."""
        with _naming(self.path):
            return _loaded(self._archive.anew(), like)

    def close(self) -> None:
        """Close the file; arrays taken from it stay good."""
        self._source.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()
