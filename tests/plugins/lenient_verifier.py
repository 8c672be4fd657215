"""A verifier of a run in the committed store (tests/data/v0.1): its source is part of that run's keys, so it never changes."""


def contains(completion: str, answer: str | None) -> bool:
    return answer is not None and answer[-1] in completion
