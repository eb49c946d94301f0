"""What a config.json says of rotary positions, which newer files keep together under `rope_parameters`."""

import math
from collections.abc import Sequence
from typing import Any

from efflm.config import require
from efflm.config.model import SCALINGS, Scaling
from efflm.formats.hf_values import check, shown

ORIGINAL = "original_max_position_embeddings"
KEYS = ("rope_scaling", "rope_parameters", "rope_theta", "partial_rotary_factor", ORIGINAL)
LOCAL, GLOBAL = "sliding_attention", "full_attention"
# {rope_type: {key: our field}}.
NAMES: dict[str, dict[str, str]] = {"linear": {"factor": "factor"}, "dynamic": {"factor": "factor"}}
NAMES["llama3"] = {ORIGINAL: "original_max_length"} | {
    name: name for name in ("factor", "low_freq_factor", "high_freq_factor")
}
NAMES["yarn"] = {ORIGINAL: "original_max_length"} | {
    name: name for name in ("factor", "beta_fast", "beta_slow", "attention_factor", "truncate")
}
YARN = {"beta_fast": 32.0, "beta_slow": 1.0, "truncate": True}  # where they are absent
MSCALES = ("mscale", "mscale_all_dim")  # what attention_factor follows from where it is absent


def read(keys: dict[str, tuple[str, Any]], values: dict[str, Any], found: dict[str, Any]) -> dict[str, Any]:
    """rope_base, rotary_fraction, rope_scaling, and local_rope_base where the family has it. keys: of the family;
    found: what these say. Raises InputError."""
    given = {key: values[key] for key in ("rope_scaling", "rope_parameters") if values.get(key)}
    name, rope = next(iter(given.items()), ("rope_parameters", {}))
    for key, value in given.items():
        require(isinstance(value, dict), f"{key} is {shown(value)}, but must be an object")
    same = len(given) < 2 or given["rope_scaling"] == given["rope_parameters"]
    require(same, "rope_scaling and rope_parameters say different things: remove the one that is wrong")
    own, made = {ours: key for key, (ours, _) in keys.items()}, {}
    if "local_rope_base" in own:
        local, rope = _by_layer(name, rope)
        plain = _scaling(f"{name}.{LOCAL}", local, found["max_length"]) is None
        require(plain, f"{name}.{LOCAL} is scaled, which is not supported")
        places = (own["local_rope_base"], values), ("rope_theta", local)
        made["local_rope_base"] = float(_agreed("local_rope_base", places, found["local_rope_base"]))
    said = lambda key, ours: ((own.get(ours), values), (key, values), (key, rope))
    base = _agreed("rope_base", said("rope_theta", "rope_base"), found["rope_base"])
    fraction = said("partial_rotary_factor", "rotary_fraction")
    fraction = _agreed("rotary_fraction", fraction, found.get("rotary_fraction", 1.0))
    require(
        fraction == 1 or "rotary_fraction" in found,
        f"partial_rotary_factor is {fraction}, but heads of this family are rotated as a whole",
    )
    nested = next((key for key, value in rope.items() if isinstance(value, dict)), None)
    require(nested is None, f"{name} differs from layer to layer ({nested}), which is not supported")
    scaling = _scaling(name, rope, found["max_length"])
    original, beside = getattr(scaling, "original_max_length", found["max_length"]), values.get(ORIGINAL)
    require(
        beside is None or beside == original,
        f"{ORIGINAL} is {shown(beside)}, but {original} is what counts with the rope_type {kind_of(rope)}: remove the "
        "one that is wrong",
    )
    return made | {"rope_base": float(base), "rotary_fraction": float(fraction), "rope_scaling": scaling}


def write(scaling: Scaling) -> dict[str, Any]:
    """The inverse: what stands under `rope_scaling`."""
    return {"rope_type": scaling.kind} | {key: getattr(scaling, name) for key, name in NAMES[scaling.kind].items()}


def _by_layer(name: str, rope: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """What is said of layers with a window and of the others: newer files have an object for each."""
    if not rope.keys() & {LOCAL, GLOBAL}:
        return {}, rope
    other = next((key for key in rope if key not in (LOCAL, GLOBAL)), None)
    require(other is None, f"{name}.{other} is {shown(rope.get(other))}, which is not known beside {GLOBAL}")
    for value in rope.values():
        require(value is None or isinstance(value, dict), f"{name} holds {shown(value)}, but must hold objects")
    return rope.get(LOCAL) or {}, rope.get(GLOBAL) or {}


def kind_of(rope: dict[str, Any]) -> Any:
    return rope.get("rope_type", rope.get("type", "default"))


def _scaling(where: str, rope: dict[str, Any], max_length: int) -> Scaling | None:
    kind = kind_of(rope)
    other = rope.get("type", kind)
    require(other == kind, f"{where} has the rope_type {shown(kind)}, but the type {shown(other)}: remove one")
    require(
        isinstance(kind, str) and kind in ("default", *NAMES),
        f"the rope_type is {shown(kind)}, but only default, {', '.join(NAMES)} are supported",
    )
    names, more = NAMES.get(kind, {}), MSCALES if kind == "yarn" else ()
    known = {"rope_theta", "partial_rotary_factor", "rope_type", "type", *names, *more}
    other = next((key for key, value in rope.items() if key not in known and value is not None), None)
    require(
        other is None, f"{where}.{other} is {shown(rope.get(other))}, which is not supported with the rope_type {kind}"
    )
    if kind == "default":
        return None
    given = {key: value for key, value in rope.items() if value is not None}
    absent = {ORIGINAL: max_length} | (YARN if kind == "yarn" else {})
    made = {name: given.get(key, absent.get(key)) for key, name in names.items()}
    for key in more:
        check(f"{where}.{key}", "factor", given.get(key, 1.0))
    for key, name in names.items():
        if name != "attention_factor" or key in given:
            check(f"{where}.{key}", name, made[name])
    if kind == "yarn" and "attention_factor" not in given:
        made["attention_factor"] = _attention_factor(made["factor"], *map(given.get, MSCALES))
    return SCALINGS[kind](**made)


def _attention_factor(factor: float, mscale: float | None, mscale_all_dim: float | None) -> float:
    """What YaRN recommends (section 3.4: 0.1 ln(factor) + 1), in the form that DeepSeek gave it."""
    of = lambda scale: 0.1 * scale * math.log(factor) + 1.0 if factor > 1 else 1.0
    return of(mscale) / of(mscale_all_dim) if mscale and mscale_all_dim else of(1.0)


def _agreed(name: str, places: Sequence[tuple[str | None, dict[str, Any]]], absent: float) -> float:
    """What a config says of our field `name` under these keys of these objects. Raises InputError where they differ:
    versions of transformers read different ones."""
    given = [(where, said[where]) for where, said in places if where and said.get(where) is not None]
    for where, value in given:
        check(where, name, value)
    differ = [(where, value) for where, value in given if value != given[0][1]]
    require(
        not differ,
        f"{given and given[0][0]} is {given and given[0][1]}, but {differ and differ[0][0]} elsewhere in the config is "
        f"{differ and differ[0][1]}: remove the one that is wrong",
    )
    return given[0][1] if given else absent
