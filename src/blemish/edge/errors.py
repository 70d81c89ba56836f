"""The error a user can act on."""

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any


class InputError(ValueError):
    """An input that cannot be used; the message names the path or key and what is expected."""


@contextlib.contextmanager
def named(image: Any) -> Iterator[None]:
    """Put the name of the image, a file or an array, before the message of an InputError."""
    try:
        yield
    except InputError as error:
        name = str(image) if isinstance(image, str | Path) else f"an array {getattr(image, 'shape', '')}"
        raise InputError(str(error) if str(error).startswith(name) else f"{name}: {error}") from None
