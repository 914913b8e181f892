"""Examples are the same in every run, whichever tests ran in the process before."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

DRAWS = """
import sys
sys.path[:0] = [sys.argv[1], sys.argv[1] + "/../../bench"]
import conftest
if sys.argv[2]:
    import test_evaluate, test_lab
from hypothesis import given, strategies as st

@given(st.lists(st.floats() | st.integers() | st.text()))
def draw(found):
    print(ascii(found))

draw()
"""


def test_other_tests_change_no_examples():
    drawn = [
        subprocess.run([sys.executable, "-c", DRAWS, str(Path(__file__).parent), more], capture_output=True, text=True, check=True).stdout
        for more in ("", "more")
    ]
    assert drawn[0] == drawn[1] and drawn[0].count("\n") > 50
