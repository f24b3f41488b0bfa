"""Let atheris choose what the tests of test_fuzz.py are given, by which code that reaches.

    python tests/engine/guided_fuzz.py test_changes_of_such_states -runs=20000

What follows the name of the test is for libFuzzer. It stops at the first failure, which Hypothesis
shows as source code.
"""

from __future__ import annotations

import sys

import atheris

with atheris.instrument_imports(include=["optimisers"]):
    import optimisers  # noqa: F401

import test_fuzz

from optimisers._engine import cpu


def main() -> None:
    name = sys.argv.pop(1)
    cpu.kernels.set_block(32)
    cpu.kernels.set_work_per_thread(64)
    atheris.Setup(sys.argv, getattr(test_fuzz, name).hypothesis.fuzz_one_input)
    atheris.Fuzz()


if __name__ == "__main__":
    main()
