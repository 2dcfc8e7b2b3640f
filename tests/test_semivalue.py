"""Semivalues against the definition, the axioms they have, and shapiq's exact values."""

from dataclasses import replace
from math import comb

import games
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import TypeAdapter, ValidationError
from test_estimators import observe, table

from attr_batch.coalition import Coalition
from attr_batch.errors import IncompleteDesign, SpecError
from attr_batch.estimators import Estimator, Exact, GaussianProcess, Observation
from attr_batch.estimators.observations import gather
from attr_batch.estimators.semivalue import exact, mixture, size_weights

KINDS = ("shapley", "banzhaf", "leave_one_out")


def by_definition(v, n, semivalue):
    """Mean gain over the coalitions of the others, each with its probability; v[mask]."""
    weight = {
        "shapley": lambda s: 1 / (n * comb(n - 1, s)),
        "banzhaf": lambda _: 2.0 ** (1 - n),
        "leave_one_out": lambda s: float(s == n - 1),
    }[semivalue]
    phi = np.zeros(n)
    for mask in range(1 << n):
        for i in range(n):
            if not mask >> i & 1:
                phi[i] += weight(mask.bit_count()) * (v[mask | 1 << i] - v[mask])
    return phi


def solve(v, n, semivalue):
    return np.array(Exact(semivalue=semivalue).estimate(table(v, n), n).values)


tables = st.tuples(st.integers(2, 5), st.integers(0, 2**32 - 1)).map(
    lambda case: (case[0], np.random.default_rng(case[1]).normal(size=(2, 1 << case[0])))
)


@pytest.mark.parametrize("semivalue", KINDS)
@given(tables)
@settings(max_examples=20, deadline=None)
def test_the_axioms(semivalue, case):
    n, (u, v) = case
    masks = np.arange(1 << n)
    phi = solve(u, n, semivalue)
    np.testing.assert_allclose(phi, by_definition(u, n, semivalue), atol=1e-10)
    np.testing.assert_allclose(
        solve(2 * u - 3 * v, n, semivalue), 2 * phi - 3 * solve(v, n, semivalue), atol=1e-9
    )
    assert abs(solve(u[masks & ~1], n, semivalue)[0]) < 1e-10  # player 0 changes nothing
    swapped = (masks & ~3) | (masks & 1) << 1 | (masks >> 1 & 1)  # players 0 and 1 are alike
    alike = solve(u + u[swapped], n, semivalue)
    assert abs(alike[0] - alike[1]) < 1e-10
    dummy = solve(v[masks & ~1] + 7 * (masks & 1), n, semivalue)  # adds 7 to whatever
    assert dummy[0] == pytest.approx(7)


@pytest.mark.parametrize("n", [2, 4, 6])
def test_exact_values_are_those_of_shapiq(n):
    import shapiq  # here: it takes seconds

    v = np.random.default_rng(n).normal(size=1 << n)
    place = 1 << np.arange(n)
    computer = shapiq.ExactComputer(lambda Z: v[np.atleast_2d(Z).astype(int) @ place], n)
    for semivalue, index in (("shapley", "SV"), ("banzhaf", "BV")):
        theirs = computer(index).get_n_order_values(1)
        np.testing.assert_allclose(solve(v, n, semivalue), theirs, atol=1e-10)


@pytest.mark.parametrize("semivalue", KINDS)
@pytest.mark.parametrize("n", [2, 3, 9, 64])
def test_the_mixture_has_the_sizes_of_the_semivalue(semivalue, n):
    q, w = mixture(semivalue, n)
    p = [w @ (comb(n - 1, s) * q**s * (1 - q) ** (n - 1 - s)) for s in range(n)]
    np.testing.assert_allclose(p, size_weights(semivalue, n), atol=1e-12)


def test_leave_one_out_asks_for_n_coalitions_whatever_n():
    n, one = 40, Exact(semivalue="leave_one_out", endpoint_replicates=2)
    plan = one.plan(n)
    assert [e.coalition.size for e in plan] == [0, n, 0, n, *[n - 1] * n]
    found = one.estimate(observe(plan, games.linear(n)), n)
    np.testing.assert_allclose(found.values, games.linear(n).shapley(), atol=1e-9)
    with pytest.raises(IncompleteDesign, match="39 of the 40"):
        one.estimate(observe(plan[:-1], games.linear(n)), n)
    with pytest.raises(SpecError, match="2\\^40"):
        Exact(semivalue="banzhaf").plan(n)


def test_the_interval_of_leave_one_out_holds_its_noise():
    inside = []
    for seed in range(60):
        one = Exact(semivalue="leave_one_out", endpoint_replicates=8)
        found = one.estimate(observe(one.plan(6), games.linear(6), 0.2, seed), 6)
        assert found.interval.method == "replicates-t"
        assert not found.interval.reliable  # only the endpoints were repeated
        assert found.low is not None
        assert found.high is not None
        truth = games.linear(6).shapley()
        inside += [a < x < b for a, x, b in zip(found.low, truth, found.high, strict=True)]
    assert 0.9 < np.mean(inside) < 0.99


@pytest.mark.parametrize("semivalue", KINDS)
def test_the_variance_is_that_of_the_weights(semivalue):
    n, draws = 4, 4000
    game = table(np.arange(16.0), n)
    rows = gather([*game, replace(game[9], replicate=1)], n).rows
    found = exact(rows, semivalue)
    assert found is not None
    rng = np.random.default_rng(0)
    noise = rng.normal(size=(draws, len(rows.v))) / np.sqrt(rows.replicates)
    sample = []
    for e in noise:
        again = exact(replace(rows, v=rows.v + e), semivalue)
        assert again is not None
        sample.append(again[0])
    np.testing.assert_allclose(np.var(sample, axis=0), found[1], rtol=0.12)


def test_what_does_not_share_the_gain_out_has_no_shares():
    v = np.minimum(np.bitwise_count(np.arange(16)), 2.0)
    banzhaf = Exact(semivalue="banzhaf").estimate(table(v, 4), 4)
    assert banzhaf.values == pytest.approx([0.5] * 4)
    assert banzhaf.efficiency_gap == pytest.approx(4 * 0.5 - 2)
    assert banzhaf.shares is None
    assert Exact().estimate(table(v, 4), 4).shares == pytest.approx([0.25] * 4)
    body = banzhaf.to_json("abcd", [1] * 4, [""] * 4)
    assert body["semivalue"] == "banzhaf"
    assert {c["share"] for c in body["contributors"]} == {None}


@pytest.mark.parametrize("semivalue", ["banzhaf", "leave_one_out"])
@pytest.mark.parametrize("kind", ["reference", "paired_ls", "ridge", "permutation"])
def test_who_reads_a_semivalue_is_said(kind, semivalue):
    adapter = TypeAdapter(Estimator)
    with pytest.raises(ValidationError, match=f"exact and gp read {semivalue}"):
        adapter.validate_python({"kind": kind, "semivalue": semivalue})
    assert adapter.validate_python({"kind": kind, "semivalue": "shapley"}).kind == kind
    assert adapter.validate_python({"kind": "gp", "semivalue": semivalue}).semivalue == semivalue
    with pytest.raises(ValidationError, match="'shapley'"):
        adapter.validate_python({"kind": kind, "semivalue": "magic"})


@pytest.mark.parametrize("semivalue", ["banzhaf", "leave_one_out"])
def test_least_squares_say_nothing_of_other_semivalues(semivalue):
    one = GaussianProcess(budget=60, semivalue=semivalue)
    found = one.estimate(observe(one.plan(10), games.coverage(10, 1), 0.02), 10)
    assert found.ls_values is None or semivalue == "leave_one_out"
    assert found.interval.method == "gp-posterior"


def test_a_dummy_is_a_dummy_to_every_semivalue_of_the_process():
    """Additive games are read alike by all three."""
    n, game = 8, games.linear(8, 3)
    for semivalue in KINDS:
        one = GaussianProcess(budget=60, semivalue=semivalue, holdout=0)
        found = one.estimate(observe(one.plan(n), game), n)
        np.testing.assert_allclose(found.values, game.shapley(), atol=2e-3)


def test_relabelling_permutes_every_semivalue():
    n = 4
    order = np.random.default_rng(0).permutation(n)
    v = np.random.default_rng(1).normal(size=1 << n)
    moved = [
        Observation(Coalition.of([int(order[i]) for i in o.coalition.members], n), o.value, o.role)
        for o in table(v, n)
    ]
    for semivalue in KINDS:
        again = np.array(Exact(semivalue=semivalue).estimate(moved, n).values)
        np.testing.assert_allclose(again[order], solve(v, n, semivalue), atol=1e-12)
