"""What a run is told: frozen dataclasses, validated when made. `flags` makes command lines of them."""

import dataclasses
import functools
import os
import typing
from typing import Any, Literal


class InputError(ValueError):
    """Something the user gave is wrong. The message is one line: the thing, its value, and the remedy."""


class Stopped(Exception):
    """A run was asked to stop and did so in good order: its message is for the user, and the exit code is 0."""


def flag(default: Any, help: str, internal: bool = False, path: bool = False) -> Any:
    """A dataclass field that the bridge turns into a flag with this default and help text.

    internal: scripts set it, so that --help leaves it out. path: it may name a file or folder, which may begin with ~.
    """
    return dataclasses.field(default=default, metadata={"help": help, "internal": internal, "path": path})


def at_home(path: str) -> str:
    """A path as the user gave it, with the home folder in place of a ~ or ~user that it begins with.

    Raises InputError if there is no such home: a folder of that name is never meant."""
    found = os.path.expanduser(path)
    require(
        not found.startswith("~"),
        f"{path} begins with ~, but the home folder it names is not known: write ./{path} for what is here",
    )
    return found


def require(condition: bool, message: str) -> None:
    """Raise InputError(message) unless the condition holds."""
    if not condition:
        raise InputError(message)


def require_seed(value: int) -> None:
    """JAX drops what is beyond 32 bits: without this, different seeds would draw the same."""
    require(0 <= value < 1 << 32, f"seed is {value}, but must be from 0 to {(1 << 32) - 1}")


def require_sparsity(value: float) -> None:
    require(0 <= value < 1, f"sparsity is {value}, but must be in [0, 1): the fraction of weights to remove")


MOST, MOST_LAYERS = 2**31 - 1, 10_000  # of anything that an array or a position counts; of layers
# From, to: of every field of a model's config that is a float.
RANGES = {"rope_base": (1, 1e30), "norm_epsilon": (0, 1), "rotary_fraction": (1e-3, 1)} | dict.fromkeys(
    ("factor", "low_freq_factor", "high_freq_factor"), (1e-3, 1e6)
)
_hints = functools.cache(typing.get_type_hints)


def _require_types(config: Any, prefix: str = "") -> None:
    """Raise InputError for a field of a model's config that is not of its type, not finite, or out of its range.

    Whole numbers in place of floats, as JSON has them, become floats.
    """
    for name, kind in _hints(type(config)).items():
        value, good, wanted = getattr(config, name), True, ""
        number = isinstance(value, int | float) and not isinstance(value, bool)
        if kind is int:
            least, most = int(name != "window"), MOST_LAYERS if name == "layers" else MOST
            good = number and isinstance(value, int) and least <= value <= most
            wanted = f", but must be a whole number from {least} to {most:,}" + ("; 0 for none" if least == 0 else "")
        elif kind is float:
            least, most = RANGES[name]
            good, wanted = number and least <= value <= most, f", but must be a number from {least:g} to {most:g}"
        elif kind is bool:
            good, wanted = isinstance(value, bool), ", but must be true or false"
        elif typing.get_origin(kind) is Literal:
            good, wanted = value in typing.get_args(kind), f": choose from {typing.get_args(kind)}"
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


Precision = Literal["float32", "bfloat16"]
AskedPrecision = Literal["", "float32", "bfloat16", "auto"]
PRECISION = (  # the flag's help
    "dtype of the operands of matmuls; auto measures for a second which one is faster here; default: what the model "
    "was saved for"
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class BlockConfig:
    """One Transformer layer. Layers may differ, since compressed layers do. A window of 0 attends to all before."""

    heads: int
    kv_heads: int
    head_dim: int
    mlp_dim: int
    window: int = 0

    def __post_init__(self):
        _require_types(self)
        require(self.heads * self.head_dim <= MOST, f"heads {self.heads} x head_dim {self.head_dim} is over {MOST:,}")
        require(
            self.heads % self.kv_heads == 0,
            f"heads {self.heads} is not divisible by kv_heads {self.kv_heads}: choose a divisor of the heads",
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class RopeScaling:
    """How Llama 3.1 stretches its rotary embedding beyond the length it was trained on first (see model.rotary)."""

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_length: int

    def __post_init__(self):
        _require_types(self)
        require(
            self.high_freq_factor > self.low_freq_factor,
            f"high_freq_factor is {self.high_freq_factor}, but must be above low_freq_factor {self.low_freq_factor}",
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """A decoder-only Transformer.

    The Llama family is norm="rms", position="rotary", feedforward="swiglu", no biases; the GPT-2 family is
    norm="layer", position="learned", feedforward="gelu" (the tanh form), biases, tied embeddings. Other families
    differ from these by a few of the fields below (see formats.families).

    bias: of every linear layer; qkv_bias: of queries, keys and values alone. qk_norm: the queries and the keys of each
    head are RMS-normed before they are rotated. parallel: attention and feed-forward part read the same input.
    rotary_fraction: the share of each head, counted from its start, that is rotated. precision: of the operands of
    matmuls when the model is run; it does not depend on the dtype of the weights, and can be overridden. unused: ids
    without a token, as ranges (first, one past the last) in order, which loading a model with its tokenizer finds: they
    are never drawn, and compared with nothing.
    """

    vocabulary: int
    width: int
    max_length: int
    blocks: tuple[BlockConfig, ...]
    norm: Literal["rms", "layer"] = "rms"
    position: Literal["rotary", "learned"] = "rotary"
    feedforward: Literal["swiglu", "gelu", "gelu_exact"] = "swiglu"
    bias: bool = False
    tied: bool = True
    rope_base: float = 10000.0
    norm_epsilon: float = 1e-5
    qkv_bias: bool = False
    qk_norm: bool = False
    parallel: bool = False
    rotary_fraction: float = 1.0
    rope_scaling: RopeScaling | None = None
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
        made["rope_scaling"] = None if scaling is None else _made(RopeScaling, scaling, "rope_scaling")
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


Optimizer = Literal["adamw", "adamw8bit", "adam", "sgd", "lion", "adafactor", "muon", "schedule_free"]
Schedule = Literal["cosine", "linear", "wsd", "constant"]
PolicyName = Literal["float32", "bfloat16", "bfloat16_pure", "float16", "auto"]
Remat = Literal["none", "dots", "full"]
OnNan = Literal["stop", "skip"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """One training run"""

    steps: int = flag(500, "optimizer steps")
    batch: int = flag(8, "sequences in a batch, over all devices")
    length: int = flag(256, "tokens in a sequence")
    optimizer: Optimizer = flag("adamw", "update rule; adamw8bit keeps both moments in 8 bits")
    learning_rate: float = flag(2e-3, "peak learning rate")
    schedule: Schedule = flag(
        "cosine", "course of the learning rate after the warm-up; wsd holds it and decays at the end"
    )
    warmup: int = flag(-1, "steps of linear warm-up; -1: a tenth of all steps, at most 40")
    decay: int = flag(-1, "steps of the decay that ends the wsd schedule; -1: a fifth of all steps")
    final_fraction: float = flag(0.1, "learning rate at the end, as a fraction of the peak")
    weight_decay: float = flag(0.1, "decoupled decay of matrices; norms, biases and embeddings are spared")
    beta1: float = flag(0.9, "decay of the first moment, or the momentum")
    beta2: float = flag(0.99, "decay of the second moment")
    clip: float = flag(1.0, "largest global norm of the gradient")
    z_loss: float = flag(0.0, "weight of the squared log-normalizer in the loss, which keeps logits small")
    policy: PolicyName = flag(
        "float32",
        "dtype of the matmuls, over float32 weights and moments; bfloat16_pure keeps the weights in bfloat16 too, "
        "rounded stochastically; float16 scales the loss dynamically; auto measures for a second whether float32 or "
        "bfloat16 is faster here",
    )
    accumulate: int = flag(
        1, "parts a batch is read in, one after another, for less memory; the devices share each part"
    )
    remat: Remat = flag("none", "what the backward pass computes again: nothing, all but the matmuls, or whole layers")
    scan: bool = flag(False, "one compiled layer looped over (short compile times) in place of unrolled layers")
    on_nan: OnNan = flag("stop", "at a loss or gradient that is not finite: stop, or skip that update and count it")
    log_every: int = flag(10, "steps between lines in metrics.jsonl")

    def __post_init__(self):
        for name in ("steps", "batch", "length", "log_every", "accumulate"):
            require(getattr(self, name) > 0, f"train.{name} is {getattr(self, name)}, but must be positive")
        for name in ("learning_rate", "clip"):
            require(getattr(self, name) > 0, f"train.{name} is {getattr(self, name)}, but must be positive")
        require(
            -1 <= self.warmup < self.steps,
            f"train.warmup is {self.warmup}, but must be less than train.steps={self.steps}: shorten the warm-up",
        )
        require(
            self.schedule != "wsd" or (self.decay >= -1 and self.warmup_steps + self.decay_steps <= self.steps),
            f"the wsd schedule is longer than the training: train.warmup {self.warmup_steps} + train.decay "
            f"{self.decay_steps} exceed train.steps={self.steps}: shorten one of them",
        )
        require(
            self.batch % self.accumulate == 0,
            f"train.batch {self.batch} is not divisible by train.accumulate {self.accumulate}: change one of them",
        )

    @property
    def warmup_steps(self) -> int:
        return min(40, self.steps // 10) if self.warmup == -1 else self.warmup

    @property
    def decay_steps(self) -> int:
        return self.steps // 5 if self.decay == -1 else self.decay


@dataclasses.dataclass(frozen=True, kw_only=True)
class MeshConfig:
    """How the devices are laid out; one axis may be -1: the devices that are left"""

    data: int = flag(-1, "copies of the model, each with its own sequences; -1 takes no more than divide the batch")
    fsdp: int = flag(
        1, "devices that keep a part of the weights, gradients and moments each, and have their own sequences"
    )
    sequence: int = flag(1, "devices that read a part of each sequence each")
    tensor: int = flag(1, "devices that compute a part of every matmul each")

    def __post_init__(self):
        sizes = dataclasses.asdict(self)
        for name, size in sizes.items():
            require(size > 0 or size == -1, f"mesh.{name} is {size}, but must be positive, or -1 for what is left")
        left = [f"mesh.{name}" for name, size in sizes.items() if size == -1]
        require(len(left) < 2, f"{' and '.join(left)} are -1, but only one axis can take the devices that are left")


Kernels = Literal["auto", "avx512", "avx2", "portable", "off"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class MachineConfig:
    """This machine"""

    kernels: Kernels = flag(
        "auto", "form of the C++ kernels that CPUs run; auto: the best that the processor has; off: XLA's code alone"
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class HostsConfig:
    """Several processes that run one program together; the scripts in launch/ set these"""

    coordinator: str = flag(
        "",
        "address:port of process 0; auto: as Slurm, a TPU pod or Open MPI say it; empty: this process is alone",
        internal=True,
    )
    count: int = flag(0, "how many processes there are; not with auto", internal=True)
    index: int = flag(-1, "which of them this one is, from 0; not with auto", internal=True)
    heartbeat: int = flag(
        100, "seconds of silence after which a process is given up and the others stop", internal=True
    )
    stopped: int = flag(
        0, "exit code of a run that SIGTERM stopped; 75 tells the scripts of a cluster to start again", internal=True
    )

    def __post_init__(self):
        require(self.heartbeat > 0, f"hosts.heartbeat is {self.heartbeat}, but must be positive")
        if self.coordinator not in ("", "auto"):
            require(
                0 <= self.index < self.count,
                f"hosts.index is {self.index} of hosts.count {self.count}, but must lie in 0 to count - 1",
            )
            require(
                self.coordinator.rpartition(":")[2].isdigit(),
                f"hosts.coordinator is {self.coordinator!r}: give an address and a port, as in 10.0.0.1:1234",
            )
