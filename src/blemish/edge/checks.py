"""Checks of values that a user sets: one that cannot be meant is refused by its key before any work begins."""

import difflib
import math
import os
from collections.abc import Callable, Iterable, Sequence
from numbers import Real
from typing import Any

from .errors import InputError

LARGEST_SEED = 2**32 - 1  # numpy's limit


def check_number(place: str, interval: str, /, *, also: tuple = (), each: bool = False, **values: Any) -> None:
    """Raise InputError unless every value is a number in an interval such as "(0, 1]" or "[0, inf)"; bools and NaN are none.

    place: the part of the config that has the keys, "" for its top level. also: further values that are allowed, such as None.
    each: the values are lists of such numbers.
    """
    low, high = (float(end) for end in interval[1:-1].split(","))

    def valid(value: Any) -> bool:
        open_end = (value == low and interval[0] == "(") or (value == high and interval[-1] == ")")
        return _is_a(value, Real) and low <= value <= high and not open_end

    _check(place, values, valid, ["a finite number" if high == -low == math.inf else f"a number in {interval}"], also, each)


def check_whole(place: str, least: int, most: int | None = None, /, *, also: tuple = (), each: bool = False, **values: Any) -> None:
    """Raise InputError unless every value is an integer from `least` to `most`; see `check_number`."""

    def valid(value: Any) -> bool:
        return _is_a(value, int) and least <= value and (most is None or value <= most)

    _check(place, values, valid, [f"an integer from {least}" + (f" to {most}" if most is not None else "")], also, each)


def check_share_or_count(place: str, /, **values: Any) -> None:
    """Raise InputError unless every value is a float in (0, 1], a share, or an integer from 1, a count."""

    def valid(value: Any) -> bool:
        return 0 < value <= 1 if isinstance(value, float) else _is_a(value, int) and value >= 1

    _check(place, values, valid, ["a share in (0, 1] with a point (1.0 is all)", "an integer (1 is one)"])


def check_choice(place: str, choices: Iterable, /, **values: Any) -> None:
    """Raise InputError unless every value is one of the choices: texts, numbers, bools or None."""
    _check(place, values, lambda value: False, [], tuple(choices))


def check_switch(place: str, /, **values: Any) -> None:
    """Raise InputError unless every value is true or false: a text such as `no` would count as true."""
    check_choice(place, (True, False), **values)


def check_text(place: str, /, **values: Any) -> None:
    """Raise InputError unless every value is a text or path that is not empty."""
    _check(place, values, lambda value: isinstance(value, str | os.PathLike) and bool(str(value)), ["a text"])


def check_stages(**values: Any) -> None:
    """Raise InputError unless every value is a list of stages of a backbone, by number or name."""
    _check("model", values, lambda stage: _is_a(stage, int | str), ["a stage's number or name"], each=True)


def check_size(**values: Any) -> None:
    """Raise InputError unless every value is [height, width] in pixels, each 8 or more, or None."""

    def valid(size: Any) -> bool:
        return _is_list(size) and len(size) == 2 and all(_is_a(side, int) and side >= 8 for side in size)

    _check("", values, valid, ["[height,width] of 8 pixels or more"], (None,))


def _is_a(value: Any, kind: Any) -> bool:
    return isinstance(value, kind) and not isinstance(value, bool)


def _is_list(value: Any) -> bool:
    return isinstance(value, Sequence) and not isinstance(value, str)


def _check(
    place: str, values: dict[str, Any], valid: Callable[[Any], bool], expected: list[str], also: tuple = (), each: bool = False
) -> None:
    for name, value in values.items():
        allowed = any(type(value) is type(other) and value == other for other in also)  # 1 is not True
        if not (allowed or (_is_list(value) and len(value) > 0 and all(map(valid, value)) if each else valid(value))):
            key, choices = f"{place}.{name}" if place else name, " or ".join([*expected, *map(shown, also)])
            raise InputError(f"{key}={shown(value)}: expected {'a list, each ' * each}{choices}")


def shown(value: Any) -> str:
    """A value as it is typed on the command line."""
    return "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)


def nearest(name: str, known: Iterable[str]) -> str:
    """The known name most like a misspelt one, as a question to put before the choices; "" if none is close."""
    close = difflib.get_close_matches(str(name), list(known), 1)
    return f"did you mean {close[0]!r}? " if close else ""
