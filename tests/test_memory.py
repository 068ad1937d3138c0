"""Large buffers serve again once nobody refers to them, and not before; the garbage collector rests meanwhile."""

from __future__ import annotations

import gc
import subprocess
import sys
import threading

import numpy as np
import pytest

from surgery.tensors import memory
from surgery.tensors.lazy import empty
from surgery.tensors.memory import POOLED, buffer, settled


@pytest.fixture(autouse=True)
def pool(monkeypatch):
    """A pool of the test's own."""
    monkeypatch.setattr(memory, "_pool", memory.defaultdict(list))
    monkeypatch.setattr(memory, "_pooled", 0)


def place(array):
    return array.__array_interface__["data"][0]


def test_a_buffer_serves_again_when_its_last_view_is_gone():
    first = empty((POOLED,), "float32")
    at, view = first.data_ptr(), first.reshape(2, -1)[1, 3:]
    del first
    second = empty((POOLED,), "float32")
    assert second.data_ptr() != at, "a view still reads it"
    del view
    assert empty((POOLED,), "float32").data_ptr() == at
    assert second.data_ptr() != at


def test_a_view_of_numpys_keeps_a_buffer():
    first = buffer(POOLED)
    at, view = place(first), first[8:].view("u4")[2:]
    del first
    assert place(second := buffer(POOLED)) != at
    del view
    assert place(buffer(POOLED)) == at != place(second)


def test_sizes_that_differ_a_little_share_buffers():
    at = place(buffer(4 * POOLED))
    again = buffer(4 * POOLED - 1000)
    assert place(again) == at and again.nbytes == 4 * POOLED - 1000


def test_small_ones_and_what_is_too_much_are_not_kept(monkeypatch):
    monkeypatch.setattr(memory, "_kept", 3 * POOLED)
    del (small := [buffer(POOLED - 1)])[:]
    assert memory._pooled == 0 and not small
    held = [buffer(POOLED) for _ in range(5)]
    del held
    assert memory._pooled == 3 * POOLED == sum(b.nbytes for own in memory._pool.values() for b in own)


def test_threads_never_share_a_buffer():
    wrong = []

    def work(number):
        for _ in range(300):
            own = buffer(2 * POOLED)
            own[:] = number
            if not (own[::4096] == number).all():
                wrong.append(number)

    threads = [threading.Thread(target=work, args=(n,)) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    assert (
        np.unique([place(b) for own in memory._pool.values() for b in own]).size <= 8
    )  # the next before the last goes


def test_garbage_is_looked_for_again_after_the_work():
    def work():
        with settled():
            assert gc.get_freeze_count()
            with settled():
                pass
            assert gc.get_freeze_count(), "work within work does not end it"
            raise KeyError

    assert not gc.get_freeze_count()
    with pytest.raises(KeyError):
        work()
    assert not gc.get_freeze_count()


def test_what_the_caller_froze_stays_frozen():
    gc.freeze()
    try:
        with settled():
            pass
        assert gc.get_freeze_count()
    finally:
        gc.unfreeze()


def test_a_command_ends_without_looking_for_garbage():
    code = "import atexit, gc; atexit.register(lambda: print(gc.get_freeze_count() > 0)); import surgery.cli.main"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "True\n"


def test_the_most_that_a_process_held_is_its_own():
    """On Linux `ru_maxrss` of a new process begins at what its parent holds."""
    held = np.ones(400 << 20, np.uint8)
    code = "from surgery.tensors.memory import high_water; print(high_water())"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert memory.high_water() > held.nbytes > 2 * int(done.stdout)
