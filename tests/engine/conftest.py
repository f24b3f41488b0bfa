"""Fixtures of the tests of the engine."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from optimisers._engine import cpu


@pytest.fixture
def kept_settings() -> Iterator[None]:
    """Leave the settings of the kernels as they were."""
    before = {kernels: kernels.settings() for kernels in cpu.available.values()}
    yield
    for kernels, (block, chain_block, work) in before.items():
        kernels.set_block(block, chain_block)
        kernels.set_work_per_thread(work)
        kernels.set_num_threads(0)
