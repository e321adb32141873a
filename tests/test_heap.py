"""Freed memory goes back to the system."""

from __future__ import annotations

import subprocess
import sys

import pytest

HOLES = """
import ctypes, psutil
from lift_ray.training.heap import return_freed_memory
libc = ctypes.CDLL(None)
libc.malloc.restype, libc.malloc.argtypes, libc.free.argtypes = ctypes.c_void_p, [ctypes.c_size_t], [ctypes.c_void_p]
pieces = [libc.malloc(64 * 1024) for _ in range(2000)]
for piece in pieces: ctypes.memset(piece, 1, 64 * 1024)
for piece in pieces[:-1]: libc.free(piece)
resident = psutil.Process().memory_info().rss
return_freed_memory()
print((resident - psutil.Process().memory_info().rss) / 2**20)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="glibc")
def test_freed_memory_below_an_allocation_that_is_in_use_goes_back_to_the_system() -> None:
    ran = subprocess.run([sys.executable, "-c", HOLES], capture_output=True, text=True, check=True, timeout=60)
    assert float(ran.stdout) > 100


def test_another_c_library_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    from lift_ray.training import heap

    heap._malloc_trim.cache_clear()
    monkeypatch.setattr(heap.ctypes, "CDLL", lambda name: object())
    heap.return_freed_memory()
    heap._malloc_trim.cache_clear()
