"""Two real trainers (one rank, two ranks), launched once, and a small store to train on."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
from trainer_world import World, launch_trainer, make_world

from tasks.workers.pool import Worker


@pytest.fixture(scope="session")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return make_world(tmp_path_factory.mktemp("trainer") / "store")


Start = Callable[[int], Worker]


@pytest.fixture(scope="session")
def start(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Start]:
    """Launches trainers of the given number of ranks as the supervisor does, and ends them with the session."""
    started: list[Worker] = []

    def launch(processes: int) -> Worker:
        log = tmp_path_factory.getbasetemp() / f"trainer-{processes}-{len(started)}.log"
        started.append(launch_trainer(processes, log, ["extra_credits"]))
        return started[-1]

    yield launch
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(Worker.close, started))


@pytest.fixture(scope="session")
def trainers(start: Start) -> dict[int, Worker]:
    """Trainers of one and of two ranks, kept warm."""
    with ThreadPoolExecutor(2) as pool:
        one, two = pool.map(start, (1, 2))
    return {1: one, 2: two}
