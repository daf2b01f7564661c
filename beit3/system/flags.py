"""Flags of a command line as fields of frozen dataclasses. Each flag stands once: name, type, default, help, bounds.

    @dataclass(frozen=True)
    class Schedule:
        lr: float = flag(5e-4, "highest learning rate", above=0, decides_steps=True)

From such classes come the parser, its help, the checks, and which values decide the steps of a run.
"""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import math
import types
import typing
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn, TypeVar

from beit3.system.errors import InputError

T = TypeVar("T")


@dataclass(frozen=True)
class Facts:
    """What is known of a flag beside its name, its type and its default.

    Attributes:
        help: for people; with the unit where there is one.
        at_least, above, at_most, below: bounds of a number, of each where there are several.
        choices: the values there are; None: any.
        decides_steps: a run that is resumed with another value is not the same run.
        said_by: the key under which a checkpoint's description states the value; prediction takes it from there.
        essential: part of the short help.
        no: help of `--no_<name>`, for what is on by default.
        also: other spellings.
        default_shown: whether the help names the default.
    """

    help: str
    at_least: float | None = None
    above: float | None = None
    at_most: float | None = None
    below: float | None = None
    choices: Sequence[Any] | None = None
    decides_steps: bool = False
    said_by: str | None = None
    essential: bool = False
    no: str = ""
    also: tuple[str, ...] = ()
    default_shown: bool = True


def flag(default: Any, help: str, **facts: Any) -> Any:
    """A field of a settings class that is a flag; see `Facts`."""
    return dataclasses.field(default=default, metadata={"flag": Facts(help, **facts)})


@dataclass(frozen=True)
class Flag:
    """A flag as the parser needs it. `kind`: of one value; `count`: values it takes, 0 for a switch."""

    name: str
    kind: type
    count: int
    default: Any
    facts: Facts

    def add_to(self, group: Any, any_count: bool = False) -> None:
        """To a parser or a group of it. What was given comes out as text, so that all mistakes are found together.

        any_count: take any number of values, because argparse would stop at a wrong one; `read` counts them.
        """
        names = [f"--{self.name}", *self.facts.also]
        common: dict[str, Any] = {"dest": self.name, "default": argparse.SUPPRESS}
        if self.count == 0:
            group.add_argument(*names, action="store_true", help=self.help, **common)
            if self.default:
                no = self.facts.no or f"not --{self.name}"
                group.add_argument(f"--no_{self.name}", action="store_false", help=no, **common)
            return
        metavar = {int: "N", float: "X", Path: "PATH"}.get(self.kind, "TEXT")
        if self.facts.choices is not None:
            metavar = "{" + ",".join(map(str, self.facts.choices)) + "}"
        nargs: Any = "*" if any_count else self.count if self.count > 1 else None
        group.add_argument(*names, help=self.help, metavar=metavar, nargs=nargs, **common)

    @property
    def help(self) -> str:
        default = self.default
        if not self.facts.default_shown or default is None or default == "" or isinstance(default, bool):
            return self.facts.help
        shown = " ".join(map(str, default)) if isinstance(default, tuple) else default
        return f"{self.facts.help} ({shown})"

    def read(self, given: Any) -> Any:
        """The value of what was given. Raises ValueError saying what is wrong with it."""
        if self.count == 0:
            return given
        texts = [given] if isinstance(given, str) else given
        if len(texts) != self.count:
            raise ValueError("one value is wanted" if self.count == 1 else f"{self.count} values are wanted")
        if self.kind is Path and not all(texts):
            raise ValueError("a path is wanted; is a variable of the shell empty?")  # Path("") is the current folder
        values = [self._number(text) if self.kind in (int, float) else self.kind(text) for text in texts]
        self._check(values)
        return values[0] if self.count == 1 else tuple(values)

    def _number(self, text: str) -> float:
        try:
            value = self.kind(text)
        except ValueError:
            raise ValueError("a whole number is wanted" if self.kind is int else "a number is wanted") from None
        if self.kind is float and not math.isfinite(value):
            raise ValueError("a finite number is wanted")
        return value

    def _check(self, values: Sequence[Any]) -> None:
        facts = self.facts
        if facts.choices is not None and not set(values) <= set(facts.choices):
            raise ValueError(f"one of {', '.join(map(str, facts.choices))} is wanted")
        for value in values:
            if (
                (facts.at_least is not None and value < facts.at_least)
                or (facts.above is not None and value <= facts.above)
                or (facts.at_most is not None and value > facts.at_most)
                or (facts.below is not None and value >= facts.below)
            ):
                raise ValueError(f"{self.bounds} is needed")

    @property
    def bounds(self) -> str:
        """The bounds in words, such as "at least 0 and below 1"."""
        named = (("at least", "at_least"), ("above", "above"), ("at most", "at_most"), ("below", "below"))
        parts = [(words, getattr(self.facts, name)) for words, name in named]
        return " and ".join(f"{words} {limit:,}" for words, limit in parts if limit is not None)


def flags_of(settings: type) -> tuple[Flag, ...]:
    """The flags of a settings class, in the order in which they stand."""
    hints = typing.get_type_hints(settings)
    found = []
    for each in dataclasses.fields(settings):
        if "flag" in each.metadata:
            kind, count = _kind(hints[each.name])
            found.append(Flag(each.name, kind, count, each.default, each.metadata["flag"]))
    return tuple(found)


def _kind(hint: Any) -> tuple[type, int]:
    """(type of one value, how many) of `int`, `float | None`, `tuple[float, float]`, `bool` and the like."""
    if isinstance(hint, types.UnionType):
        (hint,) = (part for part in typing.get_args(hint) if part is not type(None))
    if typing.get_origin(hint) is tuple:
        parts = typing.get_args(hint)
        return parts[0], len(parts)
    return (hint, 0) if hint is bool else (hint, 1)


class Parser(argparse.ArgumentParser):
    """argparse without its usage wall: a mistake is an InputError. Abbreviations are mistakes too."""

    def __init__(self, **options: Any) -> None:
        super().__init__(allow_abbrev=False, add_help=False, **options)

    def error(self, message: str) -> NoReturn:
        raise InputError(message.removeprefix("argument "))


def without_values(argv: Sequence[str], switches: Collection[str], problems: list[str]) -> list[str]:
    """The arguments with what was given to switches as `--eval=yes` taken off and added to `problems`."""
    kept = []
    for argument in argv:
        name, equals, value = argument.partition("=")
        if equals and name in switches:
            problems.append(f"{name} takes no value, found {value!r}; leave {name} away where it is not wanted")
            argument = name
        kept.append(argument)
    return kept


def unknown_flags(left_over: Sequence[str], known: Iterable[str]) -> list[str]:
    """A sentence for each argument that is no flag, with the flag that may have been meant."""
    problems, behind_unknown = [], False
    for argument in left_over:
        if not argument.startswith("--"):
            if not behind_unknown:
                problems.append(f"{argument!r}: what is this? Values stand behind a flag such as --data_path")
            continue
        behind_unknown = True
        name = argument.split("=")[0]
        near = difflib.get_close_matches(name, known, n=1, cutoff=0.6)
        problems.append(f"{name}: no such flag" + (f"; did you mean {near[0]}?" if near else "; see --help_all"))
    return problems


def values(settings: type, given: Mapping[str, Any], problems: list[str]) -> dict[str, Any]:
    """The values of a class's flags that were given; what is wrong with them is added to `problems`."""
    read = {}
    for each in flags_of(settings):
        if each.name in given:
            try:
                read[each.name] = each.read(given[each.name])
            except ValueError as error:
                text = "".join(f" {value or repr(value)}" for value in given[each.name])
                problems.append(f"--{each.name}{text}: {error}")
    return read


def as_given(settings: Any) -> dict[str, Any]:
    """Name → value of all flags of a settings object, in values that JSON knows."""
    return {each.name: _plain(getattr(settings, each.name)) for each in flags_of(type(settings))}


def deciding(settings: Any) -> dict[str, Any]:
    """Of `as_given`, those that decide the steps of a run."""
    decide = {each.name for each in flags_of(type(settings)) if each.facts.decides_steps}
    return {name: value for name, value in as_given(settings).items() if name in decide}


def _plain(value: Any) -> Any:
    if isinstance(value, tuple):
        return list(value)
    return str(value) if isinstance(value, Path) else value


def checked(settings: type[T], names: Collection[str], **chosen: Any) -> T:
    """A settings object with these values, held to the bounds of its flags, for callers in Python.

    names: of the flags that may be chosen.

    Raises:
        InputError: listing every name that is no flag and every value that a flag does not take.
    """
    known, problems, read = {each.name: each for each in flags_of(settings) if each.name in names}, [], {}
    for name, value in chosen.items():
        if name not in known:
            problems.append(f"{name}: no such choice; there are {', '.join(known)}")
            continue
        try:
            read[name] = value if value is None else known[name].read(_given(value))
        except ValueError as error:
            problems.append(f"{name}={value!r}: {error}")
    if problems:
        raise InputError(problems)
    return settings(**read)


def _given(value: Any) -> Any:
    """A value as a command line would give it."""
    if isinstance(value, bool):
        return value
    if isinstance(value, Mapping):
        return ",".join(f"{name}={other}".replace(",", "\\,") for name, other in value.items())
    return [str(each) for each in value] if isinstance(value, tuple | list) else str(value)
