"""The C allocator on CPU: keep the memory of large tensors instead of returning it to the system at every step.

glibc's malloc maps each block above 32 MiB anew and returns it on free; the next step takes the same memory again, page by
page, and filling fresh pages runs at a quarter of the speed of filling old ones. A training step frees and allocates hundreds
of MiB, so on CPU 10 to 30 % of its time goes there. Three settings keep the memory in the process (`tune_allocator`): no
separate mappings, no trimming, growth in large pieces. Also, the heap is reserved once, in address space alone, and marked
for huge pages, so that a page fault brings in 2 MiB instead of 4 KiB. Peak memory grows by fragmentation, a few per cent.

Where the machine has jemalloc or tcmalloc, the command line restarts itself with that preloaded, in the same process
(`restart_with_better_allocator`). Choices of the user (LD_PRELOAD, GLIBC_TUNABLES, MALLOC_ variables) are respected.
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
"""As a trim threshold: the largest possible size. INT_MAX, two GiB, would give the reserved heap back at once."""
TOP_PAD_BYTES = 256 * 2**20
MADV_HUGEPAGE = 14
RESERVED_SHARE = 0.5
"""Share of the machine's memory that the heap reserves as address space; pages are taken when first touched."""

OTHER_ALLOCATORS = ("jemalloc", "tcmalloc", "mimalloc")
LIBRARIES = ("libjemalloc.so.2", "libtcmalloc_minimal.so.4", "libtcmalloc.so.4")
"""Names of better allocators' files, best first."""
LIBRARY_FOLDERS = (f"{sys.prefix}/lib", "/usr/local/lib", "/usr/lib64", f"/usr/lib/{platform.machine()}-linux-gnu", "/usr/lib")
KEEP_MEMORY = {
    "MALLOC_CONF": "thp:always,metadata_thp:auto,dirty_decay_ms:-1,muzzy_decay_ms:-1",
    "TCMALLOC_RELEASE_RATE": "0",
    "TCMALLOC_LARGE_ALLOC_REPORT_THRESHOLD": str(2**50),  # else tcmalloc reports each tensor above 1 GiB on stderr
}
"""Environment variables that make jemalloc (the first) and tcmalloc keep freed memory too."""


def tune_allocator(env: Mapping[str, str] = os.environ) -> str:
    """Make glibc's malloc keep memory; returns a few words for the start-up line on what was done. May be called again."""
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
    """Variables to add for a new process so that it uses a better allocator; empty if there is none, or the user has chosen one."""
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
    """Restart this program in the same process, with the same arguments, under a better allocator; returns if there is none.

    Call it before anything is opened and before slow imports. The LD_PRELOAD that it sets prevents a second restart.
    """
    added = better_allocator_environment()
    if added and sys.orig_argv:
        sys.stdout.flush()
        sys.stderr.flush()
        os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], {**os.environ, **added})


def loaded_allocator(maps: str | None = None) -> str | None:
    """The name of another allocator in this process, preloaded or linked; None if there is none. maps: text of /proc/self/maps."""
    text = _read(Path("/proc/self/maps")) if maps is None else maps
    files = {Path(line.split()[-1]).name for line in text.splitlines() if "/" in line}
    return next((name for name in OTHER_ALLOCATORS if any(file.startswith(f"lib{name}") for file in files)), None)


def _reserve_huge_heap(libc: ctypes.CDLL) -> bool:
    """Let the heap grow once, without touching its pages, and mark it for huge pages; whether that worked."""
    if "[never]" in _read(Path("/sys/kernel/mm/transparent_hugepage/enabled"), "[never]"):
        return False
    limited = resource.getrlimit(resource.RLIMIT_AS)[0] != resource.RLIM_INFINITY
    if limited or _read(Path("/proc/sys/vm/overcommit_memory"), "2").strip() == "2":
        return False  # not even tried: after a refusal glibc uses another heap for this thread
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
