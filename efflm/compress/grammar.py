"""One grammar for chains of steps, in Python, on the command line, in files and in reports.

    gptq@3,distill@0.5                  two steps, one after the other
    quantize[bits=4,group=64]           a step with several settings
    w8a16 wanda@2:4,quantize            two chains
    chain.toml  chain.toml:small        the chains of a file; one of them

A name is a step's (recipe.STEPS) or that of a recipe, which is a chain in this grammar (recipe.RECIPES). The value
after @ sets the field that the step names with `at`; of a step whose `at` is "steps" it is a share of the steps that it
has by default. In brackets are any of its fields.

A file has a chain for each name, written as here, or as a table for each step:

    recovered = "gptq@3,distill@0.5"

    [[narrow]]
    step = "width"
    parameters = 0.3

    [[narrow]]
    step = "distill"
    learning_rate = 5e-4
"""

import dataclasses
import difflib
import json
import re
import tomllib
import typing
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from efflm.compress import recipe
from efflm.compress.step import Step
from efflm.config import InputError, at_home, require, written

Chains = dict[str, tuple[Step, ...]]
Defaults = Mapping[type, Mapping[str, Any]]  # of steps: fields in place of the default ones
NONE: Defaults = {}
HOW = "say name@value or name[field=value,...], with commas between steps and spaces between chains"
_PART = re.compile(r"([^\s,@\[\]]+)(?:@([^\s,@\[\]]+))?(?:\[([^\[\]]*)\])?")
_GAP = re.compile(r"\s*(,?)\s*")
_BETWEEN_SETTINGS = re.compile(r",(?=\s*\w+\s*=)")  # other commas are of a value, as in mixed[bits=8,4,3]


def chains(text: str, defaults: Defaults = NONE) -> Chains:
    """{name: steps} of the chains of a text or a file, see `parts`.

    defaults: of steps that the text itself names; those of recipes are as the recipe has them. Raises InputError.
    """
    return {name: steps_of(each, defaults) for name, each in parts(text).items()}


def parts(text: str) -> dict[str, list[str]]:
    """{name: the text of each step or recipe} of the chains of a text, called as they are written, or of a file, called
    as they are there. Raises InputError."""
    file, toml, name = text.strip().rpartition(".toml")
    if toml and (not name or name.startswith(":")):
        return _of_file(Path(at_home(file + toml)), name[1:])
    return {",".join(each): each for each in _split(text)}


def chain(text: str) -> tuple[Step, ...]:
    """The steps of a text that is one chain. Raises InputError."""
    return only(text)[1]


def only(text: str) -> tuple[str, tuple[Step, ...]]:
    """The name and the steps of a text that is one chain. Raises InputError."""
    found = chains(text)
    require(bool(found), f"there is no step: {_choices()}")
    require(
        len(found) == 1,
        f"{text!r} is {len(found)} chains ({', '.join(found)}), but must be one: put commas between the steps, or "
        "name one chain of a file, as in chain.toml:small",
    )
    return next(iter(found.items()))


def kind_of(part: str) -> type | None:
    """The step that a part of a chain names; None where that is a recipe."""
    found = _PART.match(part)
    return recipe.STEPS.get(found[1]) if found else None


def _split(text: str) -> list[list[str]]:
    """The parts of each chain."""
    out: list[list[str]] = []
    text, at, comma = text.strip(), 0, ""
    while at < len(text) or comma:
        part = _PART.match(text, at)
        gap = part and _GAP.match(text, part.end())
        if not gap or (gap.end() == part.end() < len(text)):
            where = part.end() if part else at
            seen = repr(text[where]) if where < len(text) else "its end"
            raise InputError(f"{text!r} cannot be read from character {where + 1} on, {seen}: {HOW}")
        out = [*out[:-1], [*out[-1], part[0]]] if comma else [*out, [part[0]]]
        at, comma = gap.end(), gap[1]
    return out


def write(steps: Sequence[Any]) -> str:
    """The text of a chain: `chain` reads these steps from it. A step of one's own has its class's name."""
    return ",".join(map(_written, steps))


def text_of(name: str, steps: Sequence[Step]) -> str:
    """The text of the chain of this name: the name itself where it says these steps."""
    try:
        return name if chain(name) == tuple(steps) else write(steps)
    except InputError:
        return write(steps)


def of_lineage(records: Sequence[Mapping[str, Any]]) -> str:
    """The text of the chain that a model was made by. records: step.Record, as dicts; a step that is not here any more,
    or had other settings, is written with all that it had."""
    out = []
    for record in records:
        name, given = record["step"].lower(), {k: v for k, v in record["settings"].items() if k != "removed"}
        try:
            out.append(_written(recipe.STEPS[name](**given)))
        except (KeyError, TypeError, InputError):
            out.append(f"{name}[{','.join(f'{field}={_text(value)}' for field, value in given.items())}]")
    return ",".join(out)


def with_settings(chains: Chains, changes: Mapping[type, Mapping[str, Any]]) -> Chains:
    """The chains with these fields of the steps of a type, where they have one; a chain that this changes is called as
    `write` has it. Raises InputError where none has such a step, or one has several."""
    for kind, fields in changes.items():
        require(
            not fields or any(type(step) is kind for steps in chains.values() for step in steps),
            f"{', '.join(fields)} set for {kind.__name__}, which is not in this recipe: choose another recipe",
        )
    out: Chains = {}
    for name, steps in chains.items():
        after = recipe.override(steps, changes)
        out[name if after == steps else write(after)] = after
    return out


def to_toml(chains: Mapping[str, str]) -> str:
    """The text of a file with chains by name."""
    quoted = lambda text: json.dumps(text, ensure_ascii=False)
    return "".join(f"{quoted(name)} = {quoted(text)}\n" for name, text in chains.items())


def file_name(name: str) -> str:
    """The name of a chain as a file and a row of a table have it: w8a16,distill@0.5 is w8a16+distill@0.5, and signs
    that a file's name may not have everywhere are -."""
    return re.sub(r"[^\w@.=+,\[\]-]+", "-", re.sub(r",(?![^\[]*\])", "+", name))


def steps_of(parts: Sequence[str], defaults: Defaults = NONE) -> tuple[Step, ...]:
    """Of a chain, see `chains`. Raises InputError."""
    out: list[Step] = []
    for part in parts:
        name, value, inside = _PART.fullmatch(part).groups()
        if name not in recipe.RECIPES:
            out.append(_step(part, name, value, _settings(part, inside), defaults))
            continue
        text = recipe.RECIPES[name]
        require(part == name, f"{part}: {name} is a recipe, which has no settings: write it out, as {text}")
        out += steps_of(_split(text)[0])
    return tuple(out)


def _settings(part: str, inside: str | None) -> dict[str, str]:
    found = {}
    for each in _BETWEEN_SETTINGS.split(inside) if inside else ():
        field, equals, text = each.partition("=")
        require(bool(equals), f"{part}: {each.strip()!r} is no setting: say field=value")
        require(field.strip() not in found, f"{part}: {field.strip()} is set twice: leave one out")
        found[field.strip()] = text.strip()
    return found


def _step(part: str, name: str, value: str | None, settings: Mapping[str, str], defaults: Defaults) -> Step:
    """part: what is read, for errors."""
    within = f" (in {part})" if part != name else ""
    require(name in recipe.STEPS, f"there is no step or recipe {name!r}{within}: {_meant(name)}")
    kind, own = recipe.STEPS[name], defaults.get(recipe.STEPS[name], {})
    sets = {} if value is None else _at(part, kind, value, own)
    twice = [field for field, text in sets.items() if field in settings and text == value]
    require(not twice, f"{part}: {''.join(twice)} is set twice, by @{value} too: leave one out")
    given = sets | settings
    hints = typing.get_type_hints(kind)
    fields = [field.name for field in dataclasses.fields(kind) if not field.metadata.get("internal")]
    for field in given:
        close = difflib.get_close_matches(field, fields, n=1)
        listed = f"did you mean {close[0]}?" if close else f"its settings are {', '.join(fields) or 'none'}"
        require(field in fields, f"{part}: {name} has no setting {field!r}: {listed}")
    typed = {field: written.value(f"{part}: {field}", hints[field], text) for field, text in given.items()}
    try:
        return kind(**{**own, **typed})
    except InputError as error:
        raise InputError(f"{part}: {error}") from None


def _at(part: str, kind: type, value: str, own: Mapping[str, Any]) -> dict[str, str]:
    """{field: text} that @value sets."""
    at = getattr(kind, "at", None)
    require(at is not None, f"{part}: {kind.__name__.lower()} has no value after @: leave it out")
    if at != "steps":
        try:
            return at(value) if callable(at) else {at: value}
        except InputError as error:
            raise InputError(f"{part}: {error}") from None
    share = written.value(f"{part}: the share of its steps", float, value)
    require(0 < share <= 1, f"{part}: a share of its steps must be in (0, 1]: say [steps={value}] for a number of them")
    return {at: str(max(1, round(share * own.get(at, kind.steps))))}


def _meant(name: str) -> str:
    close = difflib.get_close_matches(name, [*recipe.STEPS, *recipe.RECIPES], n=3)
    return f"did you mean {' or '.join(close)}?" if close else _choices()


def _choices() -> str:
    return f"steps are {', '.join(recipe.STEPS)}; recipes are {', '.join(recipe.RECIPES)}"


def _written(step: Any) -> str:
    """With a value after @ where that does not leave more settings for the brackets."""
    kind = type(step)
    name = kind.__name__.lower()
    if not dataclasses.is_dataclass(step):
        return name
    fields = dataclasses.fields(step)
    texts = {field.name: _text(getattr(step, field.name)) for field in fields}
    usual = {field.name: _text(field.default) for field in fields}
    differ = lambda base: {field: text for field, text in texts.items() if text != base[field]}
    value, rest, at = "", differ(usual), getattr(kind, "at", "steps")
    for each in texts.values() if at != "steps" else ():
        if _PART.fullmatch(f"{name}@{each}"):
            sets = at(each) if callable(at) else {at: each}
            left = differ(usual | sets)
            right = not any(text == each for field, text in sets.items() if field in left)
            if right and (len(left) < len(rest) or (len(left) == len(rest) and not value and each != "0")):
                value, rest = f"@{each}", left
    inside = ",".join(f"{field}={text}" for field, text in rest.items())
    return f"{name}{value}" + (f"[{inside}]" if inside else "")


def _text(value: Any) -> str:
    """Of what no text can say, as a plan that a program made, the name of its type."""
    return written.text(value) if isinstance(value, str | int | float | None) else type(value).__name__


def _of_file(file: Path, name: str) -> dict[str, list[str]]:
    try:
        found = tomllib.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"cannot read {file} ({error.strerror or error}): give a file of chains") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise InputError(f"{file} is not TOML ({error}): see efflm/compress/README.md for how it is written") from None
    require(bool(found), f"{file} has no chain: write one, as in small = 'gptq@3'")
    require(not name or name in found, f"{file} has no chain {name!r}: choose from {', '.join(found)}")
    try:
        return {key: _of_toml(value) for key, value in found.items() if not name or key == name}
    except InputError as error:
        raise InputError(f"{file}: {error}") from None


def _of_toml(value: Any) -> list[str]:
    """The parts of a text, of a table of a step and its settings, or of several of both, one after the other."""
    if isinstance(value, str):
        found = _split(value)
        require(len(found) == 1, f"{value!r} is {len(found)} chains, but must be one: put commas between the steps")
        return found[0]
    if isinstance(value, list) and value:
        return [part for each in value for part in _of_toml(each)]
    require(
        isinstance(value, dict) and isinstance(value.get("step"), str),
        f"{value!r} is no step: write a text such as 'gptq@3', or a table such as {{step = 'gptq', bits = 3}}",
    )
    inside = ",".join(f"{field}={written.text(each)}" for field, each in value.items() if field != "step")
    return _of_toml(value["step"] + (f"[{inside}]" if inside else ""))
