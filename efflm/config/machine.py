"""The machine that a command runs on."""

import dataclasses
from typing import Literal

from efflm.config import flag

Kernels = Literal["auto", "avx512", "avx2", "portable", "off"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class MachineConfig:
    """This machine"""

    kernels: Kernels = flag(
        "auto", "form of the C++ kernels that CPUs run; auto: the best that the processor has; off: XLA's code alone"
    )
