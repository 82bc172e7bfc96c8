"""Quantities as people read them."""


def format_bytes(count: int) -> str:
    """In MB, GB or TB, three digits."""
    for size, unit in ((1e12, "TB"), (1e9, "GB")):
        if count >= size:
            return f"{count / size:.3g} {unit}"
    return f"{count / 1e6:.3g} MB"
