"""Signals: noted once, obeyed the second time, kept from data workers; and a run under torchrun that goes on later."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from runs import assert_same_bits, metrics
from tiny import DISCRIMINATOR, tiny_config, write_splits

from vqgan_accel import interruption
from vqgan_accel.config import save_config
from vqgan_accel.interruption import EXIT_INTERRUPTED, STOP_SIGNALS, catch_stop_signals
from vqgan_accel.run_folder import checkpoints

REPOSITORY = Path(__file__).parent.parent


def wait_until(condition, seconds: float = 10) -> None:
    end = time.monotonic() + seconds
    while not condition() and time.monotonic() < end:
        time.sleep(0.01)
    assert condition()


@pytest.mark.parametrize("number", STOP_SIGNALS)
def test_a_signal_is_noted_and_its_repetition_by_a_launcher_is_the_same_request(number, monkeypatch):
    monkeypatch.setattr(interruption, "ONE_REQUEST", 600.0)  # or a slow machine would end pytest here
    before = [signal.getsignal(name) for name in STOP_SIGNALS]
    with catch_stop_signals() as request:
        assert not request
        os.kill(os.getpid(), number)
        wait_until(lambda: bool(request))
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(0.1)
        assert request.signal == number
    assert [signal.getsignal(name) for name in STOP_SIGNALS] == before
    assert threading.active_count() == len(
        [thread for thread in threading.enumerate() if thread.name != "stop signals"]
    )


TWICE = """
import os, signal, threading, time
from vqgan_accel import interruption
interruption.ONE_REQUEST = 0.2
def twice():
    for _ in range(50):  # two are enough, where the listener is not kept waiting
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(0.4)
with interruption.catch_stop_signals():
    threading.Thread(target=twice, daemon=True).start()
    lock = threading.Lock()
    lock.acquire()
    try:
        lock.acquire()  # nobody lets it go
    finally:
        print("came back")
"""


def test_a_second_signal_ends_a_process_that_waits():
    done = subprocess.run([sys.executable, "-c", TWICE], cwd=REPOSITORY, capture_output=True, text=True, timeout=30)
    assert (done.returncode, done.stdout) == (128 + signal.SIGINT, ""), done.stderr


def test_outside_of_the_main_thread_nothing_is_caught():
    noted = []

    def elsewhere() -> None:
        with catch_stop_signals() as request:
            noted.append(bool(request))

    thread = threading.Thread(target=elsewhere)
    thread.start()
    thread.join()
    assert noted == [False]


SERVE = """
import os, sys, time
from vqgan_accel.interruption import shield_data_worker
child = os.fork()
if child == 0:
    shield_data_worker(0)
    print("ready", os.getpid(), flush=True)
    time.sleep(60)
    os._exit(3)
for line in sys.stdin:  # told to end its worker
    os.kill(child, 15)
    print("ended with", os.waitpid(child, 0)[1], flush=True)
"""


def test_a_data_worker_obeys_its_parent_alone():
    parent = subprocess.Popen(
        [sys.executable, "-c", SERVE], cwd=REPOSITORY, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert parent.stdin and parent.stdout
    worker = int(parent.stdout.readline().split()[1])
    assert os.getpgid(worker) != os.getpgid(parent.pid)
    for number in STOP_SIGNALS:
        os.kill(worker, number)
    time.sleep(0.2)
    os.kill(worker, 0)  # still there
    print("now", file=parent.stdin, flush=True)
    assert parent.stdout.readline() == "ended with 0\n"
    parent.stdin.close()
    assert parent.wait(timeout=10) == 0


@pytest.mark.slow
def test_a_run_under_torchrun_stops_on_sigterm_and_goes_on_as_if_nothing_had_happened(tmp_path):
    images = write_splits(tmp_path / "images")
    settings = {
        "data": {"path": str(images), "workers": 1},
        "quantizer": {"type": "ema", "reinit_every": "1 epoch"},
        "discriminator": DISCRIMINATOR | {"adaptive_weight": True},
        "training": {"max_steps": 60, "log_every": 1, "validate_every": "7 steps", "keep_checkpoints": 2},
    }
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}

    def start(name: str, *options: str) -> subprocess.Popen[str]:
        config = tmp_path / name / "config.yaml"
        config.parent.mkdir(exist_ok=True)
        save_config(tiny_config(tmp_path / name, **settings), config)
        arguments = [*command, REPOSITORY / "train.py", config, *options]
        return subprocess.Popen(arguments, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)

    stopped, run = start("stopped"), tmp_path / "stopped" / "run"
    log = run / "metrics.jsonl"
    wait_until(lambda: log.exists() and log.read_text().count("\n") > 3, seconds=60)
    stopped.send_signal(signal.SIGTERM)  # to torchrun, which passes it on
    output, errors = stopped.communicate(timeout=60)
    assert stopped.returncode != 0
    assert "processes          2 on cpu" in output and "stopped by SIGTERM after step" in errors
    assert f"exitcode  : {EXIT_INTERRUPTED}" in errors or "SignalException" in errors
    (newest,) = checkpoints(run)[-1:]
    assert newest.name < "step_00000060" and (run / "checkpoints" / "latest").resolve() == newest

    resumed, whole = start("stopped", "--resume"), start("whole")
    for process in (resumed, whole):
        output, errors = process.communicate(timeout=120)
        assert process.returncode == 0, errors[-2000:]
        assert "processes          2 on cpu" in output
    assert_same_bits(run / "checkpoints" / "latest", tmp_path / "whole" / "run" / "checkpoints" / "latest")
    assert metrics(run) == metrics(tmp_path / "whole" / "run")
