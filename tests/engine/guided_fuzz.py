"""Let atheris choose the arguments of the tests of test_fuzz.py, by the code that they reach.

    PYTHONPATH=tools:tests python tests/engine/guided_fuzz.py --list
    PYTHONPATH=tools:tests python tests/engine/guided_fuzz.py NAME -runs=20000

Arguments after the name of the test are for libFuzzer. It stops at the first failure, which
Hypothesis shows as source code.
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
    if name == "--list":
        print(*(name for name, test in vars(test_fuzz).items() if hasattr(test, "hypothesis")))
        return
    cpu.kernels.set_block(32)
    cpu.kernels.set_work_per_thread(64)
    atheris.Setup(sys.argv, getattr(test_fuzz, name).hypothesis.fuzz_one_input)
    atheris.Fuzz()


if __name__ == "__main__":
    main()
