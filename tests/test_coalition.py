"""Coalitions: both written forms and back, and what is refused."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from attr_batch.coalition import Coalition

coalitions = st.integers(1, 300).flatmap(
    lambda n: st.builds(Coalition, st.integers(0, (1 << n) - 1), st.just(n))
)


@given(coalitions)
def test_both_forms_come_back(coalition):
    text, short = str(coalition), coalition.hex()
    assert len(text) == coalition.n
    assert len(short) == 2 + -(-coalition.n // 4)
    assert int(short, 16) == int(text, 2)
    assert Coalition.parse(text) == Coalition.parse(text, coalition.n) == coalition
    for form in (short, short.upper(), f" {short} "):
        assert Coalition.parse(form, coalition.n) == coalition


@given(coalitions)
def test_the_first_character_is_contributor_0(coalition):
    assert [c == "1" for c in str(coalition)] == [i in coalition for i in range(coalition.n)]
    assert Coalition.of(coalition.members, coalition.n) == coalition
    assert coalition.size == len(coalition.members) == str(coalition).count("1")


@given(coalitions)
def test_the_complement_is_everyone_else(coalition):
    other = coalition.complement()
    assert {*coalition.members, *other.members} == set(range(coalition.n))
    assert coalition.size + other.size == coalition.n
    assert other.complement() == coalition


@given(st.text("01xX_+- a１"), st.integers(1, 12))
def test_whatever_is_read_is_one_of_the_two_forms(text, n):
    try:
        coalition = Coalition.parse(text, n)
    except ValueError:
        return
    assert text.strip().lower() in (str(coalition), coalition.hex())


@pytest.mark.parametrize(
    ("text", "n", "what"),
    [
        ("0x1_0", 12, "not hexadecimal"),
        ("0x+10", 12, "not hexadecimal"),
        ("0x１00", 12, "not hexadecimal"),
        ("0xg", 12, "not hexadecimal"),
        ("0xg00", 12, "not hexadecimal"),
        ("0x0100", 12, "4 hex digits, wanted 3"),
        ("0x", 12, "0 hex digits"),
        ("0x20", 5, "beyond 5 contributors"),
        ("0x1", None, "number of contributors is needed"),
        ("", 3, "not a string of 0 and 1"),
        ("01_1", None, "not a string of 0 and 1"),
        ("011", 4, "3 digits, wanted 4"),
    ],
)
def test_what_is_neither_is_refused(text, n, what):
    with pytest.raises(ValueError, match=what):
        Coalition.parse(text, n)


@pytest.mark.parametrize(("mask", "n"), [(-1, 3), (8, 3), (0, 0)])
def test_a_mask_must_fit(mask, n):
    with pytest.raises(ValueError, match="not a subset"):
        Coalition(mask, n)


@pytest.mark.parametrize("contributor", [-1, 3])
def test_a_contributor_must_exist(contributor):
    with pytest.raises(ValueError, match="not one of"):
        Coalition.of([contributor], 3)
