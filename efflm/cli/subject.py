"""The flags of the commands that read a model and text."""

import dataclasses

from efflm.cli import run_directory
from efflm.config import PRECISION, AskedPrecision, flag
from efflm.data import corpora
from efflm.formats.sources import KINDS


@dataclasses.dataclass(frozen=True, kw_only=True)
class Subject:
    """The run"""

    model: str = flag(str(run_directory.ROOT / "quickstart"), KINDS, path=True)
    corpus: str = flag("", f"{corpora.KINDS}; default: what the model was trained on, else stdlib", path=True)
    strict: bool = flag(False, corpora.STRICT)
    precision: AskedPrecision = flag("", PRECISION)
