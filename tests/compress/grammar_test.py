"""The grammar of chains: what is read, what is written, and what is refused."""

import dataclasses
import typing
from typing import Literal

import hypothesis
import pytest
from hypothesis import strategies

from efflm.compress import grammar, recipe
from efflm.compress.adapt import Adapt
from efflm.compress.distill import Distill
from efflm.compress.finetune import Finetune
from efflm.compress.gptq import GPTQ
from efflm.compress.magnitude import Magnitude
from efflm.compress.plan import LAYERS, Plan
from efflm.compress.quantize import Quantize
from efflm.compress.structured.depth import Depth
from efflm.compress.structured.width import Width
from efflm.compress.wanda import Wanda
from efflm.config import InputError
from efflm.ops import Format

# Of fields that are texts, what they may be.
TEXTS = {"pattern": ("", "2:4", "1:4"), "scope": ("layer", "global", "2:4", "16x16"), "groups": ("0", "32,64"),
         "bits": ("4", "8,4"), "layers": ("0:1", "0:1 1:3"), "cache": ("", "full")}  # fmt: skip
NEEDED = {Width: {"parameters": 0.3}}


@strategies.composite
def steps(draw):
    """A step with a few fields that are not as by default."""
    kind = recipe.STEPS[draw(strategies.sampled_from(sorted(recipe.STEPS)))]
    hints, given = typing.get_type_hints(kind), dict(NEEDED.get(kind, {}))
    fields = [field.name for field in dataclasses.fields(kind) if not field.metadata.get("internal")]
    for name in draw(strategies.lists(strategies.sampled_from(fields), max_size=3)) if fields else ():
        if typing.get_origin(hints[name]) is Literal:
            given[name] = draw(strategies.sampled_from(typing.get_args(hints[name])))
        elif hints[name] is str:
            given[name] = draw(strategies.sampled_from(TEXTS.get(name, (getattr(kind, name),))))
        else:
            ranges = {bool: strategies.booleans(), int: strategies.integers(0, 500), float: strategies.floats(0, 8)}
            given[name] = draw(ranges[hints[name]])
    try:
        return kind(**given)
    except InputError:  # not everything goes together
        return kind(**NEEDED.get(kind, {}))


@hypothesis.given(strategies.lists(steps(), min_size=1, max_size=3))
@hypothesis.settings(max_examples=300, suppress_health_check=list(hypothesis.HealthCheck))
def test_what_is_written_reads_as_the_same_steps(chain):
    text = grammar.write(chain)
    assert repr(grammar.chain(text)) == repr(tuple(chain))
    assert grammar.parts(text) == {text: [grammar.write([step]) for step in chain]}


def test_texts_say_these_steps():
    for text, steps in {
        "gptq@3,distill@0.5": (GPTQ(bits=3), Distill(steps=75)),
        "width@0.3": (Width(parameters=0.3),),
        "depth@0.5 ": (Depth(share=0.5),),
        "wanda@2:4, magnitude@1:4": (Wanda(pattern="2:4"), Magnitude(sparsity=0.75, scope="1:4")),
        "quantize@4[group=64]": (dataclasses.replace(grammar.chain("quantize@4")[0], group=64),),
        "quantize": (Quantize(),),
        "quantize[ bits = 4 , symmetric = false ]": (Quantize(bits=4, symmetric=False),),
        "width[parameters=0.2,axes=groups mlp width]": (Width(parameters=0.2, axes="groups mlp width"),),
        "finetune[learning_rate=1e-3],w8a16": (Finetune(learning_rate=1e-3), Quantize()),
    }.items():
        assert grammar.chain(text) == steps, text
    assert list(grammar.chains("w8a8 , gptq@3  wanda@0.5")) == ["w8a8,gptq@3", "wanda@0.5"]
    assert grammar.chains("") == {}


def test_what_is_written_is_short():
    short = "gptq@3 gptq@4 quantize quantize@4 quantize@8[group=64] wanda@2:4 depth depth@0.5 mixed@4 cast@bfloat16 "
    short += "distill[steps=75] magnitude@0.5[scope=global]"
    for text in short.split():
        assert grammar.write(grammar.chain(text)) == text
    for name in recipe.RECIPES:
        assert grammar.text_of(name, grammar.chain(name)) == name
    of_a_program = GPTQ(bits=3, plan=Plan(((LAYERS, Format(bits=4)),)))
    assert grammar.write([of_a_program]) == "gptq@3[plan=Plan]"
    assert grammar.text_of("small", grammar.chain("w8a16")) == grammar.text_of("w8a8", (Quantize(),)) == "quantize"


def test_no_recipe_has_the_name_of_a_step():
    assert not recipe.STEPS.keys() & recipe.RECIPES.keys()
    assert [kind.__name__.lower() for kind in recipe.STEPS.values()] == list(recipe.STEPS)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("w8a8,gptqq@3", r"there is no step or recipe 'gptqq' \(in gptqq@3\): did you mean gptq"),
        ("best", "there is no step or recipe 'best': steps are cast, .*; recipes are bfloat16, "),
        ("quantize[bit=4]", r"quantize\[bit=4\]: quantize has no setting 'bit': did you mean bits\?"),
        ("gptq@3[plan=Plan]", "gptq has no setting 'plan': its settings are bits, group"),
        ("rotate[x=1]", "rotate has no setting 'x': its settings are none"),
        ("quantize[bits=9]", "bits is '9', but must be one of 8, 7, 6"),
        ("quantize[symmetric=no]", "symmetric is 'no', but must be true or false"),
        ("finetune[steps=many]", "steps is 'many', but must be a whole number"),
        ("width@much", "width@much: parameters is 'much', but must be a number"),
        ("wanda@1.5", r"wanda@1.5: sparsity is 1.5, but must be in \[0, 1\)"),
        ("wanda@4:2", "wanda@4:2: 4:2 keeps 4 of every 2 inputs"),
        ("rotate@3", "rotate@3: rotate has no value after @: leave it out"),
        ("distill@300", r"distill@300: a share of its steps must be in \(0, 1\]: say \[steps=300\]"),
        ("gptq@3[bits=4]", r"gptq@3\[bits=4\]: bits is set twice, by @3 too: leave one out"),
        ("gptq[bits=4,bits=3]", "bits is set twice: leave one out"),
        ("gptq[bits]", "'bits' is no setting: say field=value"),
        ("w8a16@3", "w8a16@3: w8a16 is a recipe, which has no settings: write it out, as quantize"),
        ("gptq@3,", "'gptq@3,' cannot be read from character 8 on, its end: say name@value"),
        ("gptq[bits=3", r"cannot be read from character 5 on, '\['"),
        (",gptq", "cannot be read from character 1 on, ','"),
        ("", "there is no step: steps are cast"),
        ("w8a8 w8a16", r"'w8a8 w8a16' is 2 chains \(w8a8, w8a16\), but must be one: put commas between"),
    ],
)
def test_mistakes_are_one_line(text, message):
    with pytest.raises(InputError, match=message) as error:
        grammar.chain(text)
    assert "\n" not in str(error.value)


def test_defaults_are_those_of_the_steps_that_a_text_names_itself():
    defaults = {Finetune: {"steps": 40, "learning_rate": 1e-3}, Adapt: {"rank": 2}}
    found = grammar.chains("finetune@0.5,adapt finetune[steps=3] student_scratch", defaults)
    assert found["finetune@0.5,adapt"] == (Finetune(steps=20, learning_rate=1e-3), Adapt(rank=2))
    assert found["finetune[steps=3]"] == (Finetune(steps=3, learning_rate=1e-3),)
    assert found["student_scratch"] == grammar.chain("student_scratch")


FILE = """
recovered = "gptq@3, distill@0.5"
mixture = ["w8a8", {step = "wanda", pattern = "2:4"}]

[[narrow]]
step = "width"
parameters = 0.3
refit = false

[[narrow]]
step = "distill@0.5"
learning_rate = 5e-4
"""


def test_a_file_has_chains_by_name(tmp_path):
    file = tmp_path / "chain.toml"
    file.write_text(FILE)
    found = grammar.chains(str(file))
    assert found == {
        "recovered": (GPTQ(bits=3), Distill(steps=75)),
        "mixture": (Quantize(activations="int8"), Wanda(pattern="2:4")),
        "narrow": (Width(parameters=0.3, refit=False), Distill(steps=75, learning_rate=5e-4)),
    }
    assert grammar.chain(f"{file}:narrow") == found["narrow"]
    written = {name: grammar.write(steps) for name, steps in found.items()} | {"a,b": "w8a8"}
    file.write_text(grammar.to_toml(written))
    assert grammar.chains(str(file)) == found | {"a,b": grammar.chain("w8a8")}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("a = ", r"is not TOML \(.*\): see efflm/compress/README.md"),
        ("", "has no chain: write one"),
        ("a = 3", "chain.toml: 3 is no step: write a text such as"),
        ("a = 'w8a8 w8a16'", "'w8a8 w8a16' is 2 chains, but must be one"),
        ("[[a]]\nstep = 'gptq'\nbits = 9", "bits is '9', but must be one of 8, 7, 6"),
        ("b = 'w8a8'\nc = 'w8a16'", r"is 2 chains \(b, c\), but must be one: .* as in chain.toml:small"),
    ],
)
def test_files_that_are_wrong_are_refused(tmp_path, content, message):
    file = tmp_path / "chain.toml"
    file.write_text(content)
    with pytest.raises(InputError, match=message):
        grammar.chain(str(file))
    with pytest.raises(InputError, match=r"has no chain 'd': choose from|is not TOML|has no chain: write"):
        grammar.chain(f"{file}:d")
    with pytest.raises(InputError, match=r"cannot read .*none.toml \(No such file or directory\)"):
        grammar.chain(str(tmp_path / "none.toml"))


def test_files_have_names_without_signs_that_are_not_allowed_everywhere():
    for name, file in {
        "w8a16,distill@0.5": "w8a16+distill@0.5",
        "wanda@2:4": "wanda@2-4",
        "quantize[bits=4,group=64],adapt": "quantize[bits=4,group=64]+adapt",
        "width[axes=groups mlp]": "width[axes=groups-mlp]",
    }.items():
        assert grammar.file_name(name) == file


def test_a_lineage_is_a_chain_and_steps_of_old_files_have_their_old_names():
    records = [
        {"step": type(step).__name__, "settings": dataclasses.asdict(step)} for step in grammar.chain("width@0.3,w8a8")
    ]
    records[0]["settings"]["removed"] = {"parameters": 0.29}
    old = {"step": "Prune", "settings": {"sparsity": 0.5, "scope": "layer"}}
    known = "width@0.3,quantize[activations=int8]"
    assert grammar.of_lineage(records) == known
    assert grammar.of_lineage([old, *records]) == f"prune[sparsity=0.5,scope=layer],{known}"
