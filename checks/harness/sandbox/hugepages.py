"""Backs this process's memory with huge pages, so that its forks copy page tables of a five-hundredth of the size."""

import ctypes
import sys
from pathlib import Path

_HUGE_PAGE = 2 << 20
_MADV_COLLAPSE = 25


def use_huge_pages() -> None:
    """Asks Linux (6.1 or newer; elsewhere nothing happens) to put what this process has allocated into huge pages.

    It takes up to a second, once. A fork then takes a third of the time, and what the fork runs misses fewer pages.
    """
    if sys.platform != "linux":
        return
    madvise = ctypes.CDLL(None).madvise
    madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    for line in Path("/proc/self/maps").read_text().splitlines():
        addresses, rights, _, _, inode, *_ = line.split()
        if rights != "rw-p" or inode != "0":
            continue
        begin, end = (int(address, 16) for address in addresses.split("-"))
        for page in range(-(-begin // _HUGE_PAGE) * _HUGE_PAGE, end - _HUGE_PAGE + 1, _HUGE_PAGE):
            madvise(page, _HUGE_PAGE, _MADV_COLLAPSE)
