"""The extensions as they lie on the disk: built so that an error in C ends in an abort."""

from __future__ import annotations

import platform
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import optimisers

elffile = pytest.importorskip("elftools.elf.elffile")

pytestmark = pytest.mark.skipif(
    sys.platform != "linux" or platform.libc_ver()[0] != "glibc",
    reason="the flags are those of GNU's compiler and C library",
)
EXTENSIONS = sorted(Path(optimisers.__file__).parent.rglob("*.so"))


@pytest.fixture(params=EXTENSIONS, ids=lambda path: path.name.partition(".")[0])
def elf(request: pytest.FixtureRequest) -> Iterator[object]:
    with open(request.param, "rb") as file:
        yield elffile.ELFFile(file)


def segments(elf, kind: str) -> list:
    return [segment for segment in elf.iter_segments() if segment["p_type"] == kind]


def dynamic(elf, tag: str) -> list[int]:
    (table,) = segments(elf, "PT_DYNAMIC")
    return [entry["d_val"] for entry in table.iter_tags(tag)]


def imported(elf) -> set[str]:
    symbols = elf.get_section_by_name(".dynsym").iter_symbols()
    return {symbol.name for symbol in symbols if symbol["st_shndx"] == "SHN_UNDEF"}


def test_there_are_extensions() -> None:
    assert {"dlpack", "_kernels"} <= {path.name.partition(".")[0] for path in EXTENSIONS}


def test_no_memory_is_both_written_and_run(elf) -> None:
    (stack,) = segments(elf, "PT_GNU_STACK")
    write, run = 2, 1
    for segment in [stack, *segments(elf, "PT_LOAD")]:
        assert segment["p_flags"] & (write | run) != write | run


def test_tables_are_read_only_once_the_module_is_loaded(elf) -> None:
    assert segments(elf, "PT_GNU_RELRO")
    bind_now, now = 0x8, 0x1
    assert any(flags & bind_now for flags in dynamic(elf, "DT_FLAGS"))
    assert any(flags & now for flags in dynamic(elf, "DT_FLAGS_1"))


def test_stacks_are_guarded(elf) -> None:
    assert "__stack_chk_fail" in imported(elf)


def test_copies_are_checked(elf) -> None:
    assert any(name.endswith("_chk") for name in imported(elf))


def test_no_library_is_looked_for_beside_the_module_or_where_one_happens_to_be(elf) -> None:
    """A relative path would be that of whoever starts Python."""
    (table,) = segments(elf, "PT_DYNAMIC")
    for entry in table.iter_tags():
        for folder in getattr(entry, "runpath", getattr(entry, "rpath", "")).split(":"):
            assert not folder or folder.startswith("/")
