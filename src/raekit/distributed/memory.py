"""How a process on a CPU handles memory that it has freed."""

import ctypes
import os

_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3
"""The numbers of these settings in glibc's malloc.h."""
_NEVER = -1


def keep_freed_memory() -> None:
    """Let the C library keep freed memory for the next allocation, as torch does on a GPU.

    By default, glibc returns large tensors to the system when they are freed. Each step of a training then asks for
    the same memory again, and the system clears every page of it: a fifth of a compiled step of DiT^DH-S on a CPU
    (docs/results/cpu.md). The process holds as much memory as it needed at its peak.

    Settings in the environment (MALLOC_TRIM_THRESHOLD_, MALLOC_MMAP_THRESHOLD_, GLIBC_TUNABLES) take precedence. C
    libraries without these settings are left as they are.
    """
    chosen = ("MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_", "GLIBC_TUNABLES")
    set_option = getattr(ctypes.CDLL(None), "mallopt", None) if os.name == "posix" else None
    if set_option is None or any(name in os.environ for name in chosen):
        return
    set_option(_TRIM_THRESHOLD, _NEVER)
    # Larger allocations are still returned. Older versions of glibc reject sizes above 2^25.
    if not set_option(_MMAP_THRESHOLD, 2**30):
        set_option(_MMAP_THRESHOLD, 2**25)
