"""How the threads of a process wait for each other: what `import megatrain` chooses, and when it leaves the choice alone."""

import os
import subprocess
import sys

import pytest
import torch

from megatrain.runtime.distributed import _set_threads
from megatrain.runtime.launch import Launch
from megatrain.runtime.waiting import CHOICES, has_policy, wait_asleep


@pytest.mark.parametrize("chosen", [{"OMP_WAIT_POLICY": "active"}, {"GOMP_SPINCOUNT": "1000"}, {"KMP_BLOCKTIME": "200"}])
def test_a_choice_stands(chosen):
    env = dict(chosen)
    wait_asleep(env, loaded=())
    assert env == chosen and has_policy(env)


def test_asleep_unless_it_is_too_late():
    env = {}
    wait_asleep(env, loaded=("torch",))
    assert env == {} and not has_policy(env)
    wait_asleep(env, loaded=("numpy",))
    assert env == {"OMP_WAIT_POLICY": "PASSIVE", "GOMP_SPINCOUNT": "1000"} and has_policy(env)


def test_the_start_up_line_says_where_threads_wait_busily():
    threads, cpu = torch.get_num_threads(), torch.device("cpu")
    try:
        for number, env, busy in ((2, {}, True), (2, {"OMP_WAIT_POLICY": "PASSIVE"}, False), (1, {}, False)):
            torch.set_num_threads(number)
            line = _set_threads(Launch(), cpu, env)
            assert line.startswith(f"CPU threads of a rank: {number} of ")
            assert (
                line.endswith(
                    ", which wait busily, since torch was imported before megatrain: slow on cores that others use too"
                )
                == busy
            )
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("first", ["megatrain", "megatrain.__main__", "megatrain.runtime.launch"])
def test_whatever_comes_first_sets_it(first):
    """The command, the library, the launch scripts' own program."""
    code = f"import os, sys, {first}; print(os.environ['OMP_WAIT_POLICY'], 'torch' in sys.modules)"
    assert python(code)[0] == "PASSIVE False\n"


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="GNU's OpenMP, which torch's wheels for Linux bring")
def test_openmp_takes_it():
    assert "GOMP_SPINCOUNT = '1000'" in python("import megatrain; import torch", OMP_DISPLAY_ENV="verbose")[1]


def python(code, **more):
    env = {key: value for key, value in os.environ.items() if key not in CHOICES}
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, env={**env, **more}, capture_output=True, text=True, timeout=120, check=True)
    return done.stdout, done.stderr
