"""The allocator's settings, each in a process of its own: they cannot be taken back."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from megatrain.runtime.allocator import better_allocator_environment, loaded_allocator

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="glibc's malloc is Linux's")

FAULTS = """
import ctypes, resource
from megatrain.runtime.allocator import tune_allocator
TUNE
libc, size = ctypes.CDLL(None), 48 * 2**20
libc.malloc.restype, libc.malloc.argtypes = ctypes.c_void_p, [ctypes.c_size_t]
libc.memset.argtypes, libc.free.argtypes = [ctypes.c_void_p, ctypes.c_int, ctypes.c_size_t], [ctypes.c_void_p]
def step():
    for _ in range(3):  # tensors
        place = libc.malloc(size)
        libc.memset(place, 1, size)
        libc.free(place)
for _ in range(6): step()   # until each has found its place
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
step(); step()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def run(code: str, **env: str) -> str:
    clean = {key: value for key, value in os.environ.items() if not key.startswith(("MALLOC_", "GLIBC_", "LD_PRELOAD"))}
    done = subprocess.run(
        [sys.executable, "-c", code], env={**clean, **env}, capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def describe(**env: str) -> str:
    return run("from megatrain.runtime.allocator import tune_allocator; tune_allocator(); print(tune_allocator())", **env)


HUGE_PAGES = Path("/sys/kernel/mm/transparent_hugepage/enabled")


@pytest.mark.skipif(
    HUGE_PAGES.exists() and "[always]" in HUGE_PAGES.read_text(), reason="page faults say little with huge pages"
)
def test_large_tensors_keep_their_pages_from_step_to_step():
    plain = int(run(FAULTS.replace("TUNE", "")))
    tuned = int(run(FAULTS.replace("TUNE", "tune_allocator()")))
    assert tuned < plain / 4  # six tensors of 48 MiB are 73,728 pages of 4 KiB


def test_description_says_what_was_done_and_a_second_call_does_no_harm():
    assert describe().startswith("glibc malloc that keeps freed memory")


@pytest.mark.parametrize("key", ["GLIBC_TUNABLES", "MALLOC_TOP_PAD_"])
def test_users_choice_is_left_alone(key):
    assert describe(**{key: "glibc.malloc.top_pad=65536" if key == "GLIBC_TUNABLES" else "65536"}) == f"malloc as set by {key}"


def test_whole_heap_is_reserved_for_huge_pages_and_stays_so():
    """Freeing what was reserved must not give it back: a run that needs gigabytes gets all of them in huge pages."""
    code = """
import os, re
from megatrain.runtime.allocator import tune_allocator
said = tune_allocator()
heaps = re.findall(r"\\[heap\\]\\nSize: +(\\d+) kB.*?VmFlags: ([^\\n]*)", open("/proc/self/smaps").read(), re.DOTALL)
size, flags = max((1024 * int(kb), flags) for kb, flags in heaps)
print(said.endswith("on huge pages"), size / (os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")), flags)
"""
    marked, share, flags = run(code).split(maxsplit=2)
    if marked == "False":
        pytest.skip("this machine has no huge pages, or no address space to spare")
    assert float(share) > 0.4
    assert "hg" in flags.split()


def test_little_address_space_is_no_error():
    limit = "import resource; resource.setrlimit(resource.RLIMIT_AS, (2**33, 2**33))\n"
    said = run(limit + "from megatrain.runtime.allocator import tune_allocator; print(tune_allocator())")
    assert said == "glibc malloc that keeps freed memory"
    assert int(run(limit + FAULTS.replace("TUNE", "tune_allocator()"))) < 73_728 / 4


def test_preloaded_allocators_are_recognised():
    line = "7f5e6a000000-7f5e6a001000 r-xp 00000000 08:01 42   /usr/lib/x86_64-linux-gnu/"
    assert loaded_allocator(line + "libjemalloc.so.2\n") == "jemalloc"
    assert loaded_allocator(line + "libtcmalloc_minimal.so.4\n") == "tcmalloc"
    assert loaded_allocator(line + "libc.so.6\n7ffd-7ffe rw-p 0 00:00 0 [heap]\n") is None


def test_best_library_on_the_machine_is_preloaded(tmp_path):
    (tmp_path / "libtcmalloc_minimal.so.4").touch()
    assert better_allocator_environment({}, [str(tmp_path)])["LD_PRELOAD"] == str(tmp_path / "libtcmalloc_minimal.so.4")
    (tmp_path / "libjemalloc.so.2").touch()
    found = better_allocator_environment({"TCMALLOC_RELEASE_RATE": "9"}, ["/nowhere", str(tmp_path)])
    assert found["LD_PRELOAD"] == str(tmp_path / "libjemalloc.so.2")
    assert "MALLOC_CONF" in found and "TCMALLOC_RELEASE_RATE" not in found


@pytest.mark.parametrize("key", ["LD_PRELOAD", "GLIBC_TUNABLES", "MALLOC_CONF", "MALLOC_ARENA_MAX"])
def test_nothing_is_preloaded_where_the_user_has_chosen(key, tmp_path):
    (tmp_path / "libjemalloc.so.2").touch()
    assert better_allocator_environment({key: "x"}, [str(tmp_path)]) == {}
    assert better_allocator_environment({}, ["/nowhere"]) == {}


def test_restart_keeps_process_and_arguments_and_happens_once(tmp_path):
    library = Path("/proc/self/maps").read_text().split("libc.so.6")[0].split()[-1] + "libc.so.6"  # any that loads
    (tmp_path / "libjemalloc.so.2").symlink_to(library)
    program = tmp_path / "program.py"
    program.write_text(
        "import os, sys, megatrain.runtime.allocator as memory\n"
        f"memory.better_allocator_environment.__defaults__ = (os.environ, [{str(tmp_path)!r}])\n"
        "print(os.getpid(), flush=True)\n"
        "memory.restart_with_better_allocator()\n"
        "print(os.environ['LD_PRELOAD'], sys.argv[1:])\n"
    )
    clean = {key: value for key, value in os.environ.items() if not key.startswith(("MALLOC_", "GLIBC_", "LD_PRELOAD"))}
    done = subprocess.run(
        [sys.executable, str(program), "a", "b c"], env=clean, capture_output=True, text=True, check=True, timeout=60
    )
    first, second, last = done.stdout.splitlines()
    assert first == second
    assert last == f"{tmp_path / 'libjemalloc.so.2'} ['a', 'b c']"
