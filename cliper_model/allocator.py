"""Keep freed memory in a process whose work is a model on the CPU.

glibc hands the memory of every freed large tensor back to the kernel, and the next tensor faults its pages in
again, one by one: 5% to 20% of an image's time at full size. Elsewhere than on glibc this does nothing.
"""

import ctypes
import platform

# From malloc.h: each option's number, glibc's default, and what keeps memory. The heap grows by 1 GB at a time and
# never shrinks; what finds room on it is not mapped anew (32 MB is the most that glibc takes for that threshold).
_OPTIONS = {
    -2: (128 << 10, 1 << 30),  # M_TOP_PAD
    -1: (128 << 10, 2**31 - 1),  # M_TRIM_THRESHOLD
    -3: (128 << 10, 32 << 20),  # M_MMAP_THRESHOLD
}


def keep_freed_memory(keep: bool = True) -> None:
    """Keep what is freed for what is allocated next, up to about 1 GB; `keep=False` is glibc's default again.

    It holds for the whole process: for commands and actors, not for a library that others import.
    """
    if platform.libc_ver()[0] != "glibc":
        return
    glibc = ctypes.CDLL(None)
    for option, values in _OPTIONS.items():
        glibc.mallopt(option, values[keep])
    if not keep:
        glibc.malloc_trim(0)
