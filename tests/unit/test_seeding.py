"""Random numbers by name."""

import subprocess
import sys

from scmini.seeding import derived_seed, numpy_rng, rng


def test_the_same_names_give_the_same_numbers_in_any_process() -> None:
    code = (
        "from scmini.seeding import derived_seed, rng;"
        "print(derived_seed(3, 'a', 'é'), rng(3, 'a').random())"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.split() == [str(derived_seed(3, "a", "é")), str(rng(3, "a").random())]


def test_other_names_give_other_numbers() -> None:
    seeds = [
        derived_seed(*key)
        for key in [(1,), (2,), (1, "a"), (1, "a", "b"), (1, "ab"), (1, "a", "b", "")]
    ]
    assert len(set(seeds)) == len(seeds)
    assert all(0 <= seed < 2**63 for seed in seeds)


def test_generators_are_fresh_each_time() -> None:
    assert numpy_rng(5, "x").random(4).tolist() == numpy_rng(5, "x").random(4).tolist()
    assert numpy_rng(5, "x").random() != numpy_rng(5, "y").random()
