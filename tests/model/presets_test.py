"""Published models against the parameter counts their authors give."""

import pytest

from efflm.config import InputError
from efflm.model.presets import PRESETS, preset
from efflm.plan import work

PUBLISHED = {  # model cards and papers named in the module
    "llama3-8b": 8_030_261_248,
    "llama3-70b": 70_553_706_496,
    "llama3.2-1b": 1_235_814_400,
    "llama3.2-3b": 3_212_749_824,
    "smollm2-135m": 134_515_008,
    "smollm2-360m": 361_821_120,
    "smollm2-1.7b": 1_711_376_384,
    "gemma3-270m": 268_098_176,
    "gemma3-1b": 999_885_952,
    "gpt2": 124_439_808,
    "gpt2-medium": 354_823_168,
    "gpt2-large": 774_030_080,
    "gpt2-xl": 1_557_611_200,
}


@pytest.mark.parametrize("name", PRESETS)
def test_parameters_are_the_published_ones(name):
    assert sum(work.parameters(preset(name)).values()) == PUBLISHED[name]


def test_an_unknown_name_lists_the_choices():
    with pytest.raises(InputError, match=r"no model is named 'llama4': choose one of llama3-8b, .*gpt2-xl") as raised:
        preset("llama4")
    assert "\n" not in str(raised.value)
