"""What a validation says, in words: the verdict on the headline method, and the reservations.

The first method of a property is its headline, the first oracle set the one that methods are
ranked on. Nothing is computed here but comparisons: every figure stands in `validation.json`
(`evidence.Validation`). The text is plain; whoever puts it on a page escapes it.
"""

from __future__ import annotations

from collections.abc import Iterator

from attr_batch.evidence import Estimate, Method, OracleSet, PropertyValidation
from attr_batch.figures import number
from attr_batch.lds import FEWEST

FAMILIES = {
    "estimator": "Estimators",
    "counterfactual": "Other counterfactuals",
    "baseline": "Baselines",
}
UNKNOWN = Estimate(value=None, low=None, high=None)


def verdict(prop: PropertyValidation) -> str:
    """Return what the retrainings say about the headline method, in a few plain sentences."""
    first, head = first_set(prop), headline(prop)
    if first is None or head is None:
        return "nothing was retrained or no method was judged, so there is no verdict"
    score = score_of(prop, head)
    value = score["value"]
    if value is None:
        return f"too few retrainings to judge {head['name']}"
    sure = score["low"] is not None and score["low"] > first["chance95"]
    verb = (
        "predicts" if sure else "may predict" if value > first["chance95"] else "does not predict"
    )
    return ". ".join(
        [
            f"{head['name']} {verb} what retrained models score: LDS "
            f"{with_interval(score)} at {first['name']}{_against(first)}",
            *_rivalry(prop),
        ]
    )


def _against(oracle: OracleSet) -> str:
    limits = [
        (oracle["ceiling"]["value"], "one retraining predicts another with"),
        (oracle["additivity"]["value"], "the best additive model reaches"),
        (oracle["floor"], "an equal split"),
        (oracle["chance95"], "unrelated numbers stay below"),
    ]
    known = [f"{what} {number(x, 2)}" for x, what in limits if x is not None]
    return f"; {', '.join(known)}"


def _rivalry(prop: PropertyValidation) -> Iterator[str]:
    """Yield what the headline method does not beat, and that it beats the rest where it does."""
    better, level = rivals(prop)
    baselines = [m for m in prop["methods"] if m["family"] == "baseline"]
    for found, what in ((better, "Better than it"), (level, "As good, as far as one can tell")):
        if found:
            yield f"{what}: {'; '.join(map(_called, found))}"
    judged = [m for m in baselines if lead_of(prop, m)["low"] is not None]
    if judged and not any(m["family"] == "baseline" for m in better + level):
        yield "It beats every baseline" + ("" if judged == baselines else " that could be judged")


def _called(method: Method) -> str:
    return f"{method['name']} (baseline)" if method["family"] == "baseline" else method["name"]


def marks(prop: PropertyValidation) -> list[tuple[str, str]]:
    """Return what a reader must know before believing the verdict, as (what, explanation)."""
    first, head = first_set(prop), headline(prop)
    if first is None or head is None:
        return []
    return [*_chance_marks(first, score_of(prop, head)), *_method_marks(prop), *_set_marks(first)]


def _chance_marks(first: OracleSet, score: Estimate) -> Iterator[tuple[str, str]]:
    chance, additivity = first["chance95"], first["additivity"]["value"]
    if score["value"] is not None and score["value"] <= chance:
        yield "No better than chance", f"unrelated numbers score up to {number(chance, 2)}"
    elif score["low"] is not None and score["low"] <= chance:
        yield "Not safely above chance", "the interval reaches down to what luck can do"
    if additivity is not None and additivity <= chance:
        yield (
            "No attribution can be judged here",
            "even an additive model fitted to the retrainings themselves predicts them no better "
            "than chance. Contributors interact, or the retrainings are noise",
        )


def _method_marks(prop: PropertyValidation) -> Iterator[tuple[str, str]]:
    better, level = rivals(prop)
    simple = [m["name"] for m in better + level if m["family"] == "baseline"]
    if simple:
        yield "Baselines do as well", f"{'; '.join(simple)}, as far as one can tell"
    collapsed = [
        f"{m['name']} in {m['collapsed']} of {m['designs']} designs"
        for m in prop["methods"]
        if m["collapsed"]
    ]
    if collapsed:
        why = "There it gives everyone the same, which is no finding that they are equal"
        yield "Collapsed to equal split", f"{'; '.join(collapsed)}. {why}"
    if prop["methods"][0]["designs"] == 1:
        yield "One design", "the intervals do not hold what another draw of coalitions would give"


def _set_marks(first: OracleSet) -> Iterator[tuple[str, str]]:
    if first["planned"] < FEWEST:
        yield "No score", f"there are only {first['planned']} coalitions of this size"
    elif first["ceiling"]["value"] is None:
        yield "No ceiling", "without a second seed nothing tells how well one can predict at all"
    if first["subsets"] < first["planned"]:
        yield "Not all retrained", f"{first['subsets']} of {first['planned']} at {first['name']}"


def first_set(prop: PropertyValidation) -> OracleSet | None:
    """Return the oracle set that methods are ranked on."""
    return prop["oracle"][0] if prop["oracle"] else None


def headline(prop: PropertyValidation) -> Method | None:
    """Return the method that the others are compared with."""
    return prop["methods"][0] if prop["methods"] else None


def score_of(prop: PropertyValidation, method: Method) -> Estimate:
    """Return a method's LDS on the first oracle set."""
    first = first_set(prop)
    return UNKNOWN if first is None else method["lds"].get(first["name"], UNKNOWN)


def lead_of(prop: PropertyValidation, method: Method) -> Estimate:
    """Return by how much the headline method's LDS is ahead on the first oracle set."""
    first = first_set(prop)
    if first is None or method is prop["methods"][0]:
        return UNKNOWN
    return method["lead"].get(first["name"], UNKNOWN)


def rivals(prop: PropertyValidation) -> tuple[list[Method], list[Method]]:
    """Return the methods ahead of the headline method, and those not told apart from it.

    Ahead: the whole interval of the lead is below zero. Not told apart: it begins at or below
    zero; without an interval the lead itself decides.
    """
    better, level = [], []
    for method in prop["methods"][1:]:
        lead = lead_of(prop, method)
        low = lead["value"] if lead["low"] is None else lead["low"]
        if lead["high"] is not None and lead["high"] < 0:
            better.append(method)
        elif low is not None and low <= 0:
            level.append(method)
    return better, level


def by_family(prop: PropertyValidation) -> list[Method]:
    """Return the methods family by family, the best first, those without a score last."""

    def key(m: Method) -> tuple[int, bool, float, str]:
        value = score_of(prop, m)["value"]
        return list(FAMILIES).index(m["family"]), value is None, -(value or 0.0), m["name"]

    return sorted(prop["methods"], key=key)


def span(low: float | None, high: float | None, digits: int) -> str:
    """Return "0.78 … 0.91"; a dash where there is no interval."""
    return "–" if low is None else f"{number(low, digits)} … {number(high, digits)}"


def with_interval(figure: Estimate) -> str:
    """Return "0.86 (0.78 … 0.91)", for text."""
    if figure["value"] is None or figure["low"] is None:
        return number(figure["value"], 2)
    return f"{number(figure['value'], 2)} ({span(figure['low'], figure['high'], 2)})"
