"""The thread that writes the sampler's shards."""

from __future__ import annotations

import threading
import time

import pytest

from tasks.engines.sampler import _UNWRITTEN, Disk


def test_writes_come_in_order_and_the_block_waits_for_them() -> None:
    written: list[int] = []

    def write(number: int) -> None:
        time.sleep(0.01 * (5 - number))
        written.append(number)

    with Disk() as disk:
        for number in range(5):
            disk.submit(lambda number=number: write(number))
    assert written == list(range(5))


def test_an_error_of_a_write_is_raised_and_later_writes_are_done() -> None:
    written: list[int] = []

    def fail() -> None:
        raise OSError("no")

    with Disk() as disk:
        disk.submit(fail)
        with pytest.raises(OSError, match="no"):
            disk.check()
        disk.submit(lambda: written.append(1))
        disk.check()
    assert written == [1]


def test_what_was_given_is_written_although_the_block_fails() -> None:
    written: list[int] = []
    with pytest.raises(ValueError, match="engine"), Disk() as disk:
        disk.submit(lambda: (time.sleep(0.05), written.append(1))[1])
        raise ValueError("engine")
    assert written == [1]


def test_a_slow_disk_holds_the_engine_up_and_no_more_than_a_few_shards_wait() -> None:
    release, given = threading.Event(), list[int]()

    def give(disk: Disk) -> None:
        for number in range(_UNWRITTEN + 2):
            disk.submit(lambda: release.wait(10) and None)
            given.append(number)

    with Disk() as disk:
        giving = threading.Thread(target=give, args=(disk,))
        giving.start()
        giving.join(0.3)
        assert giving.is_alive() and len(given) == _UNWRITTEN
        release.set()
        giving.join(10)
    assert len(given) == _UNWRITTEN + 2
