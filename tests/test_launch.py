"""launch/: accelerate accepts the files, the commands in them are right, and the scripts start what they say."""

from __future__ import annotations

import configparser
import contextlib
import json
import os
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.commands.launch import launch_command_parser
from accelerate.utils import ComputeEnvironment, DistributedType
from tiny import DISCRIMINATOR, tiny_config, write_splits

from vqgan_accel.config import save_config
from vqgan_accel.interruption import EXIT_INTERRUPTED
from vqgan_accel.status import status

pytestmark = pytest.mark.slow

REPOSITORY = Path(__file__).parent.parent
LAUNCH = REPOSITORY / "launch"
FILES = {  # machines, processes over all machines
    "one_gpu": (1, 1),
    "8xA100_bf16": (1, 8),
    "two_nodes_8xA100_bf16": (2, 16),
}
BIN = Path(sys.executable).parent  # where accelerate and torchrun are


def environment(**extra: str) -> dict[str, str]:
    return os.environ | {"PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}", "OMP_NUM_THREADS": "1"} | extra


# ---- accelerate's files


def test_every_config_file_is_known_here():
    assert sorted(path.stem for path in LAUNCH.glob("*.yaml")) == sorted(FILES)


@pytest.mark.parametrize("name", FILES)
def test_accelerate_reads_the_file_as_it_is_meant(name):
    machines, processes = FILES[name]
    config = load_config_from_file(str(LAUNCH / f"{name}.yaml"))  # refuses unknown keys
    assert config.compute_environment == ComputeEnvironment.LOCAL_MACHINE
    assert config.distributed_type == (DistributedType.MULTI_GPU if processes > 1 else DistributedType.NO)
    assert (config.num_machines, config.num_processes) == (machines, processes)
    assert config.mixed_precision == "bf16"
    assert config.use_cpu is False
    if machines > 1:
        assert config.main_process_ip and config.main_process_port


@pytest.mark.parametrize("name", FILES)
def test_the_command_at_the_top_of_the_file_is_one_that_accelerate_takes(name):
    (command,) = re.findall(r"^#   accelerate launch (.*)$", (LAUNCH / f"{name}.yaml").read_text(), re.MULTILINE)
    arguments = launch_command_parser().parse_args(shlex.split(command.replace("IP ", "10.0.0.1 ")))
    assert (REPOSITORY / arguments.config_file).samefile(LAUNCH / f"{name}.yaml")
    assert arguments.training_script == "train.py"
    assert arguments.training_script_args[:2] == ["CONFIG", "data.path=FOLDER"]
    if FILES[name][0] > 1:  # what differs between machines is on the command line
        assert arguments.main_process_ip == "10.0.0.1"
        assert (arguments.machine_rank, arguments.main_process_port) == (0, 29500)


def test_recipes_name_a_config_file_that_exists():
    for recipe in (REPOSITORY / "configs").rglob("*.yaml"):
        for name in re.findall(r"--config_file (\S+)", recipe.read_text()):
            assert (REPOSITORY / name).is_file(), f"{recipe} names {name}"


def test_two_machines_with_the_two_node_file_form_one_run(tmp_path):
    """On this machine's CPU, one process per machine; the command line overrides the file's 16 processes and port."""
    script = tmp_path / "who.py"
    script.write_text(
        "from accelerate import Accelerator\n"
        "a = Accelerator()\n"
        "print('WHO', a.num_processes, a.process_index, a.mixed_precision, a.distributed_type.value, flush=True)\n"
        "a.end_training()\n"
    )
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = f"accelerate launch --config_file {LAUNCH}/two_nodes_8xA100_bf16.yaml --num_processes 2 "
    command += f"--main_process_ip 127.0.0.1 --main_process_port {port} --machine_rank"
    machines = [
        subprocess.Popen(
            [*shlex.split(command), str(rank), str(script)],
            env=environment(ACCELERATE_USE_CPU="true"),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,  # so that what a launcher has started can be ended with it
        )
        for rank in (0, 1)
    ]
    try:
        outputs = [machine.communicate(timeout=90)[0] for machine in machines]
    finally:
        for machine in machines:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(machine.pid, signal.SIGKILL)
            machine.wait()
    for rank, output in enumerate(outputs):
        assert f"WHO 2 {rank} bf16 MULTI_CPU" in output, output


# ---- scripts

SCRIPTS = sorted(LAUNCH.glob("*.sh"))


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_every_script_is_executable_and_parses(script):
    assert os.access(script, os.X_OK)
    assert script.read_text().startswith("#!/bin/bash\n")
    subprocess.run(["bash", "-n", script], check=True)
    if shellcheck := shutil.which("shellcheck"):
        subprocess.run([shellcheck, script], check=True)


@pytest.mark.parametrize("script", ["slurm.sh", "two_cpu_processes.sh"])  # those that take a config
def test_a_script_without_a_config_says_how_it_is_used(script, tmp_path):
    result = subprocess.run([LAUNCH / script], capture_output=True, text=True, cwd=tmp_path, env=environment())
    assert result.returncode == 2
    assert result.stderr.startswith("usage: ") and "CONFIG [key=value ...]" in result.stderr


def program(path: Path, text: str) -> None:
    path.parent.mkdir(exist_ok=True)
    path.write_text(text)
    path.chmod(0o755)


@pytest.fixture
def slurm(tmp_path):
    """An environment with stand-ins: srun starts three nodes' tasks, two each, and python prints what it was given."""
    stand_ins = tmp_path / "bin"
    program(
        stand_ins / "scontrol",
        "#!/bin/bash\n"
        f'echo "$*" >> {tmp_path}/scontrol.log\n'
        '[[ "$*" == "show hostnames gpu[07-09]" ]] && printf "gpu0%d\\n" 7 8 9; true\n',
    )
    program(
        stand_ins / "srun",
        '#!/bin/bash\nwhile [[ $1 == --* ]]; do echo "srun $1" >&2; shift; done\nstatus=0\n'
        "for task in 0 1 2 3 4 5; do\n"
        '  SLURM_PROCID=$task SLURM_LOCALID=$((task % 2)) SLURM_NTASKS=6 "$@" || status=$?\n'
        "done\nexit $status\n",
    )
    program(
        stand_ins / "python",
        f"#!{sys.executable}\nimport json, os, sys\n"
        "names = ('RANK', 'LOCAL_RANK', 'WORLD_SIZE', 'MASTER_ADDR', 'MASTER_PORT', 'ACCELERATE_MIXED_PRECISION')\n"
        "print(json.dumps([sys.argv[1:], [os.environ[name] for name in names]]))\n"
        "sys.exit(int(os.environ.get('STATUS', '0')))\n",
    )
    variables = {
        "SLURM_SUBMIT_DIR": str(REPOSITORY),
        "SLURM_JOB_NODELIST": "gpu[07-09]",
        "SLURM_JOB_ID": "123456",
        "SLURM_CPUS_PER_TASK": "8",
    }
    return os.environ | variables | {"PATH": f"{stand_ins}{os.pathsep}{os.environ['PATH']}"}


def test_slurm_starts_one_task_a_gpu_that_together_make_one_run(slurm, tmp_path):
    given = ["configs/demo.yaml", "discriminator.start=300 steps", "data.path=/a b"]
    copy = shutil.copy(LAUNCH / "slurm.sh", tmp_path / "slurm_script")  # as SLURM does
    result = subprocess.run(["bash", copy, *given], env=slurm, cwd=tmp_path, capture_output=True, text=True, check=True)
    assert {"srun --cpus-per-task=8", "srun --kill-on-bad-exit=0", "srun --wait=60"} <= set(result.stderr.splitlines())
    tasks = [json.loads(line) for line in result.stdout.splitlines()]
    for rank, (arguments, environment) in enumerate(tasks):
        assert arguments == ["-m", "vqgan_accel", "train", *given, "--resume"]  # so that a requeued job goes on
        assert environment == [str(rank), str(rank % 2), "6", "gpu07", "23456", "bf16"]
    assert len(tasks) == 6
    assert "requeue" not in (tmp_path / "scontrol.log").read_text()


@pytest.mark.parametrize("status", [EXIT_INTERRUPTED, 2, 138])
def test_slurm_requeues_what_has_stopped_in_order_and_nothing_else(slurm, tmp_path, status):
    result = subprocess.run([LAUNCH / "slurm.sh", "c.yaml"], env=slurm | {"STATUS": str(status)}, capture_output=True)
    assert result.returncode == status
    requeued = "requeue 123456" in (tmp_path / "scontrol.log").read_text()
    assert requeued == (status == EXIT_INTERRUPTED)


def test_slurm_warns_the_tasks_and_keeps_the_log(slurm):
    options = dict(
        option.removeprefix("--").partition("=")[::2]
        for option in re.findall(r"^#SBATCH (\S+)", (LAUNCH / "slurm.sh").read_text(), re.MULTILINE)
    )
    assert options["signal"] == "USR1@600"  # to the tasks; with B: it would go to this script
    assert "requeue" in options and options["open-mode"] == "append"
    assert options["ntasks-per-node"] == options["gpus-per-node"] == "8"


def test_slurm_runs_one_line_of_a_sweep_in_each_element_of_an_array(slurm, tmp_path):
    (tmp_path / "sweep.txt").write_text(
        'output_dir=runs/a seed=1\noutput_dir=runs/b "discriminator.start=300 steps" seed=2\nseed=3\n'
    )
    array = slurm | {"SWEEP": str(tmp_path / "sweep.txt"), "SLURM_ARRAY_TASK_ID": "2"}
    result = subprocess.run([LAUNCH / "slurm.sh", "demo"], env=array, capture_output=True, text=True, check=True)
    words = ["demo", "output_dir=runs/b", "discriminator.start=300 steps", "seed=2", "--resume"]
    assert json.loads(result.stdout.splitlines()[0])[0] == ["-m", "vqgan_accel", "train", *words]
    for line in ("3", "4"):  # without a folder of its own, and none at all
        array["SLURM_ARRAY_TASK_ID"] = line
        result = subprocess.run([LAUNCH / "slurm.sh", "demo"], env=array, capture_output=True, text=True)
        assert result.returncode == 2 and "has no output_dir" in result.stderr


def test_slurm_works_in_the_folder_from_which_it_was_submitted(slurm, tmp_path):
    program(tmp_path / "bin" / "python", "#!/bin/bash\npwd\n")
    result = subprocess.run(
        [LAUNCH / "slurm.sh", "demo"], env=slurm | {"SLURM_SUBMIT_DIR": str(tmp_path)}, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout.splitlines() == [str(tmp_path)] * 6


def test_two_cpu_processes_are_two_from_any_directory(tmp_path):
    config = tiny_config(tmp_path, data={"path": "images"}, discriminator=DISCRIMINATOR)
    save_config(config, tmp_path / "tiny.yaml")
    write_splits(tmp_path / "images")
    arguments = ["tiny.yaml", "output_dir=here/run", "training.log_every=1"]
    result = subprocess.run(
        [LAUNCH / "two_cpu_processes.sh", *arguments], cwd=tmp_path, env=environment(), capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr
    assert "processes          2 on cpu" in result.stdout
    assert "batch              4 = 2 processes x 1 rounds x 2 images" in result.stdout
    logged = [json.loads(line) for line in (tmp_path / "here/run/metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in logged] == [1, 2, 2]  # two steps and the validation, once for both processes
    assert "discriminator" in logged[0]


# ---- containers


def test_the_dockerfile_has_steps_that_there_are():
    """There is no Docker here. What its two RUN lines call is run in CI: setup.sh with extras, install_ffcv.sh."""
    text = (LAUNCH / "Dockerfile").read_text()
    steps = [line.split(maxsplit=1) for line in text.splitlines() if line and not line.startswith("#")]
    assert {name for name, _ in steps} <= {"FROM", "ENV", "WORKDIR", "COPY", "RUN", "CMD"}
    copied = [source for name, rest in steps if name == "COPY" for source in rest.split()[:-1]]
    assert all((REPOSITORY / source).exists() for source in copied)
    assert {"setup.cfg", "requirements.txt", "vqgan_accel", "launch", "configs", "train.py"} <= {*copied}
    setup, ffcv = (shlex.split(rest) for name, rest in steps if name == "RUN")
    extras = configparser.ConfigParser()
    extras.read(REPOSITORY / "setup.cfg")
    assert setup[:3] == ["bash", "launch/setup.sh", ".venv"]
    assert set(setup[3].split(",")) <= extras["options.extras_require"].keys()
    assert ffcv == ["bash", "launch/install_ffcv.sh", ".venv"]
    (command,) = [json.loads(rest) for name, rest in steps if name == "CMD"]
    assert command == ["vqgan-accel", "doctor"]


# ---- until it has finished


def long_run(tmp_path: Path, steps: int) -> Path:
    training = {"max_steps": steps, "log_every": 1, "checkpoint_every": "1000 steps", "validate_every": "1000 steps"}
    save_config(tiny_config(tmp_path, training=training), tmp_path / "tiny.yaml")
    return tmp_path / "run"


def wait_for_steps(run: Path, number: int) -> None:
    end = time.monotonic() + 120
    log = run / "metrics.jsonl"
    while not log.exists() or log.read_text().count("\n") < number:
        assert time.monotonic() < end
        time.sleep(0.1)


def processes_of(words: str) -> list[str]:
    return subprocess.run(["pgrep", "-f", words], capture_output=True, text=True).stdout.split()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
@pytest.mark.parametrize(
    "launcher",
    [
        [str(BIN / "accelerate"), "launch", "--config_file", f"{LAUNCH}/one_gpu.yaml"],
        [str(BIN / "torchrun"), "--standalone", "--nproc_per_node", "2"],
    ],
    ids=["accelerate", "torchrun"],
)
def test_a_training_saves_and_ends_when_its_launcher_does(launcher, number, tmp_path):
    run = long_run(tmp_path, 100_000)
    command = [*launcher, str(REPOSITORY / "train.py"), str(tmp_path / "tiny.yaml"), "training.mixed_precision=no"]
    with (tmp_path / "log").open("w") as log:
        started = subprocess.Popen(command, env=environment(), stdout=log, stderr=log)
    wait_for_steps(run, 3)
    started.send_signal(number)
    started.wait(timeout=60)
    end = time.monotonic() + 60
    while processes_of(str(tmp_path / "tiny.yaml")):
        assert time.monotonic() < end, "the training outlives its launcher"
        time.sleep(0.1)
    found = status(run)
    assert (found.word, found.total) == ("interrupted", 100_000)
    assert found.saved is not None and found.saved >= 3 and "stopped by SIGTERM" in found.reason


def keep_going(run: Path, tmp_path: Path) -> list[str]:
    command = [sys.executable, str(REPOSITORY / "train.py"), str(tmp_path / "tiny.yaml"), "--resume"]
    return ["bash", str(LAUNCH / "keep_going.sh"), str(run), *command]


def test_keep_going_starts_again_what_was_killed_or_asked_to_stop_and_ends_when_it_is_done(tmp_path):
    run = long_run(tmp_path, 60)
    settings = environment(PYTHON=sys.executable, PAUSE="0", PYTHONPATH=str(REPOSITORY))
    started = subprocess.Popen(keep_going(run, tmp_path), env=settings, stdout=subprocess.PIPE, text=True)
    for number, steps in ((signal.SIGUSR1, 3), (signal.SIGKILL, 12)):
        wait_for_steps(run, steps)
        (training, *_) = [p for p in processes_of(f"train.py {tmp_path}/tiny.yaml") if p != str(started.pid)]
        os.kill(int(training), number)
    output, _ = started.communicate(timeout=120)
    assert started.returncode == 0
    words = [line.split(":")[0] for line in output.splitlines() if "saved up to" in line]
    assert words == ["interrupted", "interrupted", "finished"]
    starts = [json.loads(line)["step"] for line in (run / "starts.jsonl").read_text().splitlines()]
    assert len(starts) == 3 and starts[0] == 0 < starts[1] <= starts[2]
    assert status(run).saved == 60


def test_keep_going_gives_up_where_nothing_comes_of_it(tmp_path):
    run = long_run(tmp_path, 60)
    run.mkdir()
    shutil.copy(tmp_path / "tiny.yaml", run / "config.yaml")  # a run that was begun, and never saved
    settings = environment(PYTHON=sys.executable, PAUSE="0", PYTHONPATH=str(REPOSITORY))
    command = ["bash", str(LAUNCH / "keep_going.sh"), str(run), "bash", "-c", f"echo started >> {tmp_path}/starts"]
    done = subprocess.run(command, env=settings, capture_output=True, text=True, timeout=120)
    assert done.returncode == 1 and "giving up" in done.stderr
    assert (tmp_path / "starts").read_text().count("started") == 3


def test_keep_going_passes_sigterm_on_and_ends_with_75(tmp_path):
    run = long_run(tmp_path, 100_000)
    settings = environment(PYTHON=sys.executable, PYTHONPATH=str(REPOSITORY))
    started = subprocess.Popen(keep_going(run, tmp_path), env=settings)
    wait_for_steps(run, 3)
    started.terminate()
    assert started.wait(timeout=60) == EXIT_INTERRUPTED
    assert status(run).word == "interrupted" and "stopped by SIGTERM" in status(run).reason
