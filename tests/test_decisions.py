"""What `vqgan-accel new` decides, from facts alone: no images, no devices."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from omegaconf import OmegaConf

from vqgan_accel.commented_yaml import commented_yaml, quoted, scalar
from vqgan_accel.config import Config, parse_config, validated
from vqgan_accel.data.division import place_of
from vqgan_accel.decisions import (
    ALIKE,
    Cost,
    Machine,
    Pictures,
    batches,
    choose_lengths,
    choose_levels,
    choose_networks,
    cost_of,
    division_of,
    largest_size,
    processes,
    rounded,
    run_seconds,
)
from vqgan_accel.new import recipe_values, settled
from vqgan_accel.training.measure import Timings
from vqgan_accel.training.plan import make_plan

CPU = Machine([], False, cores=2, memory=2**34)
ONE = Machine(["small GPU"], True, cores=12, memory=2**36)
EIGHT = Machine(["large GPU"] * 8, True, cores=64, memory=2**40)
COST = Cost(plain=0.5, adversarial=1.0, validation=10.0)


def pictures(training: int = 10_000, short_side: int = 300) -> Pictures:
    return Pictures(training, 100, [short_side] * 50, broken=0, looked_at=50)


def config_for(machine: Machine, seen: Pictures, *overrides: str) -> Config:
    """As far as it is settled before anything is timed."""
    fixed = {override.split("=")[0] for override in overrides}
    config = parse_config(recipe_values(machine, "pictures", "runs/x", fixed), overrides)
    config = settled(config, choose_networks(config, machine, seen), fixed)
    return settled(config, choose_levels(config), fixed)


# ---- sizes


@pytest.mark.parametrize(
    ("machine", "short_side", "size", "levels"),
    [
        (CPU, 20, 32, [1]),
        (CPU, 40, 32, [1]),
        (CPU, 3000, 64, [1, 2]),
        (ONE, 64, 64, [1, 2]),
        (ONE, 255, 128, [1, 2, 4]),
        (EIGHT, 256, 256, [1, 2, 4, 8]),
    ],
)
def test_the_size_is_what_the_pictures_reach_and_the_grid_is_16_by_16(machine, short_side, size, levels):
    config = config_for(machine, pictures(short_side=short_side))
    assert config.data.image_size == size and list(config.autoencoder.channel_multipliers) == levels
    assert size // config.autoencoder.stride == 16
    assert choose_networks(config, machine, pictures(short_side=short_side))["data.image_size"].value == size


def test_four_of_five_images_must_reach_the_size():
    assert largest_size([300] * 8 + [10] * 2, 256) == (256, 0.8)
    assert largest_size([300] * 7 + [100] * 3, 256) == (64, 1.0)
    assert largest_size([8] * 5, 256) == (32, 0.0)


def test_what_is_given_stays_and_what_depends_on_it_follows():
    config = config_for(ONE, pictures(), "data.image_size=128", "training.base_lr=3e-4")
    assert config.data.image_size == 128 and config.training.base_lr == 3e-4
    assert config.autoencoder.stride == 8
    without = config_for(CPU, pictures(), "discriminator=null", "quantizer.type=gumbel", "autoencoder.type=taming")
    assert without.discriminator is None and without.data.image_size // without.autoencoder.stride >= 16
    made = settled(without, choose_lengths(without, CPU, pictures(), COST, given=False), set())
    assert made.discriminator is None and make_plan(made, 10_000, 1).discriminator_start is None


def test_precision_and_rate_follow_the_device():
    cpu, gpu = config_for(CPU, pictures()), config_for(ONE, pictures())
    old = config_for(ONE._replace(bf16=False), pictures())
    assert (cpu.training.mixed_precision, cpu.training.base_lr) == ("no", 1e-3)
    assert (gpu.training.mixed_precision, gpu.training.base_lr) == ("bf16", 1e-4)
    assert old.training.mixed_precision == "no"
    assert cpu.losses.perceptual_network == "mobilenet_v2" and gpu.losses.perceptual_network == "lpips_vgg"


# ---- the batch


@pytest.mark.parametrize(
    ("machine", "training", "largest"),
    [(CPU, 10_000, 8), (CPU, 7, 4), (CPU, 3, 3), (CPU, 1, 1), (ONE, 10_000, 64), (ONE, 50, 48), (EIGHT, 10**6, 256)],
)
def test_batches_begin_with_the_largest_and_every_one_can_be_trained(machine, training, largest):
    seen = pictures(training)
    config, number = config_for(machine, seen), processes(machine, seen)
    tried = []
    for choices in batches(config, machine, seen):
        batch = settled(config, choices, set())
        make_plan(batch, training, number)  # refuses what cannot be split
        tried.append(batch.training.total_batch_size)
    assert tried == sorted(set(tried), reverse=True) and tried[0] == largest


@pytest.mark.seconds
@settings(max_examples=40)
@given(
    st.integers(1, 5000), st.integers(0, 8), st.integers(1, 3), st.integers(1, 8), st.booleans(), st.floats(1e-4, 100.0)
)
def test_whatever_the_numbers_the_plan_holds(training, gpus, rounds, group, given_length, seconds):
    seen, machine = pictures(training), Machine(["GPU"] * gpus, bool(gpus), cores=3, memory=2**33)
    number = processes(machine, seen)
    overrides = [f"training.gradient_accumulation_steps={rounds}", f"discriminator.minibatch_stddev_group={group}"]
    overrides += ["training.total_batch_size=24"]  # which fits every recipe and every number of rounds, for now
    try:
        config = config_for(machine, seen, *overrides, *(["training.max_epochs=2.5"] if given_length else []))
    except ValueError:  # a group that does not divide 24 / rounds: told before anything is decided
        return
    cost = Cost(seconds, 2 * seconds, 3 * seconds)
    for choices in batches(config, machine, seen):
        if training < choices["training.total_batch_size"].value:
            assert training < number * rounds  # one image for each of them is the least there is
            continue
        made = settled(config, choices, set())
        made = settled(made, choose_lengths(made, machine, seen, cost, given_length), set())
        plan = make_plan(made, training, number)
        assert 1 <= plan.validate_every <= plan.total_steps and plan.discriminator_start is not None
        assert plan.discriminator_start < plan.total_steps
        assert run_seconds(plan, cost) >= plan.total_steps * cost.plain


# ---- the length


def test_a_cpu_gets_about_an_hour_and_a_gpu_its_epochs_within_bounds():
    seen = pictures(10_000)
    config = settled(config_for(CPU, seen), batches(config_for(CPU, seen), CPU, seen)[0], set())
    for cost in (COST, Cost(0.02, 0.05, 1.0), Cost(0.1, 2.0, 20.0)):
        plan = make_plan(settled(config, choose_lengths(config, CPU, seen, cost, given=False), set()), 10_000, 1)
        assert 0.8 * 3600 < run_seconds(plan, cost) <= 3600 + cost.validation
        validating = plan.total_steps / plan.validate_every * cost.validation
        assert validating <= 0.11 * plan.total_steps * cost.plain
    slow = choose_lengths(config, CPU, seen, Cost(60.0, 90.0, 1.0), given=False)
    assert slow["training.max_steps"].value == 300
    few = pictures(80)
    assert choose_lengths(config, CPU, few, Cost(1e-3, 1e-3, 0.1), given=False)["training.max_steps"].value == 1500
    for images, steps in ((1_000, 20_000), (30_000, 70_200), (10**7, 300_000)):
        seen = pictures(images)
        made = settled(config_for(ONE, seen), batches(config_for(ONE, seen), ONE, seen)[0], set())
        lengths = choose_lengths(made, ONE, seen, COST, given=False)
        assert lengths["training.max_steps"].value == steps
        assert lengths["discriminator.start"].value == f"{min(steps // 3, 20_000)} steps"


def test_the_slower_of_computing_and_loading_counts_and_r1_on_average():
    config = settled(config_for(CPU, pictures()), batches(config_for(CPU, pictures()), CPU, pictures())[0], set())
    timings = Timings(plain=1.0, adversarial=2.0, with_r1=2.0 + 16 * 0.5, forward=0.1, memory=0.0)
    assert cost_of(config, timings, view=0.01, validation_images=50, num_processes=1) == (1.0, 2.5, 5.0)
    assert cost_of(config, timings, view=1.0, validation_images=50, num_processes=1) == (8.0, 8.0, 50.0)
    alone = parse_config(config.model_dump(mode="json"), ["data.workers=0"])
    assert cost_of(alone, timings, view=1.0, validation_images=50, num_processes=1) == (9.0, 10.5, 55.0)
    assert cost_of(config, timings, view=0.0, validation_images=50, num_processes=2).validation == 2.5


@given(st.floats(0, 1e7))
def test_rounded_numbers_have_two_digits_and_are_no_larger(number):
    assert 1 <= rounded(number) <= max(1, number)
    assert len(str(rounded(number)).rstrip("0")) <= 2
    assert number < 1 or rounded(number) > 0.9 * number - 1


# ---- the division


def test_a_division_has_enough_images_and_is_the_smallest_that_has():
    names = [f"{folder}/{number}.png" for folder in "abcdefg" for number in range(100)]
    by_file = division_of(names, alikeness=1.0)
    assert (by_file.fraction, by_file.group) == (0.1, "file")  # of 0.05 there would be 35
    by_folder = division_of(names, alikeness=ALIKE - 0.01)
    assert by_folder.group == "folder"
    cut = {name[0] for name in names if place_of(name, "folder") < by_folder.fraction}
    assert 1 <= len(cut) <= 3
    assert division_of(names, None).group == "file"
    assert division_of([f"one/{number}.png" for number in range(100)], 0.1).group == "file"  # or one side were empty


@given(st.integers(2, 300), st.sampled_from([None, 0.1, 1.0]))
def test_a_division_leaves_both_sides_some_images(number, alikeness):
    names = [f"{index % 7}/{index}.png" for index in range(number)]
    division = division_of(names, alikeness)
    if division is None:
        assert number < 20
        return
    chosen = sum(place_of(name, division.group) < division.fraction for name in names)
    assert max(1, min(40, number // 15)) <= chosen <= max(1, number // 2)


# ---- the file


odd = st.text(st.characters(codec="utf-8"), min_size=1, max_size=12) | st.sampled_from(
    ["${x}", "\\${x}", "a\\\\${b", "no", "1e3", "null", "~", "2024-01-01", "a: b", "- a", "#x", "a #b", '"', "'", " x ",
     "\u2028", "\x7f", "\ufeff", "x\ny", "😀", "[a]", "{a: 1}", "*a", "&a", "!!int 3", "12 steps", "0x1F", ".inf", "@"]
)  # fmt: skip


@pytest.mark.seconds
@given(odd, odd, st.sampled_from([None, 1e-05, 0.1, 0.30000000000000004, 1e-300]), st.booleans(), odd)
def test_a_written_config_loads_to_the_very_same(path, output_dir, fraction, adversarial, comment):
    values = {
        "output_dir": output_dir,
        "data": {"path": path, "train_split": path, "validation_fraction": fraction, "crop_scale": None},
        "quantizer": {"type": "ema", "num_codes": 7, "reinit_every": "1 epoch"},
        "discriminator": {"weight": fraction or 0.0} if adversarial else None,
        "training": {"max_steps": 3, "mixed_precision": "no", "total_batch_size": 8, "lr_warmup": "2 steps"},
    }
    config = validated(values, "test")
    reason = quoted(comment)
    text = commented_yaml(config, {"data.path": reason, "training.base_lr": reason * 9, "data.workers": "default"})
    assert parse_config(OmegaConf.create(text)) == config
    assert "workers: 4  # default" in text and "shuffle_buffer" not in text


@given(st.lists(st.one_of(st.none(), st.booleans(), st.integers(), st.floats(allow_nan=False), odd), max_size=4))
def test_values_are_read_back_as_they_were(values):
    values = [value for value in values if value not in (float("inf"), float("-inf"))]
    read = OmegaConf.to_container(OmegaConf.create(f"values: {scalar(values)}"), resolve=True)["values"]
    assert read == values and list(map(type, read)) == list(map(type, values))
