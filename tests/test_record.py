"""Records: dataclasses that nobody compares, and that only type checkers hold to be frozen."""

from dataclasses import field, fields, replace

from taskcarrier.record import record


@record
class Pair:
    first: int
    second: list[int] = field(default_factory=list)


@record(kw_only=True)
class Named:
    first: int
    second: int = 2


def test_a_record_is_made_and_shown_as_a_dataclass():
    pair = Pair(1)
    assert repr(pair) == "Pair(first=1, second=[])"
    assert replace(pair, first=3).first == 3
    assert [each.name for each in fields(Named)] == ["first", "second"]
    assert Named(first=1).second == 2


def test_records_are_compared_by_identity():
    pair = Pair(1)
    assert pair == pair  # noqa: PLR0124  # the point
    assert pair != Pair(1)
    assert len({pair, Pair(1)}) == 2
