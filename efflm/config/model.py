"""A model: its sizes and what it computes, checked for values that no model has."""

import dataclasses
from typing import Any, Literal

from efflm.config import InputError, Precision, flag, require, require_choices, types

MOST, MOST_LAYERS = 2**31 - 1, 10_000  # of anything that an array or a position counts; of layers
MOST_EXPERTS = 1024  # of a layer
OR_NONE = ("window", "experts", "experts_per_token")  # fields of which 0 means that there is none
# From, to: of every field of a model's config that is a float.
RANGES = {"rope_base": (1, 1e30), "norm_epsilon": (0, 1), "rotary_fraction": (1e-3, 1), "local_rope_base": (0, 1e30)}
RANGES |= {"norm_offset": (0, 1)} | dict.fromkeys(("query_scalar", "score_cap", "logit_cap"), (0, 1e6))
RANGES |= dict.fromkeys(
    ("factor", "low_freq_factor", "high_freq_factor", "beta_fast", "beta_slow", "attention_factor", "embedding_scale"),
    (1e-3, 1e6),
)


def _require_types(config: Any, prefix: str = "") -> None:
    """Raise InputError for a field of a model's config that is not of its type, not finite, or out of its range.

    Whole numbers in place of floats, as JSON has them, become floats.
    """
    require_choices(config, prefix)
    for name, kind in types(type(config)).items():
        value, good, wanted = getattr(config, name), True, ""
        number = isinstance(value, int | float) and not isinstance(value, bool)
        if kind is int:
            least, most = int(name not in OR_NONE), MOST_LAYERS if name == "layers" else MOST
            good = number and isinstance(value, int) and least <= value <= most
            wanted = f", but must be a whole number from {least} to {most:,}" + ("; 0 for none" if least == 0 else "")
        elif kind is float:
            least, most = RANGES[name]
            good, wanted = number and least <= value <= most, f", but must be a number from {least:g} to {most:g}"
        elif kind is bool:
            good, wanted = isinstance(value, bool), ", but must be true or false"
        require(good, f"{prefix}{name} is {value!r:.60}{wanted}")
        if kind is float:
            object.__setattr__(config, name, float(value))


def _made(kind: type, values: Any, what: str) -> Any:
    """The dataclass with these fields. Raises InputError for one that it has not, and for one that is missing."""
    require(isinstance(values, dict), f"{what} is {values!r:.60}, but must be an object")
    fields = {field.name: field.default is dataclasses.MISSING for field in dataclasses.fields(kind)}
    unknown = [name for name in values if name not in fields]
    require(not unknown, f"{what} has {unknown[:1]!r:.60}, which this version of efflm does not know: update it")
    missing = [name for name, needed in fields.items() if needed and name not in values]
    require(not missing, f"{what} does not say {', '.join(missing)}: write the model again")
    return kind(**values)


@dataclasses.dataclass(frozen=True, kw_only=True)
class BlockConfig:
    """One Transformer layer. Layers may differ, since compressed layers do. A window of 0 attends to all before.

    experts: feed-forward parts of mlp_dim, of which each token is given to experts_per_token; 0: one for all tokens.
    """

    heads: int
    kv_heads: int
    head_dim: int
    mlp_dim: int
    window: int = 0
    experts: int = 0
    experts_per_token: int = 0

    def __post_init__(self):
        _require_types(self)
        require(self.heads * self.head_dim <= MOST, f"heads {self.heads} x head_dim {self.head_dim} is over {MOST:,}")
        require(
            self.heads % self.kv_heads == 0,
            f"heads {self.heads} is not divisible by kv_heads {self.kv_heads}: choose a divisor of the heads",
        )
        require(
            self.experts <= MOST_EXPERTS and 0 <= self.experts_per_token <= self.experts,
            f"experts is {self.experts} and experts_per_token {self.experts_per_token}, but must be at most "
            f"{MOST_EXPERTS} and at most as many",
        )
        require(
            bool(self.experts) == bool(self.experts_per_token),
            f"experts is {self.experts}, but experts_per_token {self.experts_per_token}: set both or neither",
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class RopeScaling:
    """How Llama 3.1 stretches its rotary embedding beyond the length it was trained on first (see model.rotary)."""

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_length: int
    kind: Literal["llama3"] = "llama3"

    def __post_init__(self):
        _require_types(self)
        require(
            self.high_freq_factor > self.low_freq_factor,
            f"high_freq_factor is {self.high_freq_factor}, but must be above low_freq_factor {self.low_freq_factor}",
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class LinearScaling:
    """All frequencies are divided by the factor: position interpolation (Chen 2023, arXiv 2306.15595)."""

    factor: float
    kind: Literal["linear"] = "linear"

    def __post_init__(self):
        _require_types(self)


@dataclasses.dataclass(frozen=True, kw_only=True)
class DynamicScaling:
    """The base grows with a text that is longer than max_length ("dynamic NTK"). No text here is: up to max_length
    nothing is scaled, and beyond it a token's result would depend on how many are read at a time."""

    factor: float
    kind: Literal["dynamic"] = "dynamic"

    def __post_init__(self):
        _require_types(self)


@dataclasses.dataclass(frozen=True, kw_only=True)
class YarnScaling:
    """YaRN (Peng 2023, arXiv 2309.00071): see model.rotary.

    beta_fast, beta_slow: rotations in the original length from which on a frequency is kept, and up to which it is
    divided by the factor. attention_factor: of the cosines and sines. truncate: whether the range in between is widened
    to whole dimensions.
    """

    factor: float
    original_max_length: int
    attention_factor: float
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = True
    kind: Literal["yarn"] = "yarn"

    def __post_init__(self):
        _require_types(self)
        require(
            self.beta_fast > self.beta_slow,
            f"beta_fast is {self.beta_fast}, but must be above beta_slow {self.beta_slow}",
        )


Scaling = RopeScaling | LinearScaling | DynamicScaling | YarnScaling
SCALINGS: dict[str, type[Scaling]] = {
    "llama3": RopeScaling, "linear": LinearScaling, "dynamic": DynamicScaling, "yarn": YarnScaling,
}  # fmt: skip


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """A decoder-only Transformer.

    The Llama family is norm="rms", position="rotary", feedforward="swiglu", no biases; the GPT-2 family is
    norm="layer", position="learned", feedforward="gelu" (the tanh form), biases, tied embeddings. Other families
    differ from these by a few of the fields below (see formats.families).

    bias: of every linear layer; qkv_bias: of queries, keys and values alone. qk_norm: the queries and the keys of each
    head are RMS-normed before they are rotated. parallel: attention and feed-forward part read the same input.
    rotary_fraction: the share of each head, counted from its start, that is rotated.

    What Gemma 2 and 3 have: "geglu", SwiGLU with the tanh form of a GELU. post_norm: what the attention and the
    feed-forward part of a layer give is normed before it is added. norm_offset: what every norm adds to its scale.
    embedding_scale: factor of the embeddings that the first layer reads. query_scalar: scores are divided by its root
    (0: by that of the head's size). score_cap, logit_cap: c of the soft cap c tanh(x / c) of scores and logits (0:
    none). local_rope_base: of layers with a window, which no rope_scaling changes then (0: rope_base).

    Of mixtures of experts: renormalized: the shares of the experts that a token is given to sum to 1. qk_norm_whole:
    qk_norm is over all heads together.

    precision: of the operands of matmuls when the model is run; it does not depend on the dtype of the weights, and can
    be overridden. unused: ids without a token, as ranges (first, one past the last) in order, which loading a model
    with its tokenizer finds: they are never generated, and compared with nothing.
    """

    vocabulary: int
    width: int
    max_length: int
    blocks: tuple[BlockConfig, ...]
    norm: Literal["rms", "layer"] = "rms"
    position: Literal["rotary", "learned"] = "rotary"
    feedforward: Literal["swiglu", "geglu", "gelu", "gelu_exact"] = "swiglu"
    bias: bool = False
    tied: bool = True
    rope_base: float = 10000.0
    norm_epsilon: float = 1e-5
    qkv_bias: bool = False
    qk_norm: bool = False
    parallel: bool = False
    rotary_fraction: float = 1.0
    rope_scaling: Scaling | None = None
    post_norm: bool = False
    norm_offset: float = 0.0
    embedding_scale: float = 1.0
    query_scalar: float = 0.0
    score_cap: float = 0.0
    logit_cap: float = 0.0
    local_rope_base: float = 0.0
    renormalized: bool = False
    qk_norm_whole: bool = False
    precision: Precision = "float32"
    unused: tuple[tuple[int, int], ...] = ()

    def __post_init__(self):
        require(len(self.blocks) > 0, "blocks is empty: a model needs at least one layer")
        _require_types(self)
        if self.position == "rotary":
            for size in {block.head_dim for block in self.blocks}:
                rotated = int(size * self.rotary_fraction)
                require(
                    rotated > 0 and rotated % 2 == 0,
                    f"{rotated} of head_dim {size} would be rotated, but rotary positions need an even number of them",
                )
        require(
            not isinstance(self.rope_scaling, YarnScaling) or self.rope_base > 1,
            f"rope_base is {self.rope_base}, but must be above 1 with the rotary scaling yarn",
        )

    @property
    def gated(self) -> bool:
        """Whether the feed-forward part is (activation(x gate) * (x up)) down."""
        return self.feedforward in ("swiglu", "geglu")

    @property
    def tokens(self) -> int:
        """Entries of the vocabulary up to the last id that has a token: those behind it pad the vocabulary."""
        padded = self.unused and self.unused[-1][1] == self.vocabulary
        return self.unused[-1][0] if padded else self.vocabulary

    def to_dict(self) -> dict[str, Any]:
        """Plain values, as JSON holds them; without `unused`, which the tokenizer tells."""
        plain = dataclasses.asdict(self) | {"blocks": [dataclasses.asdict(block) for block in self.blocks]}
        return {name: value for name, value in plain.items() if name != "unused"}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "ModelConfig":
        """The inverse of to_dict. Raises InputError for whatever is not what to_dict writes."""
        require(isinstance(values, dict), f"the config is {values!r:.60}, but must be an object")
        blocks, scaling = values.get("blocks"), values.get("rope_scaling")
        require(
            isinstance(blocks, list | tuple) and len(blocks) <= MOST_LAYERS,
            f"blocks is {blocks!r:.60}, but must be a list of at most {MOST_LAYERS:,} layers",
        )
        made = {"blocks": tuple(_made(BlockConfig, block, f"blocks[{i}]") for i, block in enumerate(blocks))}
        if scaling is not None:
            kind = scaling.get("kind", "llama3") if isinstance(scaling, dict) else "llama3"
            require(isinstance(kind, str) and kind in SCALINGS, f"rope_scaling.kind is {kind!r:.60}: update efflm")
            made["rope_scaling"] = _made(SCALINGS[kind], scaling, "rope_scaling")
        return _made(cls, values | made, "the config")


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelShape:
    """The model, whose layers are all alike"""

    family: Literal["llama", "gpt2"] = flag("llama", "RMSNorm, RoPE, SwiGLU; or LayerNorm, learned positions, GELU")
    layers: int = flag(6, "number of Transformer layers")
    width: int = flag(256, "width of the residual stream")
    heads: int = flag(4, "query heads; must divide the width")
    kv_heads: int = flag(2, "key and value heads; must divide the heads")
    mlp_dim: int = flag(704, "width of the feed-forward layer")
    vocabulary: int = flag(4096, "entries of the byte-level BPE vocabulary")
    max_length: int = flag(1024, "longest sequence the model is asked to read, in tokens")
    window: int = flag(0, "how many positions back a layer attends, its own included; 0: all of them")
    tied: bool = flag(True, "share the input and output embeddings")

    def __post_init__(self):
        require(self.layers != 0, "model.layers is 0: a model needs at least one layer, so set it to 1 or more")
        _require_types(self, "model.")
        require(
            self.width % self.heads == 0,
            f"model.width {self.width} is not divisible by model.heads {self.heads}: change one of them",
        )
        size = self.width // self.heads
        require(
            self.family != "llama" or size % 2 == 0,
            f"model.width {self.width} / model.heads {self.heads} is {size}, but rotary positions need heads of an "
            "even size: change one of them",
        )
        require(
            self.vocabulary >= 257,
            f"model.vocabulary is {self.vocabulary}, but 256 bytes and a separator need at least 257",
        )
        try:
            self.config()
        except InputError as error:  # which begins with the name of a field
            raise InputError(f"model.{error}") from None

    def config(self) -> ModelConfig:
        block = BlockConfig(
            heads=self.heads,
            kv_heads=self.kv_heads,
            head_dim=self.width // self.heads,
            mlp_dim=self.mlp_dim,
            window=self.window,
        )
        common = {
            "vocabulary": self.vocabulary,
            "width": self.width,
            "max_length": self.max_length,
            "blocks": (block,) * self.layers,
            "tied": self.tied,
        }
        if self.family == "llama":
            return ModelConfig(**common)
        return ModelConfig(**common, norm="layer", position="learned", feedforward="gelu", bias=True)
