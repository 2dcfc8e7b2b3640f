"""The short form of `benchmarks/fuzz.py`: each reader of foreign files gets some hostile inputs."""

from __future__ import annotations

import pytest
from fuzzing import Range, attack, hostile

INPUTS = 1500  # in all, by the targets' shares; as many seconds as CI can spare


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Range:
    return Range(tmp_path_factory.mktemp("fuzz"))


def test_hostile_inputs_are_read_or_refused_with_the_right_code(place):
    """No traceback, no hang, no flood of memory; and damage is noticed."""
    targets = place.targets
    assert len({target.name for target in targets}) == len(targets)
    whole = sum(target.share for target in targets)
    for target in targets:
        for seed in target.seeds:
            if "diverged" not in target.name:
                target.read(seed)  # so that what is refused is the damage
        outcome = attack(target, range(max(4, round(INPUTS * target.share / whole))))
        assert not outcome.failures, (target.name, *outcome.failures[0])
        noticed = any(what.startswith("refused") for what in outcome.counts)
        assert noticed or outcome.inputs < 20, target.name


def test_an_input_can_be_made_again(place):
    for target in place.targets:
        assert hostile(target, 3) == hostile(target, 3)
        assert len({hostile(target, index) for index in range(20)}) > 10
