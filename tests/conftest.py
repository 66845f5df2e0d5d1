import importlib
import os
import tempfile
from pathlib import Path

import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # before megatrain's kernels are imported
os.environ.setdefault("NUMBA_CACHE_DIR", str(Path(tempfile.gettempdir(), f"megatrain-tests-{os.getuid()}")))  # workers share it

import fuzzing
import jobs
import promises
import pytest
from forked import PIPE, Forked
from room import Room

try:
    from hypothesis import settings

    # A machine that is busy elsewhere makes any example late; whole tests have a limit.
    settings.register_profile("without deadlines", deadline=None)
    settings.load_profile("without deadlines")
except ImportError:  # a GPU machine runs the tests marked `gpu`, which draw nothing
    pass

ROOM = pytest.StashKey[Room]()
WORKER = Path(__file__).resolve().parents[1] / "megatrain/testing/worker.py"


def pytest_configure(config):
    config.pluginmanager.register(promises)
    if run := os.environ.get("PYTEST_XDIST_TESTRUNUID"):
        config.stash[ROOM] = Room(run)


def pytest_unconfigure(config):
    if ROOM in config.stash:
        config.stash[ROOM].leave()


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items):
    """A test that asks for what nobody makes is refused here, before marks leave it out: it might first run where time is dear."""
    for item in items:
        made = item._fixtureinfo.name2fixturedefs.keys() | {"request"}
        if missing := sorted(set(item.fixturenames) - made):
            raise pytest.UsageError(f"{item.nodeid}: nothing makes {', '.join(missing)}")


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_runtest_protocol(item):
    if ROOM not in item.config.stash:
        return (yield)
    with item.config.stash[ROOM].taken(alone=item.get_closest_marker("alone") is not None):
        return (yield)


def forked_worker(pipe, words, environment):
    """A process of `spawn` that has everything imported, with this process's output."""
    return Forked([str(WORKER), PIPE, *words], environment, 1, 2, pipe)


@pytest.fixture(autouse=True, scope="session")
def pools_are_forked():
    """`spawn` starts up to eight processes that import torch, for two seconds of a core each: here as forks of one that has."""
    with pytest.MonkeyPatch.context() as patch:
        if jobs.FORKS:
            patch.setattr(importlib.import_module("megatrain.testing.spawn"), "start_worker", forked_worker)
        yield


@pytest.fixture(autouse=True, scope="session")
def pictures_are_not_drawn():
    """A run that a test trains in its own process ends without matplotlib, which takes longer than eight small steps."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("megatrain.records.log.RunLog._draw", lambda log, references: None)
        patch.setattr("megatrain.records.log.RunLog._draw_tasks", lambda log: None)
        yield


def defaults():
    """Torch's process-wide defaults."""
    return torch.get_default_dtype(), torch.get_num_threads(), torch.are_deterministic_algorithms_enabled()


@pytest.fixture(autouse=True, scope="module")
def defaults_stand_after_a_file():
    """The fixtures of every file leave torch's process-wide defaults as they were."""
    before = defaults()
    yield
    assert defaults() == before


@pytest.fixture(autouse=True)
def defaults_stand(defaults_stand_after_a_file):
    """Every test leaves torch's process-wide defaults as they were."""
    before = defaults()
    yield
    assert defaults() == before


@pytest.fixture
def one_thread():
    """For models so small that they lose more by sharing work between cores than they gain, most of all on a busy machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def pytest_report_header() -> str:
    """The seed that makes this session's fuzzers again."""
    return f"fuzzers: {fuzzing.SEED}={fuzzing.seed()}"
