"""One error for whatever a damaged or misleading file makes its reader raise."""

from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def naming(place: str) -> Iterator[None]:
    """Turns every error into a ValueError that names the place, but for those of a file that is not there."""
    try:
        yield
    except (FileNotFoundError, PermissionError, IsADirectoryError, ImportError):
        raise
    except Exception as error:
        already = isinstance(error, ValueError) and str(error).startswith(place)
        raise error if already else ValueError(f"{place} is damaged or no such file: {error}.") from error
