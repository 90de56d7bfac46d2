import platform
import subprocess
import sys

import pytest

CODE = """
import numpy as np
from benchmarks.measure import resident
from cliper_model.allocator import keep_freed_memory

def left(megabytes=200):
    before = resident()
    parts = [np.ones(20 << 20, np.uint8) for _ in range(megabytes // 20)]
    del parts
    return (resident() - before) >> 20

keep_freed_memory()
kept = left()
keep_freed_memory(False)
print(kept, left())
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="glibc's own options")
def test_freed_memory_is_kept_and_given_back() -> None:
    done = subprocess.run([sys.executable, "-c", CODE], capture_output=True, text=True, check=True, timeout=120)
    kept, left = map(int, done.stdout.split())
    assert kept > 150
    assert left < 50
