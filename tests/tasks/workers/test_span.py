"""Nodes for workers whose engines span several."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from tasks.workers.span import Room, Span, choose


def placed(rooms: Sequence[int], gpus: int, span: Span) -> int:
    """How many workers with `gpus` GPUs of their own, and their engines, find nodes with so many GPUs."""
    free = [Room(8, count) for count in rooms]
    number = 0
    while choose(free, 1, gpus, span) is not None:
        number += 1
    return number


@pytest.mark.parametrize(
    ("rooms", "gpus", "span", "number"),
    [
        ((8, 8), 0, Span(2, 8), 1),
        ((8, 8, 8), 0, Span(2, 4), 3),
        ((8, 7), 0, Span(2, 8), 0),
        # nodes that have no room for a worker serve the engines of others
        ((8, 8, 8), 4, Span(2, 2), 3),
        ((4, 4, 4), 2, Span(2, 1), 3),
        ((8, 8, 4, 4), 4, Span(2, 4), 2),
    ],
)
def test_as_many_as_there_is_room_for(rooms, gpus, span, number):
    assert placed(rooms, gpus, span) == number


def test_nothing_is_taken_where_there_is_no_room():
    free = [Room(1, 8), Room(1, 4)]
    assert choose(free, 1, 0, Span(2, 8)) is None and free == [Room(1, 8), Room(1, 4)]
    assert choose(free, 2, 0, None) is None
    assert choose(free, 1, 6, None) == [0] and free[0] == Room(0, 2)
