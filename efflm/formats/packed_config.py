"""What the quantization_config of a config.json says of each matrix: compressed-tensors, GPTQ and AWQ; and back."""

import dataclasses
import re
from collections.abc import Mapping
from typing import Any, Literal

from efflm.config import InputError, require
from efflm.ops.format import Activations

WIDTHS = (8, 4, 3, 2)  # bits of codes that these formats store
REMEDY = "give the model before it was quantized, or a GGUF file of it"
# Keys that change no logits: how the codes were found, and what only writing or running elsewhere reads.
_HARMLESS = """
    quant_method method version global_compression_ratio desc_act sym true_sequential damp_percent damp_auto_increment
    static_groups mse act_group_aware model_name_or_path model_file_base_name tokenizer dataset model_seqlen
    block_name_to_quantize module_name_preceding_first_block modules_in_block_to_quantize modules_to_not_convert
    batch_size pad_token_id max_input_length cache_block_outputs lm_head meta backend use_cuda_fp16 use_exllama
    exllama_config disable_exllama offload_to_disk offload_to_disk_path pack_impl pack_dtype do_fuse
    fuse_max_seq_len modules_to_fuse zero_point provider autoround_version iters nsamples seqlen
    static_attention_granularity static_kv_granularity
"""
# Of weights and of activations in compressed-tensors, and what their absence means.
_ARGUMENTS = {"num_bits": 8, "type": "int", "symmetric": True, "dynamic": False} | dict.fromkeys(
    ("strategy", "group_size", "actorder", "observer", "observer_kwargs", "scale_dtype", "zp_dtype")
)
# What could take exponential time to match: a repeated group, a counted repetition, a look around, a reference back.
_SLOW = re.compile(r"\)[*+?{]|\(\?(?!:)|\{|\\[1-9]")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Scheme:
    """How the matrix of a linear layer is stored.

    layout: "int", a code a byte, and "packed", codes in int32 along the inputs, are those of compressed-tensors; "gptq"
    stores zero points less 1, "gptq_v2" as they are; "awq". symmetric: no zero points are stored. See ops.Format.
    """

    layout: Literal["int", "packed", "gptq", "gptq_v2", "awq"]
    bits: int
    group: int = 0
    symmetric: bool = True
    activations: Activations = "float"


@dataclasses.dataclass(frozen=True)
class Quantized:
    """What each linear layer is, None for floats: by its name, by the patterns that match it, or by "Linear" among the
    names, in this order, as in compressed-tensors; a pattern with None goes before all."""

    named: Mapping[str, Scheme | None]
    patterns: tuple[tuple[str, Scheme | None], ...] = ()

    def of(self, module: str) -> Scheme | None:
        fits = [scheme for pattern, scheme in self.patterns if re.match(pattern, module)]
        if None in fits:
            return None
        return self.named[module] if module in self.named else next(iter(fits), self.named.get("Linear"))


def read(values: Any) -> Quantized | None:
    """What a quantization_config says; None where there is none. Raises InputError for what is not supported."""
    if not values:
        return None
    values = _object({"": values}, "")
    method = values.get("quant_method", "compressed-tensors" if "config_groups" in values else None)
    methods = {"compressed-tensors": _compressed_tensors, "gptq": _gptq, "awq": _awq}
    require(
        isinstance(method, str) and method in methods,
        f"quantization_config has the quant_method {_shown(method)}, but only {', '.join(methods)} are read: {REMEDY}",
    )
    return methods[method](values)


# --- GPTQ and AWQ ----------------------------------------------------------------------------------------------------


def _gptq(values: dict[str, Any]) -> Quantized:
    _require_known(values, "bits", "group_size", "checkpoint_format", "format", "data_type")
    _require_one_of(values, "data_type", None, "int")  # AutoRound's
    layout = values.get("checkpoint_format") or values.get("format") or "gptq"
    _require_one_of({"checkpoint_format": layout}, "checkpoint_format", "gptq", "gptq_v2")
    scheme = Scheme(layout=layout, bits=_bits(values, "bits"), group=_group(values), symmetric=False)
    return Quantized({"Linear": scheme})


def _awq(values: dict[str, Any]) -> Quantized:
    layouts = ("version", "checkpoint_format", "format")
    _require_known(values, "bits", "w_bit", "group_size", "q_group_size", *layouts)
    given = {"bits": values.get("w_bit", 4), "group_size": values.get("q_group_size")} | values
    layout = next((values[key] for key in layouts if values.get(key)), "gemm")
    _require_one_of({"version": layout}, "version", "gemm", "GEMM")
    _require_one_of(given, "bits", 4)
    return Quantized({"Linear": Scheme(layout="awq", bits=4, group=_group(given), symmetric=False)})


# --- compressed-tensors ----------------------------------------------------------------------------------------------

_LAYOUTS = {"int-quantized": "int", "naive-quantized": "int", "pack-quantized": "packed"}
_MIXED = "mixed-precision"


def _compressed_tensors(values: dict[str, Any]) -> Quantized:
    dense = ("sparsity_config",) if values.get("sparsity_config") == {"format": "dense"} else ()
    _require_known(values, "format", "quantization_status", "config_groups", "ignore", *dense)
    _require_one_of({"quantization_status": "compressed"} | values, "quantization_status", "compressed")
    _require_one_of(values, "format", None, *_LAYOUTS, _MIXED)
    named: dict[str, Scheme | None] = {}
    patterns: list[tuple[str, Scheme | None]] = []
    groups = _object(values, "config_groups")
    for key in groups:
        group = _object(groups, key)
        _add(group.get("targets"), _scheme(group, values.get("format")), named, patterns)
    _add(values.get("ignore") or [], None, named, patterns)
    return Quantized(named, tuple(patterns))


def _scheme(group: dict[str, Any], format_: Any) -> Scheme:
    """One of the config_groups. Raises InputError."""
    _require_known(group, "targets", "weights", "input_activations", "format")
    layout = {"format": group.get("format") or format_}
    _require_one_of(layout, "format", *_LAYOUTS)
    weights = _ARGUMENTS | _object(group, "weights")
    _require_known(weights, *_ARGUMENTS)
    _require_one_of(weights, "type", "int")
    _require_one_of(weights, "symmetric", True, False)
    _require_one_of(weights, "strategy", None, "channel", "group")
    _require_one_of(weights, "actorder", None, False, "weight", "static")
    activations, inputs = "float", group.get("input_activations") and _ARGUMENTS | _object(group, "input_activations")
    if inputs:
        _require_known(inputs, *_ARGUMENTS)
        for key, wanted in {"num_bits": 8, "type": "int", "symmetric": True}.items():
            _require_one_of(inputs, key, wanted)
        _require_one_of(inputs, "dynamic", True, False)
        _require_one_of(inputs, "strategy", "token" if inputs["dynamic"] else "tensor")
        activations = "int8" if inputs["dynamic"] else "int8_static"
    return Scheme(
        layout=_LAYOUTS[layout["format"]],
        bits=_bits(weights, "num_bits"),
        group=_group(weights),
        symmetric=weights["symmetric"],
        activations=activations,
    )


def _add(
    targets: Any, scheme: Scheme | None, named: dict[str, Scheme | None], patterns: list[tuple[str, Scheme | None]]
) -> None:
    """Put the scheme of these targets, names or "re:" and a pattern, where it belongs; an earlier one stays unless this
    is None. Raises InputError for what is no pattern or could match for ever."""
    require(
        isinstance(targets, list) and all(isinstance(target, str) for target in targets),
        f"{_shown(targets)} in the quantization_config must be a list of modules",
    )
    for target in targets:
        if not target.startswith("re:"):
            named[target] = scheme if scheme is None else named.get(target, scheme)
            continue
        pattern = target[3:]
        slow = len(pattern) > 200 or _SLOW.search(pattern) or sum(map(pattern.count, "*+")) > 3 or len(patterns) > 200
        require(not slow, f"the pattern {_shown(pattern)} in the quantization_config could take too long: name modules")
        try:
            re.compile(pattern)
        except (re.error, RecursionError, OverflowError) as error:
            raise InputError(f"{_shown(pattern)} in the quantization_config is no pattern ({error})") from None
        patterns.append((pattern, scheme))


def write(schemes: Mapping[str, Scheme | None]) -> dict[str, Any]:
    """The quantization_config of compressed-tensors for these linear modules, None for those of floats."""
    names: dict[Scheme, list[str]] = {}
    for module, scheme in schemes.items():
        if scheme:
            names.setdefault(scheme, []).append(module)
    formats = {scheme: next(key for key, layout in _LAYOUTS.items() if layout == scheme.layout) for scheme in names}
    mixed = len(set(formats.values())) > 1
    groups = {}
    for i, (scheme, modules) in enumerate(names.items()):
        weights = {"num_bits": scheme.bits, "type": "int", "symmetric": scheme.symmetric, "dynamic": False}
        weights |= {"strategy": "group" if scheme.group else "channel", "group_size": scheme.group or None}
        token = scheme.activations == "int8"
        inputs = {"num_bits": 8, "type": "int", "symmetric": True, "dynamic": token}
        inputs |= {"strategy": "token" if token else "tensor", "group_size": None}
        groups[f"group_{i}"] = {
            "targets": ["Linear"] if len(names) == 1 else modules,
            "weights": weights,
            "input_activations": None if scheme.activations == "float" else inputs,
            "output_activations": None,
        } | ({"format": formats[scheme]} if mixed else {})
    return {
        "quant_method": "compressed-tensors",
        "format": _MIXED if mixed else next(iter(formats.values())),
        "quantization_status": "compressed",
        "global_compression_ratio": None,
        "kv_cache_scheme": None,
        "ignore": [module for module, scheme in schemes.items() if scheme is None],
        "config_groups": groups,
    }


# --- checks ----------------------------------------------------------------------------------------------------------


def _shown(value: Any) -> str:
    return f"{value!r:.60}"


def _require_one_of(values: dict[str, Any], key: str, *choices: Any) -> None:
    value = values.get(key)
    good = any(type(value) is type(choice) and value == choice for choice in choices)
    known = " or ".join(_shown(choice) for choice in choices if choice not in (None, {}))
    require(
        good,
        f"{key} in the quantization_config is {_shown(value)}, but only {known or 'none'} is supported: {REMEDY}",
    )


def _require_known(values: dict[str, Any], *used: str) -> None:
    """Raise InputError for a key that is not used and may change what is computed, unless it is null or empty."""
    for key, value in values.items():
        require(
            key in used or key in _HARMLESS.split() or not value,
            f"{key:.60} in the quantization_config is {_shown(value)}, which is not supported: if it changes "
            f"nothing of what is computed, remove it, else {REMEDY}",
        )


def _object(values: dict[str, Any], key: str) -> dict[str, Any]:
    found = values.get(key)
    good = isinstance(found, dict) and len(found) > 0
    require(good, f"{key:.60} in the quantization_config is {_shown(found)}, but must be an object with settings")
    return found


def _bits(values: dict[str, Any], key: str) -> int:
    _require_one_of(values, key, *WIDTHS)
    return values[key]


def _group(values: dict[str, Any]) -> int:
    size = values.get("group_size")
    good = size is None or (type(size) is int and (size == -1 or 0 < size < 2**31))
    require(good, f"group_size in the quantization_config is {_shown(size)}, but must be -1 or a positive whole number")
    return 0 if size in (None, -1) else size
