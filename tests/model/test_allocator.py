import os
import platform
import subprocess
import sys

import pytest

from cliper.model.allocator import KEEP_FREED_MEMORY

pytestmark = pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="glibc's own options")

CODE = """
import threading
import numpy as np
from benchmarks.measure import resident

def left(megabytes=200):
    before = resident()
    parts = [np.ones(50 << 20, np.uint8) for _ in range(megabytes // 50)]
    del parts
    print((resident() - before) >> 20)

thread = threading.Thread(target=left)
thread.start()
thread.join()
"""


@pytest.mark.parametrize(("environment", "kept"), [(KEEP_FREED_MEMORY, True), ({}, False)])
def test_freed_memory_is_kept_in_every_thread(environment: dict[str, str], kept: bool) -> None:
    command = [sys.executable, "-c", CODE]
    done = subprocess.run(
        command, capture_output=True, text=True, check=True, timeout=120, env=os.environ | environment
    )
    assert (int(done.stdout) > 150) is kept
