"""Memory that XLA frees and asks for again, kept by the process: a fresh page costs more than what is written to it."""

from __future__ import annotations

import ctypes

# Names and numbers of glibc's <malloc.h>. Blocks above the threshold are taken from the system and given back at once;
# 32 MB is the most that glibc takes for it.
_TRIM_THRESHOLD, _MMAP_THRESHOLD, _ARENA_MAX = -1, -3, -8
LARGEST, KEPT = 32 << 20, 1 << 30


def keep_freed_memory() -> None:
    """Let glibc reuse blocks of up to 32 MB instead of giving them back; does nothing where the C library is another.

    For commands, before anything is computed: one arena, so that a block freed by one thread serves another.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        for option, value in ((_ARENA_MAX, 1), (_MMAP_THRESHOLD, LARGEST), (_TRIM_THRESHOLD, KEPT)):
            mallopt(option, value)
