"""Search the protocol's handler for faults, guided by coverage: the machine of
tests/test_serving_fuzz.py, whose choices are made by atheris (libFuzzer).

    pip install atheris
    python benchmarks/fuzz_serving.py -max_total_time=300 -len_control=0 -max_len=1500 out/fuzz

All arguments are libFuzzer's; the folder keeps what led to new code. What fails is written to a
file `crash-...` and is repeated with `python benchmarks/fuzz_serving.py crash-...`.
"""

from __future__ import annotations

import logging
import sys
from pathlib import Path

import atheris  # type: ignore[import-not-found]

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

with atheris.instrument_imports(include=["ttt_cache.serving"]):  # type: ignore[attr-defined]
    import ttt_cache.serving.talk  # noqa: F401
from hypothesis import settings
from hypothesis.stateful import get_state_machine_test
from test_serving_fuzz import Clients  # type: ignore[import-not-found]


def main() -> None:
    logging.disable(logging.CRITICAL)  # what the server tells its operator, thousands of times
    test = get_state_machine_test(
        Clients, settings=settings(database=None, deadline=None, stateful_step_count=60)
    )
    for argument in sys.argv[1:]:
        if not argument.startswith("-") and not argument.startswith("crash"):
            Path(argument).mkdir(parents=True, exist_ok=True)
    atheris.Setup(sys.argv, test.hypothesis.fuzz_one_input)  # type: ignore[attr-defined]
    atheris.Fuzz()


if __name__ == "__main__":
    main()
