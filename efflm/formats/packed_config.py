"""What the quantization_config of a config.json says of each matrix: compressed-tensors, GPTQ and AWQ; and back."""

import dataclasses
import re
from collections.abc import Mapping
from typing import Any, Literal, get_args

from efflm.config import InputError, require
from efflm.ops.format import Activations, Bits

REMEDY = "give the model before it was quantized, or a GGUF file of it"
MOST_TARGETS = 20_000  # each is compared with each module
# Keys that change no logits: how the codes were found, what only writing or running elsewhere reads.
_HARMLESS = {
    "compressed-tensors": "quant_method global_compression_ratio version",
    "gptq": """quant_method desc_act sym true_sequential damp_percent damp_auto_increment static_groups mse
        act_group_aware model_name_or_path model_file_base_name tokenizer dataset model_seqlen block_name_to_quantize
        module_name_preceding_first_block modules_in_block_to_quantize batch_size pad_token_id max_input_length
        cache_block_outputs lm_head meta method backend use_cuda_fp16 use_exllama exllama_config disable_exllama
        max_input_length offload_to_disk offload_to_disk_path pack_impl hyb_act vram_strategy""",
    "awq": """quant_method modules_to_not_convert do_fuse fuse_max_seq_len modules_to_fuse backend exllama_config
        lm_head meta method sym desc_act true_sequential damp_percent dataset tokenizer pack_dtype""",
}
_ARGUMENTS = ("num_bits", "type", "symmetric", "strategy", "group_size", "dynamic", "actorder", "observer")
_ARGUMENTS += ("observer_kwargs", "scale_dtype", "zp_dtype")  # of weights and of activations
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
    """rules: (targets, scheme); a target is a module's name, "re:" and a pattern, or "Linear". ignore: likewise."""

    rules: tuple[tuple[tuple[str, ...], Scheme], ...]
    ignore: tuple[str, ...] = ()

    def of(self, module: str) -> Scheme | None:
        """The scheme of a linear layer; None: its weight is one of floats. Names go before patterns, and these before
        kinds, as in compressed-tensors."""
        fits = lambda target: target == "Linear" or _matches(target, module)
        if any(map(fits, self.ignore)):
            return None
        rank = lambda target: 2 if target == "Linear" else int(target.startswith("re:"))
        found = [(rank(target), scheme) for targets, scheme in self.rules for target in targets if fits(target)]
        return min(found, key=lambda each: each[0])[1] if found else None


def _matches(target: str, module: str) -> bool:
    return bool(re.match(target[3:], module)) if target.startswith("re:") else target == module


def read(values: Any) -> Quantized | None:
    """What a quantization_config says; None where there is none. Raises InputError for what is not supported."""
    if not values:
        return None
    require(isinstance(values, dict), f"quantization_config is {_shown(values)}, but must be an object")
    method = values.get("quant_method", "compressed-tensors" if "config_groups" in values else None)
    methods = {"compressed-tensors": _compressed_tensors, "gptq": _gptq, "awq": _awq}
    require(
        isinstance(method, str) and method in methods,
        f"quantization_config has the quant_method {_shown(method)}, but only {', '.join(methods)} are read: {REMEDY}",
    )
    return methods[method](values)


# --- GPTQ and AWQ ----------------------------------------------------------------------------------------------------


def _gptq(values: dict[str, Any]) -> Quantized:
    _require_known(
        values, "gptq", "bits", "group_size", "checkpoint_format", "format", "pack_dtype", "is_marlin_format"
    )
    layout = values.get("checkpoint_format") or values.get("format") or "gptq"
    _require_one_of(values | {"checkpoint_format": layout}, "checkpoint_format", "gptq", "gptq_v2")
    _require_one_of(values, "pack_dtype", None, "int32", "torch.int32")
    _require_one_of(values, "is_marlin_format", None, False)
    scheme = Scheme(layout=layout, bits=_bits(values, "bits"), group=_group(values), symmetric=False)
    return Quantized(((("Linear",), scheme),))


def _awq(values: dict[str, Any]) -> Quantized:
    layouts = ("version", "checkpoint_format", "format")
    _require_known(values, "awq", "bits", "w_bit", "group_size", "q_group_size", "zero_point", *layouts)
    given = {"bits": values.get("w_bit", 4), "group_size": values.get("q_group_size", -1)} | values
    layout = next((values[key] for key in layouts if values.get(key)), "gemm")
    _require_one_of({"version": layout.lower() if isinstance(layout, str) else layout}, "version", "gemm")
    _require_one_of(given, "bits", 4)
    return Quantized(((("Linear",), Scheme(layout="awq", bits=4, group=_group(given), symmetric=False)),))


# --- compressed-tensors ----------------------------------------------------------------------------------------------

_LAYOUTS = {"int-quantized": "int", "naive-quantized": "int", "pack-quantized": "packed"}
_MIXED = "mixed-precision"


def _compressed_tensors(values: dict[str, Any]) -> Quantized:
    own = ("format", "quantization_status", "config_groups", "ignore")
    off = ("kv_cache_scheme", "transform_config", "moe_sparsity_config", "sparsity_config")
    _require_known(values, "compressed-tensors", *own, *off)
    sparsity = values.get("sparsity_config")
    dense = {"sparsity_config": None} if isinstance(sparsity, dict) and sparsity.get("format") == "dense" else {}
    for key in off:
        _require_one_of(values | dense, key, None, {})
    _require_one_of({"quantization_status": "compressed"} | values, "quantization_status", "compressed")
    _require_one_of(values, "format", None, *_LAYOUTS, _MIXED)
    groups, ignore = values.get("config_groups"), values.get("ignore") or []
    require(
        isinstance(groups, dict) and bool(groups) and all(isinstance(group, dict) for group in groups.values()),
        f"quantization_config.config_groups is {_shown(groups)}, but must hold a group of settings for each scheme",
    )
    rules = [(_targets(group.get("targets")), _scheme(group, values.get("format"))) for group in groups.values()]
    return Quantized(tuple(rules), _targets(ignore))


def _scheme(group: dict[str, Any], format_: Any) -> Scheme:
    """One of the config_groups. Raises InputError."""
    _require_only(group, "targets", "weights", "input_activations", "output_activations", "format")
    layout = {"format": group.get("format") or format_}
    _require_one_of(layout, "format", *_LAYOUTS)
    weights, inputs = (group.get(key) for key in ("weights", "input_activations"))
    _require_one_of(group, "output_activations", None)
    require(
        isinstance(weights, dict), f"weights in the quantization_config is {_shown(weights)}, but must be an object"
    )
    _require_only(weights, *_ARGUMENTS)
    strategy = "group" if (weights.get("group_size") or -1) != -1 else "channel"
    _require_one_of({"strategy": strategy} | weights, "strategy", "channel", "group")
    _require_one_of({"type": "int"} | weights, "type", "int")
    _require_one_of(weights, "actorder", None, False, "weight", "static")
    _require_one_of({"symmetric": True} | weights, "symmetric", True, False)
    return Scheme(
        layout=_LAYOUTS[layout["format"]],
        bits=_bits({"num_bits": 8} | weights, "num_bits"),
        group=_group(weights),
        symmetric=weights.get("symmetric", True),
        activations=_activations(inputs),
    )


def _activations(inputs: Any) -> Activations:
    if inputs is None:
        return "float"
    require(isinstance(inputs, dict), f"input_activations is {_shown(inputs)}, but must be an object or null")
    _require_only(inputs, *_ARGUMENTS)
    given = {"num_bits": 8, "type": "int", "symmetric": True, "dynamic": False} | inputs
    for key, wanted in {"num_bits": 8, "type": "int", "symmetric": True}.items():
        _require_one_of(given, key, wanted)
    _require_one_of(given, "dynamic", True, False)
    _require_one_of(given, "strategy", "token" if given["dynamic"] else "tensor")
    return "int8" if given["dynamic"] else "int8_static"


def _targets(found: Any) -> tuple[str, ...]:
    require(
        isinstance(found, list) and len(found) <= MOST_TARGETS and all(isinstance(target, str) for target in found),
        f"{_shown(found)} in the quantization_config must be a list of at most {MOST_TARGETS:,} modules",
    )
    for pattern in (target[3:] for target in found if target.startswith("re:")):
        slow = len(pattern) > 200 or _SLOW.search(pattern) or sum(map(pattern.count, "*+")) > 3
        require(
            not slow, f"the pattern {pattern!r:.60} in the quantization_config could take too long: name the modules"
        )
        try:
            re.compile(pattern)
        except (re.error, RecursionError, OverflowError) as error:
            raise InputError(f"{pattern!r:.60} in the quantization_config is no pattern ({error})") from None
    return tuple(found)


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


def _require_known(values: dict[str, Any], method: str, *used: str) -> None:
    _require_only(values, *used, *_HARMLESS[method].split())


def _require_only(values: dict[str, Any], *known: str) -> None:
    """Raise InputError for a key that is not known, unless it is null, false or empty."""
    for key, value in values.items():
        require(
            key in known or not value,
            f"{key:.60} in the quantization_config is {_shown(value)}, which is not known, so that it may change "
            f"what is computed: if it does not, remove it, else {REMEDY}",
        )


def _bits(values: dict[str, Any], key: str) -> int:
    _require_one_of(values, key, *get_args(Bits))
    return values[key]


def _group(values: dict[str, Any]) -> int:
    size = values.get("group_size")
    good = size is None or (type(size) is int and (size == -1 or 0 < size < 2**31))
    require(good, f"group_size in the quantization_config is {_shown(size)}, but must be -1 or a positive whole number")
    return 0 if size in (None, -1) else size
