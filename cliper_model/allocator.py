"""Keep freed memory in a process whose work is a model on the CPU.

glibc hands the memory of every freed large tensor back to the kernel, and the next tensor faults its pages in
again, one by one: 5% to 20% of an image's time at full size. Elsewhere than on glibc this does nothing.
"""

import ctypes
import platform

# From malloc.h: each option's number, glibc's default, and what keeps memory: one heap for all threads that never
# shrinks, and nothing mapped outside it. (Raising M_MMAP_THRESHOLD is not enough: 32 MB is its limit.)
_OPTIONS = {
    -1: (128 << 10, -1),  # M_TRIM_THRESHOLD
    -2: (128 << 10, 64 << 20),  # M_TOP_PAD
    -4: (65536, 0),  # M_MMAP_MAX
    -8: (0, 1),  # M_ARENA_MAX
}


def keep_freed_memory(keep: bool = True) -> None:
    """Keep what is freed for what is allocated next; `keep=False` is glibc's default again.

    It holds for the whole process: for commands and actors, not for a library that others import.
    """
    if platform.libc_ver()[0] != "glibc":
        return
    glibc = ctypes.CDLL(None)
    for option, values in _OPTIONS.items():
        glibc.mallopt(option, values[keep])
    if not keep:
        glibc.malloc_trim(0)
