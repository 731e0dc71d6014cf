import pytest

from tests.hostile import GROUPS, cases, outcome


@pytest.mark.parametrize("name", cases())
def test_a_hostile_file_works_or_gives_one_message(name: str):
    case = cases()[name]
    found = outcome(case)
    assert found.matches(case), (found, case.expected)


def test_there_are_a_hundred_cases_and_some_in_every_group():
    assert len(cases()) >= 100
    assert all(any(name.startswith(f"{group}: ") for name in cases()) for group in GROUPS)
