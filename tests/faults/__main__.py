"""Inject faults into real training runs and see what survives.

python tests/faults [--many N] [--seed S]

Each injection starts a run of 12 steps on two processes and breaks something; then all ranks must have ended within a
minute, with the statuses and the sentence that the fault calls for, and every checkpoint on disk must be intact. The
next start resumes, from the newest intact checkpoint, and must end with the bits of a run that nobody disturbed:
networks, optimizers, codebook, progress and metrics.jsonl. Prints a table; the exit status is 1 if any did not survive.
"""

from __future__ import annotations

import argparse
import os
import random
import re
import shutil
import signal
import sys
import tempfile
from pathlib import Path

os.environ |= {"OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
sys.path.insert(0, str(Path(__file__).parent.parent))

import torch.utils.tensorboard  # noqa: F401  here and not in every rank
from catalogue import BATCH, IMAGES, SEED, STEPS, Fault, faults
from ranks import Outcome, run_ranks
from runs import assert_same_bits, metrics, tensors
from tiny import DISCRIMINATOR, QUANTIZERS, having, tiny_config, write_images

from vqgan_accel.config import save_config
from vqgan_accel.run_folder import checkpoints
from vqgan_accel.training import loop  # noqa: F401  here and not in every rank
from vqgan_accel.training.checkpoint import damage

SAVE_EVERY = 3  # steps, beside the saves of the best
SPECIAL = {"entropy": {"reinit_from": "used_codes"}}


def write_run(folder: Path, quantizer: str) -> Path:
    """A config and its images; returns the config's path."""
    write_images(folder / "images" / "train", IMAGES)
    write_images(folder / "images" / "validation", 3, seed=1)
    config = tiny_config(
        folder,
        seed=SEED,
        data={"path": str(folder / "images"), "workers": 1},
        quantizer={"type": quantizer, **having(quantizer, reinit_every="1 epoch"), **SPECIAL.get(quantizer, {})},
        discriminator=DISCRIMINATOR | {"adaptive_weight": True, "r1_weight": 1.0, "r1_every": 2, "start": "1 step"},
        training={
            "max_steps": STEPS,
            "total_batch_size": BATCH,
            "base_lr": 1e-3,
            "ema_decay": 0.5,
            "max_grad_norm": 1.0,
            "log_every": 1,
            "validate_every": "4 steps",
            "checkpoint_every": f"{SAVE_EVERY} steps",
            "keep_checkpoints": 2,
        },
    )
    save_config(config, folder / "config.yaml")
    return folder / "config.yaml"


def survive(fault: Fault, quantizer: str, folder: Path, undisturbed: Path, rng: random.Random) -> None:
    """AssertionError says what went wrong."""
    run = folder / "run"
    arguments = [str(write_run(folder, quantizer)), *fault.overrides]
    outcome = run_ranks(arguments, lambda me: fault.arm(me, run))
    check(not outcome.hung, f"after {outcome.seconds:.0f} s some rank had not ended", outcome)
    as_meant = [code in allowed for code, allowed in zip(outcome.codes, fault.codes, strict=True)]
    check(all(as_meant), f"exit statuses {outcome.codes}, not {fault.codes}", outcome)
    check(re.search(fault.says, outcome.output) is not None, f"'{fault.says}' was not said", outcome)
    if -signal.SIGKILL not in outcome.codes:  # a killed rank's data workers say how they miss it
        # torch tells of a dead data worker from a signal handler, which Python may run inside a callback
        shown = re.sub(r"Exception ignored in: .*\nTraceback", "", outcome.output)
        check("Traceback" not in shown, "a traceback was shown", outcome)
    for checkpoint in checkpoints(run):
        check(damage(checkpoint) is None, f"{checkpoint.name} is damaged", outcome)
    for link in (run / "checkpoints").glob("[lb]*"):
        check(link.is_dir(), f"{link.name} leads nowhere", outcome)

    logged = steps_logged(run)
    saved = int(checkpoints(run)[-1].name.removeprefix("step_")) if checkpoints(run) else 0
    due = max(0, logged - 1) // SAVE_EVERY * SAVE_EVERY  # the save of the last logged step may not have come to its end
    check(saved >= due, f"step {logged} was logged and the newest checkpoint is of step {saved}", outcome)

    said = fault.repair(run, rng)
    intact = [checkpoint.name for checkpoint in checkpoints(run) if damage(checkpoint) is None]
    outcome = run_ranks([*arguments, "--resume"])
    check(outcome.codes == [0] * len(outcome.codes), f"the resumed run ended with {outcome.codes}", outcome)
    check(said in outcome.output, f"'{said}' was not said", outcome)
    if intact:
        check(f"resuming from {intact[-1]}" in outcome.output, f"not resumed from {intact[-1]}", outcome)
    hidden = [path.name for path in run.rglob(".*") if path.name != ".lock"]
    check(not hidden or (len(intact) and intact[-1] == f"step_{STEPS:08}"), f"{hidden} are left over", outcome)
    if fault.same_result:
        assert_same_bits(undisturbed / "checkpoints" / "latest", run / "checkpoints" / "latest")
        assert metrics(run) == metrics(undisturbed), "metrics.jsonl differs"
        same_best = os.readlink(run / "checkpoints" / "best") == os.readlink(undisturbed / "checkpoints" / "best")
        assert same_best, "`best` differs"
    else:
        assert all(tensor.isfinite().all() for tensor in tensors(run / "checkpoints" / "latest").values())
        steps = [line["step"] for line in metrics(run) if "total" in line]
        assert steps == list(range(1, STEPS + 1)), f"metrics.jsonl has the steps {steps}"


def steps_logged(run: Path) -> int:
    """The last step in metrics.jsonl, whose last line may be half-written."""
    file = run / "metrics.jsonl"
    found = re.findall(r'^{"step": (\d+), "total"', file.read_text() if file.exists() else "", re.MULTILINE)
    return int(found[-1]) if found else 0


def check(condition: bool, complaint: str, outcome: Outcome) -> None:
    assert condition, f"{complaint}\n{outcome.output}"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--many", type=int, default=48, metavar="N", help="injections (default 48; 19 kinds in turn)")
    parser.add_argument("--seed", type=int, default=0, help="of the points (default 0)")
    options = parser.parse_args()
    failures = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        print(f"{'quantizer':<10}{'injected':<42}{'point':<48}survived", flush=True)
        for index, fault in enumerate(faults(options.many, options.seed)):
            rng = random.Random(f"{options.seed}/{index}/rest")
            quantizer = rng.choice(list(QUANTIZERS))
            if not (folder / quantizer).exists():
                outcome = run_ranks([str(write_run(folder / quantizer, quantizer))])
                check(outcome.codes == [0, 0] and "processes          2" in outcome.output, "no reference run", outcome)
            survived = "yes"
            try:
                survive(fault, quantizer, folder / "run", folder / quantizer / "run", rng)
            except (AssertionError, OSError, ValueError) as error:
                survived = "no"
                failures.append(f"injection {index}, {quantizer}, {fault.kind}, {fault.point}: {error}")
            print(f"{quantizer:<10}{fault.kind:<42}{fault.point:<48}{survived}", flush=True)
            shutil.rmtree(folder / "run")
    print(f"{options.many - len(failures)} of {options.many} survived")
    print("\n\n".join(failures))
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
