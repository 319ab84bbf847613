"""How a process that uses JAX is set up: what it keeps instead of making it again."""

import contextlib
import ctypes
import os
import sys

from bert_jax.config import cache_folder
from bert_jax.progress import say

_ROOMY = 16 * 10**9  # bytes of a machine; 14 steps of MiniLM-L6 with 16 x 192 tokens took 5.5 GB so, 3.0 without
# Parameters of glibc's mallopt, and the values that make it keep what is freed: one arena, no maps of their own for
# large arrays, nothing given back.
_MALLOC = {-8: 1, -4: 0, -1: 2**31 - 1, -2: 64 << 20}  # M_ARENA_MAX, M_MMAP_MAX, M_TRIM_THRESHOLD, M_TOP_PAD


def keep_programs() -> None:
    """Keeps compiled programs in the cache folder for later processes, unless JAX was told of another place."""
    import jax

    if jax.config.jax_compilation_cache_dir:
        return
    folder = cache_folder() / "xla"
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        say(f"note: compiled programs are not kept: {folder}: {error.strerror}")
        return
    jax.config.update("jax_compilation_cache_dir", str(folder))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)


def keep_memory() -> None:
    """Keeps memory that is freed: on CPUs, XLA takes and frees all of a step's each time. To be called before JAX is
    imported, whose threads would have arenas of their own already.

    The kernel else hands out, and clears, 93,000 pages in each step of fine-tuning MiniLM-L6, a fifth of its time. Gaps
    between what is kept add up, so small machines go without.
    """
    if sys.platform == "linux" and os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") >= _ROOMY:
        with contextlib.suppress(AttributeError):  # another C library
            for parameter, value in _MALLOC.items():
                ctypes.CDLL(None).mallopt(parameter, value)
