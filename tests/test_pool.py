"""The pool of threads: every unit once, whoever does it; threads come late, sleep, and are forked away."""

import os
import subprocess
import sys
import time

import numpy as np
import pytest
from numba import njit

from edgeq.kernels import pool
from edgeq.kernels.jit import kernel


@njit(nogil=True)
def count_unit(unit, counts, amount):
    counts[unit] += amount


@kernel("void(i8[::1], i8[::1], i8)")
def count(state, counts, amount):
    pool.run(state, len(counts), pool.job(count_unit, (counts, amount)))


@pytest.mark.parametrize("threads", [1, 2, 3, 8])
@pytest.mark.parametrize("units", [1, 2, 3, 64, 1000])
def test_every_unit_is_done_once(threads, units):
    counts = np.zeros(units, np.int64)
    with pool.computing(threads):
        for repeat in range(1, 301):
            count(pool.state(), counts, 1)
            assert (counts == repeat).all()


def test_no_units():
    with pool.computing(4):
        count(pool.state(), np.zeros(0, np.int64), 1)


def test_threads_that_fell_asleep_are_woken():
    counts = np.zeros(64, np.int64)
    for _ in range(5):
        with pool.computing(3):
            count(pool.state(), counts, 1)
            time.sleep(0.02)  # within a call they stay awake
            count(pool.state(), counts, 1)
        time.sleep(0.05)  # longer than they wait awake
    assert (counts == 10).all()


def test_very_many_small_jobs():
    counts = np.zeros(2, np.int64)
    with pool.computing(3):
        for _ in range(100_000):
            count(pool.state(), counts, 1)
    assert (counts == 100_000).all()


def test_outside_of_a_call_the_calling_thread_does_it_all():
    counts = np.zeros(64, np.int64)
    with pool.computing(2):
        count(pool.state(), counts, 1)
    time.sleep(0.05)
    count(pool.state(), counts, 1)
    assert (counts == 2).all()


FORK = """
import os, numpy as np
import test_pool
from edgeq.kernels import pool
counts = np.zeros(64, np.int64)
with pool.computing(2):
    test_pool.count(pool.state(), counts, 1)
child = os.fork()
with pool.computing(2):
    test_pool.count(pool.state(), counts, 1)
assert (counts == 2).all()
if child:
    assert os.waitpid(child, 0)[1] == 0
"""


def test_a_forked_process_has_a_pool_of_its_own():
    run = subprocess.run(
        [sys.executable, "-c", FORK],
        env=os.environ | {"PYTHONPATH": os.path.dirname(__file__)},
        timeout=120,
        check=False,
    )
    assert run.returncode == 0


@njit(nogil=True)
def slow_unit(unit, counts, started):
    if unit == 1:
        pool.atomic_store(started, 0, 1)
        for _ in range(300):
            pool.nap()
    else:  # leave the slow one to the other thread, if that comes at all
        for _ in range(100):
            if pool.atomic_load(started, 0):
                break
            pool.nap()
    counts[unit] += 1


@kernel("void(i8[::1], i8[::1], i8[::1])")
def wait_for_a_unit(state, counts, started):
    pool.run(state, len(counts), pool.job(slow_unit, (counts, started)))


def test_a_thread_that_keeps_others_waiting_is_left_out_for_a_while():
    counts, tries = np.zeros(2, np.int64), 0
    with pool.computing(2):
        state = pool.state()
        state[pool.ACTIVE] = 2
        while state[pool.ACTIVE] == 2 and tries < 200:
            wait_for_a_unit(state, counts, np.zeros(1, np.int64))
            tries += 1
        assert state[pool.ACTIVE] == 1
        assert (counts == tries).all()
        counts[:] = 0
        state[pool.BACK] += 10**12
        count(state, counts, 1)
        assert state[pool.ACTIVE] == 1
        state[pool.BACK] = 0
        count(state, counts, 1)
        assert state[pool.ACTIVE] == 2
        assert (counts == 2).all()
