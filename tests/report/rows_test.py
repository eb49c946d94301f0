import copy
import pickle

import jax.numpy as jnp
import numpy as np
import pytest

from efflm import ops, trees
from efflm.compress.rotate import untied
from efflm.evaluate.quality import Quality
from efflm.report import rows
from tests import tiny


@pytest.mark.parametrize(
    ("sources", "named"),
    [
        (["a/Llama-3.2-1B", "a/Llama-3.2-3B/"], ["Llama-3.2-1B", "Llama-3.2-3B"]),
        (["org/SmolLM2-1.7B", "smollm2"], ["SmolLM2-1.7B", "smollm2"]),
        (["runs/small.v2.safetensors"], ["small.v2"]),
        (["m.Q4_1.gguf", "m.Q8_0.gguf"], ["m.Q4_1", "m.Q8_0"]),
        (["a/m.gguf", "a/m.safetensors"], ["m.gguf", "m.safetensors"]),
        (["runs/1/model.safetensors", "runs/2/model.safetensors"], ["1/model.safetensors", "2/model.safetensors"]),
        (["a/x/m", "b/x/m", "m"], ["a/x/m", "b/x/m", "m"]),
        (["m", "m"], ["m", "m (2)"]),
    ],
)
def test_models_have_their_own_names_and_different_ones(sources, named):
    assert rows.names(sources) == named


def test_a_folder_is_called_what_it_is_called(tmp_path, monkeypatch):
    (tmp_path / "Llama-3.2").mkdir()
    monkeypatch.chdir(tmp_path / "Llama-3.2")
    assert rows.names(["."]) == rows.names([f"{tmp_path}/Llama-3.2/."]) == ["Llama-3.2"]


def test_a_row_has_its_figures_by_name_and_says_which_they_are():
    row = rows.Row("a", {"bytes": 3, "loss": None}, "small")
    assert (row.bytes, row.loss, row.but(bytes=4).bytes) == (3, None, 4)
    assert row.json() == {"name": "a", "bytes": 3, "loss": None, "note": "small"}
    assert pickle.loads(pickle.dumps(row)) == copy.deepcopy(row) == row
    with pytest.raises(AttributeError, match="the row 'a' has no 'byte': its figures are bytes, loss"):
        _ = row.byte


def test_bits_a_weight_are_of_all_bytes_and_of_the_weights_of_the_model_that_it_stands_for():
    model = tiny.model()
    count, measured = trees.count(model.params), Quality(*np.ones((5, 3)))
    adapter = ops.LowRank(model.params["embedding"], jnp.ones((300, 2)), jnp.ones((2, 32)))
    masked = model.replace(masks={"embedding": np.arange(300 * 32).reshape(300, 32) % 2 > 0})
    models = {"first": model, "more": model.replace(params=model.params | {"embedding": adapter}), "pruned": masked}
    models["rotated"] = untied(model)
    sizes = {name: 1000 * (index + 1) for index, name in enumerate(models)}
    made = rows.collect(models, sizes, dict.fromkeys(models, ""), dict.fromkeys(models, measured), None)
    assert [row.bits_a_weight * count for row in made] == pytest.approx([8000, 16000, 24000, 32000])
    alone = rows.make("rotated", models["rotated"], 1000, "", measured, None, None)
    assert alone.bits_a_weight * (count + 300 * 32) == pytest.approx(8000)


def test_weights_that_a_step_moved_lie_on_no_grid():
    about = lambda *steps: {"dequantized": "Q4_1", "lineage": [{"step": step} for step in steps]}
    for given, grid in ((about(), "Q4_1"), (about("Magnitude", "Quantize"), "Q4_1"), ({"dequantized": "Q8_0"}, "Q8_0"),
                        (about("Rotate"), ""), (about("Wanda", "Finetune"), ""), ({}, "")):  # fmt: skip
        assert rows.label(given) == (f"dequantized {grid}" if grid else "before")
        assert [grid in line for line in rows.cautions("m", given, "")] == ([True] if grid else [])
