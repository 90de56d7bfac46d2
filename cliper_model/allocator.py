"""Environment variables for a process with a model on the CPU, which make glibc keep freed memory for reuse.

By default glibc returns the memory of every freed large tensor to the kernel, and the next tensor has to fault its
pages in again, one by one: 5% to 20% of an image's time at full size. The variables are read at process start;
setting the same options later misses threads that already have a separate heap. No effect without glibc.
"""

KEEP_FREED_MEMORY = {
    "MALLOC_ARENA_MAX": "1",  # one heap for all threads
    "MALLOC_MMAP_MAX_": "0",  # nothing mapped outside it
    "MALLOC_TRIM_THRESHOLD_": "-1",  # it never shrinks
    "MALLOC_TOP_PAD_": str(64 << 20),  # and grows by 64 MB at a time
}
