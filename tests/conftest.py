"""What all tests share."""

import gc
import multiprocessing
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.multiprocessing as mp

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # read when the kernels are defined: before pedgpt is imported
os.environ["PEDGPT_CPU"] = "always"  # for child processes too: a measurement could go either way
signal.signal(signal.SIGINT, signal.default_int_handler)  # which a shell takes from what it starts with &
OTHER_HASH_SEED = "12345"
multiprocessing.set_forkserver_preload(["torch._dynamo", "torch.distributed.fsdp", "pedgpt.stage"])  # takes seconds


def pytest_collection_modifyitems(items):
    """Files that take long come first, so that no worker waits for the other one at the end."""
    long = ("recipes/", "tests/test_", "test_compiled")
    items.sort(key=lambda item: not any(name in item.nodeid.partition("::")[0] for name in long))


def pytest_collection_finish():
    """What is imported by now stays, so the garbage collector need not look through it again in every test."""
    gc.collect()
    gc.freeze()


def pytest_sessionfinish():
    gc.unfreeze()


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """Models this small gain nothing from a second thread and wait for it whenever the machine is busy."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def start_ranks():
    """start_ranks(worker, *arguments, ranks=2): run worker(rank, *arguments) for each rank, in processes of their own.

    The processes are copies of a server that has imported the libraries already, which otherwise takes seconds each.
    """

    def start(worker, *arguments, ranks=2):
        mp.start_processes(worker, args=arguments, nprocs=ranks, start_method="forkserver")

    return start


@pytest.fixture(scope="session")
def python(tmp_path_factory):
    """A command like sys.executable for scripts, -c and -m, in which torch is imported already: tests/forked_python.py.

    It knows no other options, and reads no PYTHON… variable but PYTHONPATH. Its PYTHONHASHSEED is OTHER_HASH_SEED, so
    that sets have another order than in the tests' own process.
    """
    if not hasattr(os, "pidfd_open"):  # Linux only
        yield sys.executable
        return
    folder = tmp_path_factory.mktemp("python")
    server = [sys.executable, str(Path(__file__).with_name("forked_python.py")), str(folder / "socket")]
    (folder / "python").write_text(f'#!/bin/sh\nexec {server[0]} -IS {server[1]} {server[2]} "$@"\n', encoding="utf-8")
    (folder / "python").chmod(0o755)
    assert os.environ.get("PYTHONHASHSEED") != OTHER_HASH_SEED
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": "", "PYTHONHASHSEED": OTHER_HASH_SEED}
    process = subprocess.Popen(server, env=environment, stdout=subprocess.PIPE)
    assert process.stdout.readline() == b"listening\n"
    yield str(folder / "python")
    process.kill()
    process.wait()
