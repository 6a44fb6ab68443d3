"""Reading ahead keeps the order, a bound on what waits, and the error at its item."""

import threading
import time

import pytest

from vidreason.datamodules.clips.read_ahead import Readers, usual_readers


@pytest.mark.parametrize("number", [0, 3])
def test_items_come_in_order_and_an_error_at_its_place(number: int) -> None:
    def read(item: int) -> int:
        time.sleep(0.01 * (item % 3))
        if item == 7:
            raise ValueError("seven")
        return 10 * item

    reading = Readers(number).ahead(range(100), read, ahead=4)
    assert [next(reading) for _ in range(7)] == [0, 10, 20, 30, 40, 50, 60]
    with pytest.raises(ValueError, match="seven"):
        next(reading)


def test_no_more_than_the_bound_are_asked_for_and_they_are_read_at_once() -> None:
    asked, together = list[int](), threading.Barrier(3, timeout=10)

    def items():
        for item in range(100):
            asked.append(item)
            yield item

    def read(item: int) -> int:
        if item < 3:
            together.wait()  # passes only if three are read at the same time
        return item

    readers = Readers(3)
    reading = readers.ahead(items(), read, ahead=5)
    assert next(reading) == 0
    assert len(asked) == 6
    assert next(reading) == 1
    assert len(asked) == 7
    reading.close()
    assert list(readers.ahead(range(4), read=str, ahead=1)) == ["0", "1", "2", "3"], "the threads stay"


def test_the_threads_end_with_their_readers() -> None:
    before = set(threading.enumerate())  # threads of earlier tests may still end
    readers = Readers(2)
    assert list(readers.ahead([1], read=str, ahead=1)) == ["1"]
    started = set(threading.enumerate()) - before
    assert len(started) == 2
    del readers
    for thread in started:
        thread.join(timeout=10)
    assert not any(thread.is_alive() for thread in started)


def test_processes_of_one_machine_share_its_cpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.sched_getaffinity", lambda process: set(range(12)), raising=False)
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    assert usual_readers() == 8
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert usual_readers() == 3
