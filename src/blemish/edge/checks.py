"""Checks of what a user sets: a value that cannot be meant is refused by its key, where it is set, before anything is read."""

import difflib
import os
from collections.abc import Iterable
from typing import Any

from .errors import InputError

LARGEST_SEED = 2**32 - 1  # numpy has no larger one


def check_number(place: str, interval: str, /, *, also: tuple = (), each: bool = False, **values: Any) -> None:
    """InputError unless every value is a number in an interval like "(0, 1]" or "[0, inf)"; a text, a bool and NaN are none.

    place: what the values' names stand under in the config, "" for nothing. also: what is allowed beside, for instance None.
    each: the values are lists of such numbers.
    """
    low, high = (float(end) for end in interval[1:-1].split(","))

    def valid(value: Any) -> bool:
        if isinstance(value, bool) or not isinstance(value, int | float):
            return False
        return low < value < high or (value == low and interval[0] == "[") or (value == high and interval[-1] == "]")

    above = f"a number above {low:g}" if interval[0] == "(" else f"a number from {low:g}"
    text = f"a number in {interval}" if high < float("inf") else "a finite number" if low == -high else above
    _check(place, values, valid, text, also, each)


def check_whole(place: str, least: int, most: int | None = None, /, *, also: tuple = (), each: bool = False, **values: Any) -> None:
    """InputError unless every value is a whole number, written without a point, from `least` to `most`; the rest as `check_number`."""

    def valid(value: Any) -> bool:
        return isinstance(value, int) and not isinstance(value, bool) and least <= value and (most is None or value <= most)

    text = f"a whole number from {least}" if most is None else f"a whole number from {least} to {most}"
    _check(place, values, valid, text, also, each)


def check_share_or_count(place: str, /, **values: Any) -> None:
    """InputError unless every value is a share in (0, 1] or a whole number from 1: the point tells 1.0, all, from 1, one."""

    def valid(value: Any) -> bool:
        return 0 < value <= 1 if isinstance(value, float) else isinstance(value, int) and not isinstance(value, bool) and value >= 1

    _check(place, values, valid, "a share in (0, 1] with a point (1.0 is all) or a whole number (1 is one)", (), False)


def check_choice(place: str, choices: Iterable, /, **values: Any) -> None:
    """InputError unless every value is one of the choices: texts, numbers, bools or None."""
    _check(place, values, lambda value: False, "", tuple(choices), False)


def check_text(place: str, /, **values: Any) -> None:
    """InputError unless every value is a text, a name or a path, with something in it."""
    _check(place, values, lambda value: isinstance(value, str | os.PathLike) and bool(str(value)), "a text", (), False)


def check_stages(**values: Any) -> None:
    """InputError unless every value is a list of stages, numbers or names; the backbone knows which it has."""
    _check("model", values, lambda one: isinstance(one, int | str) and not isinstance(one, bool), "a stage's number or name", (), True)


def check_size(**values: Any) -> None:
    """InputError unless every value is [height, width] of images in pixels, 8 or more, or None."""
    for name, value in values.items():
        if value is not None:
            pair = value if isinstance(value, str | int | float) else list(value)
            _check("", {name: pair}, lambda side: isinstance(side, int) and side >= 8, "a side of 8 pixels or more", (), True)
            if len(pair) != 2:
                raise InputError(f"{name}={pair}: expected [height,width]")


def check_switch(place: str, /, **values: Any) -> None:
    """InputError unless every value is true or false: a text like `no` would count as true."""
    check_choice(place, (True, False), **values)


def _check(place: str, values: dict[str, Any], valid: Any, text: str, also: tuple, each: bool) -> None:
    *others, last = [*([text] if text else []), *map(shown, also)]
    expected = f"{', '.join(others)} or {last}" if others else last
    for name, value in values.items():
        if any(type(value) is type(one) and value == one for one in also):
            continue
        if not (isinstance(value, list | tuple) and value and all(map(valid, value)) if each else valid(value)):
            raise InputError(f"{place}{'.' * bool(place)}{name}={shown(value)}: expected {'a list, each ' * each}{expected}")


def shown(value: Any) -> str:
    """As the command line takes it."""
    return "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)


def nearest(name: str, known: Iterable[str]) -> str:
    """The known name that is most like a misspelt one, as a question to put before the choices; "" if none is."""
    close = difflib.get_close_matches(str(name), list(known), 1)
    return f"did you mean {close[0]!r}? " if close else ""
