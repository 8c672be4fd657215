"""Numbers as a person reads them."""


def counted(count: int, noun: str) -> str:
    """`1 round`, `3 rounds`."""
    return f"{count:,} {noun}{'' if count == 1 else 's'}"


def size_text(count: float) -> str:
    """Bytes for a person."""
    for unit, one in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if count >= one:
            return f"{count / one:,.1f} {unit}"
    return f"{count:.0f} B"
