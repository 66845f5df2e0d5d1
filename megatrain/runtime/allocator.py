"""The C allocator on CPU: keep the memory of large tensors instead of giving it back to the system at every step.

glibc's malloc maps each block above 32 MiB anew and returns it on free; the next step takes the same memory again, page by
page, and filling fresh pages runs at a quarter of the speed of filling old ones. A training step frees and allocates hundreds
of MiB, so that on CPU 10 to 30 % of its time goes there. Three settings keep the memory in the process (`tune_allocator`): no
separate mappings, no trimming, growth in large pieces. On top, the heap is reserved once, in address space alone, and marked
for huge pages, so that a fault brings in 2 MiB and not 4 KiB. Peak memory grows by fragmentation, a few per cent.

Where the machine has jemalloc or tcmalloc, the command line starts itself again with that preloaded, in the same process
(`restart_with_better_allocator`). What the user has chosen (LD_PRELOAD, GLIBC_TUNABLES, MALLOC_ variables) is left alone.
Figures: docs/benchmarks.md.
"""

from __future__ import annotations

import ctypes
import os
import platform
import resource
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_MAX = -1, -2, -4
"""Numbers of mallopt's settings, from glibc's malloc.h."""
NEVER = -1
"""As a trim threshold: the largest size there is. INT_MAX, two GiB, would give the reserved heap straight back."""
TOP_PAD_BYTES = 256 * 2**20
MADV_HUGEPAGE = 14
RESERVED_SHARE = 0.5
"""Of the machine's memory, reserved as address space for the heap; pages are taken when they are first touched."""

OTHER_ALLOCATORS = ("jemalloc", "tcmalloc", "mimalloc")
LIBRARIES = ("libjemalloc.so.2", "libtcmalloc_minimal.so.4", "libtcmalloc.so.4")
"""Files to look for, best first."""
LIBRARY_FOLDERS = (f"{sys.prefix}/lib", "/usr/local/lib", "/usr/lib64", f"/usr/lib/{platform.machine()}-linux-gnu", "/usr/lib")
KEEP_MEMORY = {
    "MALLOC_CONF": "thp:always,metadata_thp:auto,dirty_decay_ms:-1,muzzy_decay_ms:-1",
    "TCMALLOC_RELEASE_RATE": "0",
    "TCMALLOC_LARGE_ALLOC_REPORT_THRESHOLD": str(2**50),  # else each tensor above 1 GiB is announced on stderr
}
"""Environment that has jemalloc (the first) and tcmalloc keep freed memory as well."""


def tune_allocator(env: Mapping[str, str] = os.environ) -> str:
    """Set glibc's malloc to keep memory; say in a few words, for the start-up line, what was done. May be called again."""
    if not sys.platform.startswith("linux"):
        return f"the allocator of {sys.platform}"
    preloaded = loaded_allocator()
    if preloaded is not None:
        return f"{preloaded} (preloaded)"
    chosen = sorted(key for key in env if key == "GLIBC_TUNABLES" or (key.startswith("MALLOC_") and key.endswith("_")))
    if chosen:
        return f"malloc as set by {', '.join(chosen)}"
    libc = ctypes.CDLL(None)
    if not hasattr(libc, "gnu_get_libc_version"):
        return "the C library's allocator"
    settings = ((M_MMAP_MAX, 0), (M_TRIM_THRESHOLD, NEVER), (M_TOP_PAD, TOP_PAD_BYTES))
    if not all(libc.mallopt(setting, value) for setting, value in settings):
        return "glibc malloc, which refuses to keep freed memory"
    return "glibc malloc that keeps freed memory" + (" on huge pages" if _reserve_huge_heap(libc) else "")


def better_allocator_environment(
    env: Mapping[str, str] = os.environ, folders: Sequence[str] = LIBRARY_FOLDERS
) -> dict[str, str]:
    """Variables to add so that a new process uses a better allocator; empty where there is none, or the user has chosen one."""
    chosen = any(key in env for key in ("LD_PRELOAD", "GLIBC_TUNABLES"))
    if not sys.platform.startswith("linux") or chosen or any(key.startswith("MALLOC_") for key in env):
        return {}
    files = (Path(folder) / library for library in LIBRARIES for folder in folders)
    found = next((file for file in files if file.is_file()), None)
    if found is None:
        return {}
    keep = {key: value for key, value in KEEP_MEMORY.items() if key not in env}
    return {"LD_PRELOAD": str(found), **keep}


def restart_with_better_allocator() -> None:
    """Start this program again in this process, same number and arguments, with a better allocator; return if there is none.

    To be called before anything is opened, or imported that takes time. The LD_PRELOAD that it sets stops a second restart.
    """
    added = better_allocator_environment()
    if added and sys.orig_argv:
        sys.stdout.flush()
        sys.stderr.flush()
        os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], {**os.environ, **added})


def loaded_allocator(maps: str | None = None) -> str | None:
    """Name of another allocator in this process, preloaded or linked, if any. maps: the text of /proc/self/maps."""
    text = _read(Path("/proc/self/maps")) if maps is None else maps
    files = {Path(line.split()[-1]).name for line in text.splitlines() if "/" in line}
    return next((name for name in OTHER_ALLOCATORS if any(file.startswith(f"lib{name}") for file in files)), None)


def _reserve_huge_heap(libc: ctypes.CDLL) -> bool:
    """Let the heap grow once, without touching it, and mark it for huge pages; whether that worked."""
    if "[never]" in _read(Path("/sys/kernel/mm/transparent_hugepage/enabled"), "[never]"):
        return False
    limited = resource.getrlimit(resource.RLIMIT_AS)[0] != resource.RLIM_INFINITY
    if limited or _read(Path("/proc/sys/vm/overcommit_memory"), "2").strip() == "2":
        return False  # and not tried: after a refusal glibc takes this thread's memory from elsewhere
    size = int(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") * RESERVED_SHARE)
    libc.malloc.restype, libc.malloc.argtypes = ctypes.c_void_p, [ctypes.c_size_t]
    libc.free.argtypes = [ctypes.c_void_p]
    libc.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    block = libc.malloc(size)
    if block is None:
        return False
    libc.free(block)
    heaps = [line.split()[0].split("-") for line in _read(Path("/proc/self/maps")).splitlines() if line.endswith("[heap]")]
    edges = [(int(start, 16), int(end, 16)) for start, end in heaps]
    return bool(edges) and all(libc.madvise(start, end - start, MADV_HUGEPAGE) == 0 for start, end in edges)


def _read(path: Path, default: str = "") -> str:
    try:
        return path.read_text()
    except OSError:
        return default
