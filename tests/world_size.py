"""The runs that test_world_size.py compares: the same training on one process and on several, in one round and in two.

python tests/world_size.py FOLDER writes FOLDER/NAME/ for every case: what the run logged, and one file a rank with
the images and codes of every step, the final networks, and what crossed the wire. FOLDER/NAME~NAME/ holds runs that
went on with another number of processes.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any, NamedTuple

if __name__ == "__main__":  # and not for the tests that read the cases here
    os.environ |= {"OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}

import torch
import torch.distributed as dist
from helpers import TAMING, spread_codebook
from ranks import Rank, run_ranks
from safetensors.torch import save_file
from tiny import DISCRIMINATOR, QUANTIZERS, having, merged, tiny_config, write_images
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from vqgan_accel.config import save_config
from vqgan_accel.models.discriminators import stylegan2
from vqgan_accel.models.quantizers import EMAQuantizer
from vqgan_accel.models.tokenizer import TokenizerOutput
from vqgan_accel.training import loop
from vqgan_accel.training import networks as training_networks
from vqgan_accel.training.networks import Networks
from vqgan_accel.training.setup import Run

STEPS, BATCH, IMAGES = 20, 8, 40  # 5 steps an epoch
R1_EVERY, START = 3, 2  # adversarial steps from step 2 on, R1 on 2, 5, 8, ...
SPECIAL: dict[str, dict[str, Any]] = {
    "standard": {"init": "kmeans"},
    "ema": {"decay": 0.9},
    "entropy": {"reinit_from": "used_codes", "entropy_temperature": 1.0},
    # so many levels that images differ in them: a norm of what is the same everywhere makes rounding large
    "fsq": {"levels": [16, 15, 16]},
    "lfq": {"entropy_temperature": 2.0, "entropy_group": 3},
    "ibq": {"entropy_temperature": 1.0},  # (at 0.01 rounding grows a hundredfold in a step)
}
ADAMW_TOO = ("standard", "ema", "gumbel", "simvq", "ibq")  # those that learn in ways of their own


class Case(NamedTuple):
    quantizer: str
    weight: str  # of the adversarial loss: fixed | adaptive
    optimizer: str  # sgd | adamw
    processes: int
    rounds: int
    architecture: str = "maskgit"
    batch: int = BATCH

    @property
    def name(self) -> str:
        return "-".join(map(str, self))


CASES = [
    *(Case(q, "adaptive", "sgd", processes, 2) for q in QUANTIZERS for processes in (1, 2)),
    *(Case(q, "fixed", "sgd", 1, rounds) for q in ("standard", "ema", "gumbel") for rounds in (1, 2)),
    *(Case(q, "adaptive", "adamw", processes, 1) for q in ADAMW_TOO for processes in (1, 2)),
    *(Case("ema", "adaptive", "sgd", processes, 2, "taming") for processes in (1, 2)),
    *(Case("ema", "adaptive", "sgd", processes, 1, "maskgit", 16) for processes in (1, 4, 8)),
    *(Case("entropy", "adaptive", "sgd", processes, 1, "maskgit", 16) for processes in (1, 4)),
]
# An epsilon as large as gradients are keeps AdamW from making steps of their rounding, and lets clipping show.
ADAMW = {"base_lr": 1e-3, "betas": [0.8, 0.95], "eps": 1e-3, "weight_decay": 5.0, "max_grad_norm": 0.2}
CHANGED_AT = 12  # steps
CHANGES = [
    (Case(q, "adaptive", "adamw", processes, 1), Case(q, "adaptive", "adamw", 3 - processes, 1))
    for q in ("ema", "gumbel")
    for processes in (1, 2)
] + [(Case("ema", "adaptive", "adamw", 4, 1), Case("ema", "adaptive", "adamw", 2, 1))]


def settings(case: Case) -> dict[str, Any]:
    adversarial = {"start": f"{START} steps", "r1_weight": 1.0, "r1_every": R1_EVERY, "weight": 0.8}
    return {
        "data": {"workers": 0},
        **({"autoencoder": TAMING} if case.architecture == "taming" else {}),
        "quantizer": {
            "type": case.quantizer,
            **having(case.quantizer, num_codes=64, reinit_every="2 epochs"),
            **SPECIAL.get(case.quantizer, {}),
        },
        "losses": {"l1_weight": 0, "l2_weight": 1.0},  # L1 has a kink too
        "discriminator": DISCRIMINATOR | adversarial | {"adaptive_weight": case.weight == "adaptive"},
        "training": {
            "max_steps": STEPS,
            "lr_decay": f"{STEPS} steps",
            "total_batch_size": case.batch,
            "gradient_accumulation_steps": case.rounds,
            **(ADAMW if case.optimizer == "adamw" else {"base_lr": 0.02}),
            "lr_scaling": "none",
            "ema_decay": 0.9,
            "log_every": 1,
            "validate_every": "10 steps",
            "checkpoint_every": "100 steps",
        },
    }


def run(case: Case, folder: Path, images: Path, *arguments: str) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    values = merged(settings(case), {"data": {"path": str(images)}})
    save_config(tiny_config(folder, **values), folder / "config.yaml")
    command = [str(folder / "config.yaml"), *arguments]
    outcome = run_ranks(command, lambda me: record(me, case, folder), case.processes)
    assert outcome.codes == [0] * case.processes, f"{case}: {outcome.codes}\n{outcome.output}"
    assert "Grad strides do not match" not in outcome.output, outcome.output  # DDP's, of a copy more a bucket


def record(me: Rank, case: Case, folder: Path) -> None:
    """In a rank's process, before it starts: keep what passes through the loop, and save it at the end."""
    seen: dict[str, list[Tensor]] = {"images": [], "codes": []}  # one entry a step and round
    initial: dict[str, Tensor] = {}
    wire: dict[str, list[int]] = {"tokenizer": [], "discriminator": []}  # bytes of gradients, one entry a step

    def sgd(groups: list[dict[str, Any]], lr: float, **of_adamw: object) -> torch.optim.SGD:
        return torch.optim.SGD([{"params": group["params"]} for group in groups], lr=lr)

    if case.optimizer == "sgd":
        training_networks.AdamW = sgd  # type: ignore[assignment, misc]
    stylegan2.leaky_relu = smooth_leaky_relu

    def watch(run: Run) -> None:
        if run.progress.step == 0:  # codes as far apart as latents: no ties that rounding decides
            spread_codebook(run.networks.tokenizer.network.quantizer)
        initial.update({name: value.clone() for name, value in network_tensors(run.networks).items()})
        assert run.accelerator.num_processes == case.processes == (dist.get_world_size() if case.processes > 1 else 1)
        for learner in run.networks.learners:
            assert isinstance(learner.wrapped, DistributedDataParallel) == (case.processes > 1)
            if isinstance(learner.wrapped, DistributedDataParallel):
                learner.wrapped.register_comm_hook(wire[learner.name], count_bytes)
        run.networks.tokenizer.wrapped.register_forward_hook(keep)

    def keep(module: nn.Module, inputs: Any, output: TokenizerOutput) -> None:
        seen["images"].append(inputs[0].clone())
        seen["codes"].append(output.quantizer.codes)

    def count_steps() -> None:
        for counts in wire.values():
            counts.extend([0] * (len(seen["images"]) // case.rounds - len(counts)))  # steps without a reduction

    def finish(run: Run) -> None:
        networks = run.networks
        assert networks.average is not None
        tensors = {name: torch.stack(values) for name, values in seen.items()} | network_tensors(networks)
        tensors |= {f"initial.{name}": value for name, value in initial.items()}
        tensors |= {f"average.{name}": value for name, value in networks.average.tokenizer.state_dict().items()}
        if isinstance(networks.tokenizer.network.quantizer, EMAQuantizer):
            tensors["codebook"] = networks.tokenizer.network.quantizer.codebook_vectors()
        tensors["usage"] = run.usage.counts
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / f"{me.rank}.safetensors")
        sizes = {
            learner.name: sum(4 * parameter.numel() for parameter in learner.network.parameters())
            for learner in networks.learners
        }
        (folder / f"{me.rank}.json").write_text(json.dumps({"wire": wire, "sizes": sizes}))

    original_step, original_save = loop.take_step, loop.save

    def take_step(run: Run, *arguments: Any) -> Any:
        if not initial:
            watch(run)
        taken = original_step(run, *arguments)
        count_steps()
        return taken

    def save(run: Run, extra: int = 0) -> None:
        original_save(run, extra)
        if run.progress.step == STEPS:
            finish(run)

    loop.take_step, loop.save = take_step, save


def network_tensors(networks: Networks) -> dict[str, Tensor]:
    return {
        f"{learner.name}.{key}": value
        for learner in networks.learners
        for key, value in learner.network.state_dict().items()
    }


def smooth_leaky_relu(x: Tensor) -> Tensor:
    """Slopes 0.2 and 1 without the kink between them, at which rounding decides: of a million activations one does
    come so near to zero that its sign differs from one process to two, and its gradient is then another."""
    return 0.6 * x + 0.4 * (x.square() + 1e-2).sqrt()


def count_bytes(counts, bucket):  # no annotations: DDP compares them with its own types, and here they are strings
    """DDP's own mean of a dist.GradBucket, as a future, and how many bytes of it crossed the wire in this step."""
    gradient = bucket.buffer()
    if bucket.index() == 0:
        counts.append(0)
    counts[-1] += gradient.numel() * gradient.element_size()
    gradient /= dist.get_world_size()
    work = dist.all_reduce(gradient, async_op=True)
    return work.get_future().then(lambda done: done.value()[0])


def run_three(folder: Path, images: Path) -> None:
    """Three processes, in one go and with an interruption. A sum of two parts is the same in either order; one of three
    is not, so here it shows whether a resumed run adds in the same order."""
    case = Case("ema", "adaptive", "adamw", 3, 2)
    parts: dict[str, list[list[str]]] = {"whole": [[]], "broken": [["training.max_steps=5"], ["--resume"]]}
    for name, starts in parts.items():
        place = folder / f"three-{name}"
        place.mkdir()
        values = merged(settings(case), {"data": {"path": str(images)}, "training": {"total_batch_size": 12}})
        save_config(tiny_config(place, **values), place / "config.yaml")
        for arguments in starts:
            outcome = run_ranks([str(place / "config.yaml"), *arguments], None, case.processes)
            assert outcome.codes == [0] * 3 and "processes          3" in outcome.output, outcome.output


def main(folder: Path) -> None:
    images = folder / "images"
    write_images(images / "train", IMAGES)
    write_images(images / "validation", 5, seed=1)
    for case in CASES:
        run(case, folder / case.name, images)
    for before, after in CHANGES:  # in the middle of the third epoch
        place = folder / f"{before.name}~{after.name}"
        run(before, place, images, f"training.max_steps={CHANGED_AT}")
        run(after, place, images, "--resume")
    run_three(folder, images)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
