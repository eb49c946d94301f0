"""Hugging Face's config.json and our ModelConfig, by the family's table. What we do not compute is refused."""

import dataclasses
import re
from typing import Any, Literal

from efflm.config import require
from efflm.config.model import BlockConfig, ModelConfig
from efflm.formats import hf_rotary
from efflm.formats.hf_values import MOST, NEEDED, check, shown

FOREIGN = re.compile(r"expert|moe_|router|softcap|soft_cap")  # keys of what no family here has
# Keys that change no logits: names and versions, what only training or sampling reads, what a call gives back, what the
# tensors themselves say (biases), and how transformers computes the same numbers.
_HARMLESS = """
    architectures model_type auto_map _name_or_path name_or_path transformers_version torch_dtype dtype efflm_precision
    transformers.js_config is_llama_config tokenizer_class prefix finetuning_task
    problem_type id2label label2id _num_labels num_labels task_specific_params bos_token_id eos_token_id pad_token_id
    sep_token_id unk_token_id decoder_start_token_id forced_bos_token_id forced_eos_token_id initializer_range
    initializer_factor attention_dropout attention_probs_dropout_prob hidden_dropout hidden_dropout_prob attn_pdrop
    resid_pdrop embd_pdrop classifier_dropout summary_type summary_use_proj summary_activation summary_first_dropout
    summary_proj_to_labels gradient_checkpointing neftune_noise_alpha use_cache output_attentions output_hidden_states
    output_scores return_dict return_dict_in_generate torchscript use_bfloat16 tf_legacy_loss chunk_size_feed_forward
    remove_invalid_values attn_implementation _attn_implementation _attn_implementation_autoset
    _attn_implementation_internal _flash_attn_2_enabled use_flash_attention_2 reorder_and_upcast_attn pretraining_tp
    is_decoder n_ctx max_sequence_length max_length min_length do_sample early_stopping num_beams num_beam_groups
    diversity_penalty temperature top_k top_p typical_p repetition_penalty length_penalty no_repeat_ngram_size
    encoder_no_repeat_ngram_size bad_words_ids suppress_tokens begin_suppress_tokens exponential_decay_length_penalty
    num_return_sequences attention_bias mlp_bias n_special predict_special_tokens output_past custom_pipelines
    _sliding_window_pattern
    _commit_hash base_model_name_or_path trust_remote_code padding_side model_max_length seq_length max_new_tokens
    cache_implementation use_flash_attn use_flash_attn_2 num_logits_to_keep activation_dropout dropout embedding_dropout
    output_router_logits router_aux_loss_coef router_jitter_noise
    residual_dropout layerdrop label_smoothing loss_type gradient_checkpointing_kwargs
"""
HARMLESS = frozenset(_HARMLESS.split())
CAPS = ("score_cap", "logit_cap")  # null and 0: none
MADE_BY = "unsloth_"  # what begins all keys of a program that trains models of these families
# Keys of other models, which may say here what a family does anyway.
NEUTRAL = dict.fromkeys(
    ("is_encoder_decoder", "add_cross_attention", "tie_encoder_decoder", "rope_interleaved", "use_mrope"), False
) | {"use_sliding_window": False, "pruned_heads": {}}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Described:
    """How a family's config.json says what a ModelConfig says.

    fixed: fields of ModelConfig that all its models share. keys: {key: (our name, what its absence means)}, for fields
    of ModelConfig and BlockConfig, `layers`, and where it is rotary `rope_base`. activations: its key, and
    {name: our feedforward}, of which an absent key means the first. only: {key: the one value that is supported, which
    is also the default}. windows: which layers have one: none, all, those of use_sliding_window, or, where layer_types
    does not say it, all but every `pattern`-th. scales_embedding: embedding_scale is the root of the width.
    window: where it is absent. passed_over: keys that say nothing of its models. aliases: {another name: its key}.
    """

    fixed: dict[str, Any]
    keys: dict[str, tuple[str, Any]]
    activations: tuple[str, dict[str, str]]
    only: dict[str, Any] = dataclasses.field(default_factory=dict)
    windows: Literal["none", "all", "some", "pattern"] = "none"
    pattern: int = 0
    scales_embedding: bool = False
    window: int | None = 4096
    passed_over: tuple[str, ...] = ()
    aliases: dict[str, str] = dataclasses.field(default_factory=dict)


def read(family: Described, values: dict[str, Any], layers_at_most: int) -> ModelConfig:
    """The config that `values`, a config.json, describes. Raises InputError for what is missing or unsupported.

    layers_at_most: as many as there can be, experts counted too, so that a number gone wrong makes no list of that
    length.
    """
    for other, key in family.aliases.items():
        if values.get(other) is not None:
            same = values.get(key) in (None, values[other])
            require(same, f"{key} is {shown(values.get(key))}, but {other} {shown(values[other])}: remove one")
            values = {name: value for name, value in values.items() if name != other} | {key: values[other]}
    for key, value in values.items():
        require(
            not (FOREIGN.search(key) and value) or key in family.keys or key in HARMLESS,
            f"{key} is {shown(value)}, but models of this family have no experts and no capped logits",
        )
    _require_known(family, values)
    for key, value in family.only.items():
        found = values.get(key, value)
        require(
            found == value or not (found or value), f"{key} is {shown(found)}, but only {shown(value)} is supported"
        )
    custom = values.get("auto_map")
    require(
        not (isinstance(custom, dict) and "AutoModelForCausalLM" in custom),
        "auto_map names code of the model's own, which is not run: give a model of one of the families as they are",
    )
    found = dict(family.fixed)
    for key, (name, absent) in family.keys.items():
        found[name] = values.get(key, absent)
        if found[name] is None and absent is not NEEDED:  # null is nothing, as elsewhere, and no cap
            found[name] = 0.0 if name in CAPS else absent
        require(found[name] is not NEEDED, f"{key} is missing, so the model's {name} is not known")
        if name in CAPS and not found[name]:
            continue
        if found[name] is not None or (absent is not None and name != "kv_heads"):
            check(key, name, found[name], layers_at_most if name == "layers" else MOST)
    key, activations = family.activations
    activation = values.get(key, next(iter(activations)))
    require(
        isinstance(activation, str) and activation in activations,
        f"{key} is {shown(activation)}, but only {', '.join(activations)} are supported",
    )
    heads, width, layers = found.pop("heads"), found["width"], found.pop("layers")
    experts = found.pop("experts", 0)
    require(
        experts * layers <= layers_at_most,
        f"{experts} experts in each of {layers} layers are more than there are tensors",
    )
    pattern = found.pop("pattern", family.pattern)
    if family.scales_embedding:
        found["embedding_scale"] = width**0.5
    head_dim = found.pop("head_dim", None)
    require(head_dim or width % heads == 0, f"a width of {width} is not divisible by {heads} heads")
    block = BlockConfig(
        heads=heads,
        kv_heads=found.pop("kv_heads", None) or heads,
        experts=experts,
        experts_per_token=found.pop("experts_per_token", 0),
        head_dim=head_dim or width // heads,
        mlp_dim=found.pop("mlp_dim") or 4 * width,
    )
    if found["position"] == "rotary":
        found |= hf_rotary.read(family.keys, values, found)
    windows = _read_windows(family, values, layers, pattern)
    blocks = tuple(dataclasses.replace(block, window=window) for window in windows)
    return ModelConfig(**found, blocks=blocks, feedforward=activations[activation])


def write(family: Described, config: ModelConfig) -> dict[str, Any]:
    """The config.json of the config, as far as the family can say it: `read` it again to know how far that is."""
    block, windows = config.blocks[0], [block.window for block in config.blocks]
    ours = dataclasses.asdict(block) | {field.name: getattr(config, field.name) for field in dataclasses.fields(config)}
    ours |= {"layers": len(windows), "pattern": (*windows, 0).index(0) + 1}
    ours |= {name: ours[name] or None for name in CAPS} | {"query_scalar": int(config.query_scalar)}
    values = family.only | {key: ours[name] for key, (name, _) in family.keys.items()}
    key, activations = family.activations
    values[key] = next((name for name, ours in activations.items() if ours == config.feedforward), None)
    if config.rope_scaling:
        values["rope_scaling"] = hf_rotary.write(config.rope_scaling)
    if family.windows != "none":
        values["sliding_window"] = max(windows) or None
    if family.windows in ("some", "pattern"):
        values["layer_types"] = ["sliding_attention" if window else "full_attention" for window in windows]
    if family.windows == "some":
        full = [i for i, window in enumerate(windows) if not window]
        values |= {"use_sliding_window": any(windows), "max_window_layers": max(full, default=-1) + 1}
    return values


def _require_known(family: Described, values: dict[str, Any]) -> None:
    """Raise InputError for a key that is neither read nor known to change nothing, unless it is null or says what the
    family does anyway."""
    used = {*family.keys, *family.only, *family.passed_over, family.activations[0], "layer_types"}
    used |= set(hf_rotary.KEYS) if family.fixed["position"] == "rotary" else set()
    used |= {"sliding_window"} if family.windows != "none" else set()
    used |= {"use_sliding_window", "max_window_layers"} if family.windows == "some" else set()
    for key, value in values.items():
        off = FOREIGN.search(key) or (key in NEUTRAL and value == NEUTRAL[key])
        require(
            key in used or key in HARMLESS or key.startswith(MADE_BY) or value is None or bool(off),
            f"{key:.80} is {shown(value)}, which is not known of models of this family, so that it may change what is "
            "computed: if it does not, remove it from the config",
        )


def _read_windows(family: Described, values: dict[str, Any], layers: int, pattern: int) -> list[int]:
    """The window of each layer, 0 for none."""
    kinds = values.get("layer_types")
    known = ("full_attention", "sliding_attention")
    require(
        kinds is None or (isinstance(kinds, list) and len(kinds) == layers and all(kind in known for kind in kinds)),
        f"layer_types is {shown(kinds)}, but must name {' or '.join(known)} for each of {layers} layers",
    )
    window = values.get("sliding_window", family.window) if family.windows != "none" else None
    if family.windows == "some":
        used = values.get("use_sliding_window", False)
        require(isinstance(used, bool), f"use_sliding_window is {shown(used)}, but must be true or false")
        window = window if used else None
        first = values.get("max_window_layers", 28) if window is not None and kinds is None else layers
        require(isinstance(first, int), f"max_window_layers is {shown(first)}, but must be a whole number")
        kinds = kinds or [known[i >= first] for i in range(layers)]
    if family.windows == "pattern":
        kinds = kinds or [known[(i + 1) % pattern > 0] for i in range(layers)]
    if window is None:
        require(
            family.windows == "some" or kinds is None or known[1] not in kinds,
            "layer_types has sliding_attention, but the model has no window",
        )
        return [0] * layers
    check("sliding_window", "window", window)
    if family.windows == "all":
        require(kinds is None or known[0] not in kinds, "layer_types mixes layers with and without a window")
        return [window] * layers
    return [window if kind == known[1] else 0 for kind in kinds]
