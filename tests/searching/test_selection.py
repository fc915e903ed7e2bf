"""Which candidates stay: against audits whose truth is simulated, and by loops."""

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lightning_cwrf.auditing.recipe_result import Difference
from lightning_cwrf.auditing.values import Estimate
from lightning_cwrf.metrics import Interval
from lightning_cwrf.searching.selection import Standing, best, front_of, ranked, ruled_out
from tests.auditing.test_recipe_audit import run, simulated

FLOOR, MEASURE, ERROR = 0.02, "lira/auroc", 0.01


class Known:
    """An audit whose differences are those of its values, give or take ERROR."""

    remarks = ()

    def __init__(self, accuracy, leak):
        self.found = {"test_accuracy": accuracy, MEASURE: leak}

    def estimate(self, measure):
        value = self.found[measure]
        return Estimate(value, Interval(value - ERROR, value + ERROR))

    def minus(self, other, measure):
        value = self.found[measure] - other.found[measure]
        return Difference(value, Interval(value - ERROR, value + ERROR), 0.5)


BASE = Known(0.9, 0.8)


def standing(accuracy, leak, rewinds=False):
    return Standing.of(Known(accuracy, leak), BASE, FLOOR, MEASURE, rewinds=rewinds)


shares = st.integers(0, 40).map(lambda i: 0.5 + i / 100)
candidates = st.lists(st.tuples(shares, shares, st.booleans()), min_size=1, max_size=12).map(
    lambda drawn: {f"c{i}": standing(*each) for i, each in enumerate(drawn)}
)


@given(candidates)
def test_the_best_of_each_kind_is_never_ruled_out(standings):
    out = ruled_out(standings, FLOOR)
    for rewinds in (True, False):
        kind = {name: each for name, each in standings.items() if each.rewinds == rewinds}
        if kind:
            within = [each.leak.value for each in kind.values() if each.accuracy_change.value >= -FLOOR]
            chosen = kind[best(standings, rewinds=rewinds)]
            assert (
                chosen.leak.value == min(within)
                if within
                else chosen.accuracy == max(e.accuracy for e in kind.values())
            )
            assert best(standings, rewinds=rewinds) not in out


@given(candidates)
def test_what_is_ruled_out_is_below_the_floor_or_clearly_worse_than_another_or_the_base(standings):
    for name in ruled_out(standings, FLOOR):
        each = standings[name]
        below = each.accuracy - 0.9 + ERROR < -FLOOR
        worse = any(
            (other.accuracy >= each.accuracy and other.leak.value + ERROR < each.leak.value)
            or (other.leak.value <= each.leak.value and other.accuracy > each.accuracy + ERROR)
            for other in standings.values()
        )
        assert below or worse or each.leak.value - ERROR > 0.8


@given(candidates)
def test_the_front_has_those_that_no_other_equals_or_exceeds(standings):
    points = {name: (each.accuracy, -each.leak.value) for name, each in standings.items()}
    expected = {
        a for a, p in points.items() if not any(q[0] >= p[0] and q[1] >= p[1] and q != p for q in points.values())
    }
    assert set(front_of(standings)) == expected


@given(candidates)
def test_ranks_begin_with_the_best_of_each_kind_and_go_by_fronts(standings):
    order = ranked(standings)
    assert sorted(order) == sorted(standings)
    firsts = [n for n in (best(standings, rewinds=r) for r in (True, False)) if n is not None]
    assert set(order[: len(firsts)]) == set(firsts)
    rest = order[len(firsts) :]
    for earlier, later in itertools.pairwise(rest):
        a, b = standings[earlier], standings[later]
        assert not (b.accuracy >= a.accuracy and b.leak.value < a.leak.value)
        assert not (b.accuracy > a.accuracy and b.leak.value <= a.leak.value)


def test_models_that_guess_are_never_the_best_however_low_the_floor():
    guessing, fine = standing(0.1, 0.5), standing(0.85, 0.7)
    guessing = Standing.of(guessing.audit, BASE, 1.0, MEASURE, rewinds=False)
    fine = Standing.of(fine.audit, BASE, 1.0, MEASURE, rewinds=False)
    assert best({"guessing": guessing, "fine": fine}) == "guessing"
    guessing.audit.remarks = ["model 0 does no better than guessing"]
    told = {"guessing": Standing.of(guessing.audit, BASE, 1.0, MEASURE, rewinds=False), "fine": fine}
    assert best(told) == "fine"
    assert ruled_out(told, 1.0) == {"guessing": "model 0 does no better than guessing"}


@pytest.mark.slow
def test_a_recipe_that_leaks_more_is_ruled_out_and_equal_ones_stay():
    """Models of one pool and membership, so that they are compared in pairs."""
    audits = {"safe": run(simulated(leak=0.5)), "leaky": run(simulated(leak=4.0)), "same": run(simulated(leak=0.5))}
    base = run(simulated(leak=6.0))
    standings = {n: Standing.of(a, base, 0.5, MEASURE, rewinds=False) for n, a in audits.items()}
    assert set(ruled_out(standings, 0.5)) == {"leaky"}
