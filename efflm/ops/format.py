"""The one description of a number format: how integers and scales (see ops.qarray) stand for a float matrix."""

import dataclasses
from typing import Literal

from efflm.config import require, require_choices

Bits = Literal[8, 7, 6, 5, 4, 3, 2]
Activations = Literal["float", "int8", "int8_static"]
ScaleDtype = Literal["", "float16", "bfloat16", "float32"]
SuperBlock = Literal[0, 256]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Format:
    """bits: of a code. group: entries along the contracted axis that share a scale; 0: all of an output.

    symmetric: of a group the value of the largest magnitude has the least code, -2^(bits - 1), so that scales may be
    negative and all codes are used. Otherwise the range of a group, widened to include 0, fills all codes, one of which
    is its zero point. clip: below 8 bits the range is searched for the least weighted error (ops.grid.grid_of).
    scales: "matrix" gives all groups that of the widest range. scale_dtype: of the scales as they are stored, "":
    float16, or bfloat16 for a matrix with a scale that float16 holds badly (ops.grid.as_stored). super_block: entries
    whose groups have their scales as codes of 8 bits times one scale of that dtype, and zero points in as many bits as
    codes (the idea of llama.cpp's K-quants); 0: each scale is stored in full. It has no effect where an axis has no
    groups. activations: "float" multiplies in floating point (weight-only); "int8" rounds the other operand too, one
    scale per token, computed in the matmul; "int8_static" with one scale for all, known before. coded: for
    entropy-coded files, as a model with such a weight is saved. entropy: not 0: so too, by scales with which codes of
    normal weights have so many bits of entropy, whatever their range (ops.grid.grid_of). Raises InputError.
    """

    bits: Bits = 8
    group: int = 0
    symmetric: bool = True
    clip: bool = False
    scales: Literal["output", "matrix"] = "output"
    scale_dtype: ScaleDtype = ""
    super_block: SuperBlock = 0
    activations: Activations = "float"
    entropy: float = 0.0
    coded: bool = False

    def __post_init__(self):
        require_choices(self)
        require(
            self.group >= 0, f"group is {self.group}, but must be positive, or 0 for one scale for each output channel"
        )
        require(
            not self.super_block or (0 < self.group < self.super_block and self.super_block % self.group == 0),
            f"super_block is {self.super_block}, of groups of {self.group}: give a group that divides it, such as 32",
        )
        require(0 <= self.entropy <= self.bits, f"entropy is {self.entropy}, but must be from 0 to bits, {self.bits}")
        require(
            not self.entropy or (self.symmetric and not self.group and self.scales == "output"),
            f"entropy is {self.entropy}, which is for symmetric codes and a scale for each output: set group to 0",
        )

    def __str__(self) -> str:
        if self.entropy:
            return f"{self.entropy:g} bits of entropy"
        groups = f", groups of {self.group}" if self.group else ""
        return f"{self.bits} bits{groups}" + (f" in super-blocks of {self.super_block}" if self.super_block else "")

    @property
    def is_coded(self) -> bool:
        """Whether it is for entropy-coded files."""
        return self.coded or self.entropy > 0

    @property
    def high(self) -> int:
        """The largest code."""
        return 2 ** (self.bits - 1) - 1

    @property
    def low(self) -> int:
        """The least one."""
        return -(2 ** (self.bits - 1))

    def group_in(self, size: int) -> int:
        """Entries that share a scale along an axis of `size`; 0: all."""
        return 0 if self.group >= size else self.group

    @property
    def groups_together(self) -> int:
        """Groups in a super-block."""
        return self.super_block // self.group

    def super_block_in(self, size: int) -> int:
        """Entries whose groups share a scale of their scales along an axis of `size`; 0: none do."""
        return self.super_block if self.group_in(size) else 0


INT8 = Format()
