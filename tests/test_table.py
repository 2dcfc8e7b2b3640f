"""CSV in and out: round trips, and every way a spreadsheet or a hand can break the file."""

import io
from pathlib import Path

import pytest

from attr_batch.coalition import Coalition
from attr_batch.errors import DataError, SpecError
from attr_batch.estimators import Observation, Permutation, Reference, Ridge
from attr_batch.table import DESIGN_COLUMNS, read_values, write_design

GOOD = ["000,0", "111,3", "100,1", "011,2", "010,1.5", "101,1.5"]


def read(tmp_path: Path, text: str | bytes, players: int | None = None):
    path = tmp_path / "values.csv"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return read_values(path, players)


def csv(*lines: str, header: str = "coalition,value") -> str:
    return "\n".join([header, *lines]) + "\n"


def problems(tmp_path: Path, text: str | bytes, players: int | None = None) -> str:
    with pytest.raises(DataError) as caught:
        read(tmp_path, text, players)
    assert caught.value.exit_code == 65
    return str(caught.value)


def test_a_plan_goes_out_and_comes_back(tmp_path):
    plan = Ridge(budget=20, holdout=4).plan(6)
    stream = io.StringIO()
    write_design(plan, stream)
    lines = stream.getvalue().splitlines()
    assert lines[0] == ",".join(DESIGN_COLUMNS)
    text = "\n".join([lines[0] + ",value", *(f"{line},{i}" for i, line in enumerate(lines[1:]))])
    observations, n = read(tmp_path, text)
    assert n == 6
    assert [(o.coalition, o.role, o.pair) for o in observations] == [
        (e.coalition, e.role, e.pair) for e in plan
    ]
    assert [o.value for o in observations] == list(range(len(plan)))


def test_repeats_of_the_paper_design_are_replicates(tmp_path):
    plan = Reference(budget=40, holdout=0).plan(3)
    stream = io.StringIO()
    write_design(plan, stream)
    lines = stream.getvalue().splitlines()
    observations, _ = read(
        tmp_path, "\n".join([lines[0] + ",value", *(x + ",1" for x in lines[1:])])
    )
    assert len(observations) == len(plan)
    assert len({o.coalition for o in observations}) < len(plan)


@pytest.mark.parametrize("estimator", [Ridge(budget=40, repeats=0.1), Permutation(budget=20)])
def test_repeats_and_permutations_come_back(estimator, tmp_path):
    plan = estimator.plan(6)
    stream = io.StringIO()
    write_design(plan, stream)
    header, *lines = stream.getvalue().splitlines()
    roles = [line.split(",")[-1] for line in lines]
    assert roles == [e.sequence for e in plan]
    filled = [f"{line},{line.split(',')[1].count('1')}" for line in lines]
    observations, n = read(tmp_path, csv(*filled, header=f"{header},value"))
    assert [o.role for o in observations] == [e.role for e in plan]
    found = estimator.estimate(observations, n)
    assert found.values == pytest.approx([1.0] * 6, abs=1e-6)


def test_only_coalition_and_value_are_needed(tmp_path):
    observations, n = read(tmp_path, csv(*GOOD))
    assert n == 3
    assert observations[0] == Observation(Coalition(0, 3), 0.0, "empty")
    assert observations[2] == Observation(Coalition.of([0], 3), 1.0, "design")


def test_weight_replicate_and_role_are_read(tmp_path):
    header = "role,weight,value,replicate,coalition"
    lines = ["endpoint,,0,,000", ",2.5,1,7,111", "holdout,1,1,0,110", "design,,1,,100", ",,2,,011"]
    observations, _ = read(tmp_path, csv(*lines, header=header))
    assert [o.role for o in observations] == ["empty", "grand", "holdout", "design", "design"]
    assert observations[1].weight == 2.5
    assert observations[1].replicate == 7


def test_bom_blank_lines_crlf_and_spaces_are_fine(tmp_path):
    text = "\ufeff" + "\r\n\r\n".join(["Coalition , VALUE", *GOOD]) + "\r\n"
    assert read(tmp_path, text) == read(tmp_path, csv(*GOOD))


def test_hex_with_players(tmp_path):
    lines = [f"{Coalition.parse(line.split(',')[0]).hex()},{line.split(',')[1]}" for line in GOOD]
    assert read(tmp_path, csv(*lines), 3) == read(tmp_path, csv(*GOOD))
    assert "--players" in problems(tmp_path, csv(*lines))


def test_hex_beside_a_binary_string_needs_no_players(tmp_path):
    observations, n = read(tmp_path, csv("0x0,0", *GOOD[1:]))
    assert n == 3
    assert observations[0].role == "empty"


@pytest.mark.parametrize(
    ("cell", "what"),
    [
        ("11", "2 digits, wanted 3"),
        ("1.1E+05", "not a string of 0 and 1"),
        ("110.0", "not a string of 0 and 1"),
        ("120", "not a string of 0 and 1"),
    ],
)
def test_a_mangled_coalition_mentions_spreadsheets(tmp_path, cell, what):
    message = problems(tmp_path, csv(*GOOD, f"{cell},1"))
    assert "line 8" in message
    assert what in message
    assert "spreadsheet" in message


def test_one_wide_line_is_the_wrong_one(tmp_path):
    message = problems(tmp_path, csv(*GOOD, "01011,4"))
    assert message.count("digits, wanted") == 1
    assert "line 8" in message
    assert "5 digits, wanted 3" in message


def test_a_pair_that_is_none_is_named(tmp_path):
    text = "coalition,value,pair\n000,0,\n111,1,\n100,.2,0\n011,.3,0\n110,.4,1\n010,.5,1\n"
    message = problems(tmp_path, text)
    assert message.count("is not a coalition and its complement") == 1
    assert "pair 1" in message


@pytest.mark.parametrize(
    "value", ["nan", "inf", "-Infinity", "1_0", "٣", "abc", "1e999", '"1,5"', ""]
)
def test_a_bad_value_is_named_with_its_line(tmp_path, value):
    message = problems(tmp_path, csv(GOOD[0], f"110,{value}", *GOOD[1:]))
    assert "line 3" in message
    assert "value" in message


def test_all_problems_are_told_at_once(tmp_path):
    message = problems(tmp_path, csv(*GOOD, "11,1", "110,x", "110,1,5"))
    assert all(f"line {k}" in message for k in (8, 9, 10))


def test_a_flood_of_problems_is_counted(tmp_path):
    message = problems(tmp_path, csv(*GOOD, *["110,x"] * 50))
    assert message.count("line ") == 20
    assert "and 30 more" in message


@pytest.mark.parametrize(
    ("text", "what"),
    [
        ("", "is empty"),
        ("\n \n", "is empty"),
        (csv(), "no line with a coalition"),
        (csv(*GOOD[1:]), "no value of the empty coalition"),
        (csv(GOOD[0], *GOOD[2:]), "no value of the grand coalition"),
        (csv(*GOOD[:3]), "1 distinct coalitions to fit"),
        (csv("0,0", "1,1"), "nothing to divide"),
        (csv(*GOOD, header="coalition,value,value"), "appears 2 times"),
        (csv(*GOOD, header="coalition,score"), "no column 'value'"),
        (csv(*(line + ",1" for line in GOOD), header="coalition,value,wieght"), "'wieght'"),
        (csv(*(x.replace(",", ";") for x in GOOD), header="coalition;value"), "semicolons"),
        (csv(*(x.replace(",", "\t") for x in GOOD), header="coalition\tvalue"), "tabs"),
        (csv(*GOOD).encode("utf-16"), "UTF-8"),
        (csv(*GOOD, '110,"1'), "not a CSV"),
    ],
)
def test_a_broken_file_is_explained(tmp_path, text, what):
    assert what in problems(tmp_path, text)


@pytest.mark.parametrize(
    ("line", "what"),
    [
        ("110,1,endpoint,1,0,0", "neither empty nor grand"),
        ("000,1,holdout,1,0,0", "the empty coalition"),
        ("110,1,hold-out,1,0,0", "wanted endpoint, design, repeat or holdout"),
        ("110,1,design,0,0,0", "wanted 1e-06 to 1e+06"),
        ("110,1,design,1e300,0,0", "weight 1e+300, wanted"),
        ("110,1,design,1e-320,0,0", "weight 9.99989e-321, wanted"),
        ("110,1,design,1,x,0", "pair 'x'"),
        ("110,1,design,1,0,-1", "replicate '-1'"),
    ],
)
def test_a_bad_optional_cell_is_explained(tmp_path, line, what):
    lines = [f"{x},,,," for x in GOOD]
    header = "coalition,value,role,weight,pair,replicate"
    assert what in problems(tmp_path, csv(*lines, line, header=header))


@pytest.mark.parametrize("value", ["1.7e308", "-1.7e308"])
def test_a_value_whose_square_overflows_is_refused(tmp_path, value):
    message = problems(tmp_path, csv(GOOD[0], f"110,{value}", *GOOD[1:]))
    assert "line 3" in message
    assert "beyond 1e+100" in message
    assert "larger unit" in message


@pytest.mark.parametrize("players", [-2, 0, 1, 5_001])
def test_impossible_numbers_of_players_are_refused_at_the_option(tmp_path, players):
    with pytest.raises(SpecError, match=f"^--players: {players} contributor") as caught:
        read(tmp_path, csv("0x0,0"), players)
    assert caught.value.problems[0].hint


def test_more_contributors_than_can_be_told_apart_are_refused(tmp_path):
    lines = [f"{mask:05001b},1" for mask in (0, 1, 2, (1 << 5001) - 1)]
    with pytest.raises(SpecError, match=r"\.csv: 5001 contributors, at most 5000"):
        read(tmp_path, csv(*lines))


def test_players_must_agree(tmp_path):
    assert "wanted 4" in problems(tmp_path, csv(*GOOD), 4)


def test_a_missing_file_and_a_folder_are_data_errors(tmp_path):
    for path in (tmp_path / "none.csv", tmp_path):
        with pytest.raises(DataError, match="cannot be read"):
            read_values(path)
