"""A platform plugin of vLLM for tests, found by whoever has this folder on its path (`entry_points.txt`)."""


def found() -> str:
    return "claimed_platform.ClaimedGpus"
