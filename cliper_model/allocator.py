"""The environment of a process whose work is a model on the CPU: freed memory is kept for what comes next.

glibc hands the memory of every freed large tensor back to the kernel, and the next tensor faults its pages in
again, one by one: 5% to 20% of an image's time at full size. These variables are read when a process starts;
setting the same options later misses the threads that have a heap of their own by then. Elsewhere than on glibc
they do nothing.
"""

KEEP_FREED_MEMORY = {
    "MALLOC_ARENA_MAX": "1",  # one heap for all threads
    "MALLOC_MMAP_MAX_": "0",  # nothing mapped outside it
    "MALLOC_TRIM_THRESHOLD_": "-1",  # it never shrinks
    "MALLOC_TOP_PAD_": str(64 << 20),  # and grows by 64 MB at a time
}
