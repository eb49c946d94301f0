import dataclasses
import json
import re
import typing
from typing import Literal

import pytest

from efflm.cli import flags, run_directory
from efflm.compress.finetune import Finetune
from efflm.compress.magnitude import Magnitude
from efflm.compress.quantize import Quantize
from efflm.config import InputError, flag, require_positive
from efflm.config.machine import Kernels
from efflm.config.model import DynamicScaling, LinearScaling, ModelConfig, ModelShape, RopeScaling, YarnScaling
from efflm.config.parallel import HostsConfig
from efflm.config.train import TrainConfig
from efflm.ops.kernels.cpu import build
from experiments import compress, generate, pretrain
from tests import tiny


@dataclasses.dataclass(frozen=True, kw_only=True)
class Run:
    """The run"""

    seed: int = flag(0, "a seed")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Named:
    """The run"""

    name: str = flag("", "a name")


def parsed(*argv, **groups):
    return flags.parse(["x", *argv], **(groups or {"run": Run(), "model": ModelShape(), "train": TrainConfig()}))


def test_flags_reach_their_dataclass():
    got = parsed("--seed=3", "--model.layers=2", "--train.learning_rate=1e-4", "--nomodel.tied", "--train.scan")
    assert got["run"].seed == 3
    assert (got["model"].layers, got["model"].tied) == (2, False)
    assert (got["train"].learning_rate, got["train"].scan) == (1e-4, True)
    assert got["model"].width == ModelShape().width


def test_a_group_given_as_a_class_returns_only_what_was_set():
    assert parsed("--magnitude.sparsity=0.5", run=Run(), magnitude=Magnitude)["magnitude"] == {"sparsity": 0.5}
    assert parsed(run=Run(), magnitude=Magnitude)["magnitude"] == {}


def test_a_choice_among_numbers_is_a_number():
    assert parsed("--quantize.bits=3", quantize=Quantize) == {"quantize": {"bits": 3}}
    with pytest.raises(InputError, match=r"^--quantize.bits is '9', but must be one of 8, 7, 6, 5, 4, 3, 2$"):
        parsed("--quantize.bits=9", quantize=Quantize)


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--sed=3"], "unknown flag --sed: did you mean --seed"),
        (["--model.leyers=3"], "did you mean --model.layers"),
        (["--steps=5"], "unknown flag --steps: did you mean --train.steps?"),
        (["--width=5"], "did you mean --model.width?"),
        (["--seed=x"], "--seed is 'x', but must be a whole number"),
        (["--train.steps=five"], "--train.steps is 'five', but must be a whole number"),
        (["--train.steps=1e3"], "--train.steps is '1e3', but must be a whole number"),
        (["--train.steps="], "--train.steps is '', but must be a whole number"),
        (["--seed=99999999999999999999"], "--seed is 99999999999999999999, but must lie within 64 bits"),
        (["--train.clip=much"], "--train.clip is 'much', but must be a number"),
        (["--train.clip=nan"], "--train.clip is 'nan', but must be a finite number"),
        (["--train.scan=maybe"], "--train.scan is 'maybe', but must be true or false"),
        (["--model.family=bert"], "--model.family is 'bert', but must be one of llama, gpt2"),
        (["stray"], "unexpected argument 'stray'"),
        (["--model.width=100", "--model.heads=3"], "width 100 is not divisible by model.heads 3"),
        (["--model.heads=4", "--model.kv_heads=3"], "heads 4 is not divisible by kv_heads 3"),
        (["--model.layers=0"], "at least one layer"),
        (["--model.vocabulary=100"], "at least 257"),
        (["--train.steps=0"], "--train.steps is 0, but must be positive"),
        (["--train.steps=10", "--train.warmup=10"], "--train.warmup is 10, but must be less than steps, which is 10"),
        (["--train.optimizer=adagrad"], "adamw8bit"),
        (["--train.schedule=step"], "cosine"),
        (
            ["--train.schedule=wsd", "--train.steps=10", "--train.warmup=4", "--train.decay=7"],
            "--train.schedule is wsd, which is longer than the training: warmup 4 + decay 7 exceed 10 steps",
        ),
        (
            ["--train.batch=8", "--train.accumulate=3"],
            "--train.batch is 8, but must be divisible by accumulate, which is 3",
        ),
    ],
)
def test_mistakes_are_one_line(argv, message):
    with pytest.raises(InputError) as error:
        parsed(*argv)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_a_bare_name_suggests_every_flag_that_ends_in_it():
    with pytest.raises(InputError, match=r"did you mean --train\.learning_rate or --finetune\.learning_rate\?"):
        parsed("--learning_rate=1", train=TrainConfig(), finetune=Finetune, magnitude=Magnitude)


def test_text_that_is_not_utf8_is_refused_by_the_name_of_its_flag():
    with pytest.raises(InputError, match=r"--name is not UTF-8 \(byte 0xff at character 2\)"):
        parsed("--name=ab\udcff", run=Named())
    assert parsed("--name=naïve 😀", run=Named())["run"].name == "naïve 😀"


@pytest.mark.parametrize("seed", [-1, 1 << 32])
def test_a_seed_that_another_one_would_equal_is_refused(seed):
    """JAX drops what is beyond 32 bits, so that 0 and 2**32 would draw the same."""
    for kind in (generate.Run, pretrain.Run, compress.Run):
        kind(seed=(1 << 32) - 1)
        with pytest.raises(InputError, match=f"seed is {seed}, but must be from 0 to 4294967295"):
            kind(seed=seed)


def test_mistakes_and_the_systems_refusals_exit_with_two(capsys):
    def refuse(run):
        raise OSError(28, "No space left on device", "/full/file")

    for main, argv in ((lambda run: None, ["x", "--nope"]), (refuse, ["x"])):
        with pytest.raises(SystemExit) as stopped:
            flags.launch(main, "doc", argv, run=Run())
        assert stopped.value.code == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 2
    assert lines[1] == "error: No space left on device: /full/file"
    with pytest.raises(ZeroDivisionError):  # our own bugs keep their traceback
        flags.launch(lambda run: 1 / 0, "doc", ["x"], run=Run())


def test_every_program_has_the_flag_of_the_kernels(monkeypatch, capsys):
    assert typing.get_args(Kernels) == ("auto", *build.FORMS, "off")
    monkeypatch.setattr(build, "_chosen", ["auto"])
    monkeypatch.setattr(build, "supported", lambda: ("portable",))
    seen = []
    flags.launch(lambda run: seen.append(build.form()), "doc", ["x", "--kernels=off"], run=Run())
    assert seen == [""]
    with pytest.raises(SystemExit) as stopped:
        flags.launch(lambda run: seen.append(run), "doc", ["x", "--kernels=avx512"], run=Run())
    assert stopped.value.code == 2
    assert len(seen) == 1
    assert capsys.readouterr().err == (
        "error: kernels is 'avx512', which this processor cannot run: choose one of auto, portable, off\n"
    )
    flags.launch(lambda run: 1 / 0, "doc", ["x", "--help"], run=Run())
    out = capsys.readouterr().out
    assert out.index("--seed=0") < out.index("This machine") < out.index("--kernels=auto")


DOC = """What it does, in a sentence that is long enough to be wrapped on a terminal that is narrow.

    bash launch/run.sh experiments.it --model.width=64 --seed=3 --notrain.scan

Expect a result.
"""


def helped(monkeypatch, capsys, *argv, columns=80):
    monkeypatch.setenv("COLUMNS", str(columns))
    groups = {
        "run": Run(),
        "model": ModelShape(),
        "train": TrainConfig(),
        "magnitude": Magnitude,
        "hosts": HostsConfig(),
    }
    flags.launch(lambda **_: 1 / 0, DOC, ["x", *argv], **groups)
    return capsys.readouterr().out


def test_help_shows_doc_flags_defaults_and_choices(monkeypatch, capsys):
    out = helped(monkeypatch, capsys, "--help")
    for text in ("What it does", "--seed=0", "--model.family=llama", "[llama, gpt2]", "--magnitude.sparsity=0.5"):
        assert out.count(text) == 1, text
    assert out.count("schedule_free") == 1


def test_help_tells_the_flags_of_the_commands_first(monkeypatch, capsys):
    out = helped(monkeypatch, capsys, "--help")
    names = re.findall(r"^  --(\S+?)=", out, re.M)
    assert names[:3] == ["model.width", "seed", "train.scan"]
    assert len(names) == len(set(names))
    assert out.index("Expect a result") < out.index("--model.width=256") < out.index("--model.family")


def test_a_flag_of_several_values(capsys):
    @dataclasses.dataclass(frozen=True, kw_only=True)
    class Several:
        """Several"""

        sizes: tuple[float, ...] = flag((0.5, 1, 2.0), "sizes")
        kinds: tuple[Literal["a", "b"], ...] = flag(("a", "b"), "kinds")

        def __post_init__(self):
            require_positive(self, "sizes")

    given = flags.parse(["x", "--sizes=3,0.25", "--kinds=b"], run=Several())["run"]
    assert (given.sizes, given.kinds) == ((3.0, 0.25), ("b",))
    flags.launch(lambda run: 1 / 0, "doc", ["x", "--help"], run=Several())
    out = capsys.readouterr().out
    assert "--sizes=0.5,1,2 " in out
    assert re.search(r"--kinds=a,b +kinds \[a, b\]", out)
    for argument, words in (
        ("--sizes=1,,2", "--sizes is '', but must be a number"),
        ("--sizes=1,0", "--sizes is 1.0,0.0, but must be positive"),
        ("--kinds=a,c", "--kinds is 'c', but must be one of a, b"),
    ):
        with pytest.raises(InputError, match=words):
            flags.parse(["x", argument], run=Several())


def test_help_hides_what_scripts_set(monkeypatch, capsys):
    out = helped(monkeypatch, capsys, "--help")
    assert "--hosts" not in out
    assert "--helpfull" in out
    assert "--hosts.coordinator" in helped(monkeypatch, capsys, "--helpfull")


@pytest.mark.parametrize("columns", [60, 100])
def test_help_fits_the_terminal(monkeypatch, capsys, columns):
    out = helped(monkeypatch, capsys, "--helpfull", columns=columns)
    commands = [line for line in out.splitlines() if line.startswith("    bash")]
    assert len(commands) == 1
    assert max(len(line) for line in out.splitlines() if line not in commands) <= columns


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_configs_survive_json(family):
    import json

    shape = ModelShape(family=family, kv_heads=4)
    assert ModelConfig.from_dict(json.loads(json.dumps(shape.config().to_dict()))) == shape.config()


def test_read_only_and_full_directories_are_refused(tmp_path):
    locked = tmp_path / "locked"
    locked.mkdir()
    locked.chmod(0o555)
    with pytest.raises(InputError, match="is read-only"):
        run_directory.require_writable(locked / "run", needs=1)
    with pytest.raises(InputError, match="free, but this run needs about 1152921"):
        run_directory.require_writable(tmp_path / "run", needs=1 << 60)
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="is a file"):
        run_directory.require_writable(tmp_path / "file", needs=1)
    run_directory.require_writable(tmp_path / "a" / "b", needs=1)
    assert not (tmp_path / "a").exists()


SCALINGS = {
    scaling.kind: dataclasses.replace(tiny.CONFIGS["llama"], rope_scaling=scaling)
    for scaling in (
        LinearScaling(factor=2.0),
        DynamicScaling(factor=2.0),
        YarnScaling(factor=2.0, original_max_length=32, attention_factor=1.1, truncate=False),
    )
}


@pytest.mark.parametrize("name", [*tiny.FAMILIES, *SCALINGS])
def test_models_come_back_from_json(name):
    config = (tiny.FAMILIES | SCALINGS)[name]
    assert ModelConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


def test_a_model_written_before_there_were_further_families_is_read():
    values = tiny.CONFIGS["gpt2"].to_dict()
    for name in ("qkv_bias", "qk_norm", "parallel", "rotary_fraction", "rope_scaling"):
        del values[name]
    assert ModelConfig.from_dict(values) == tiny.CONFIGS["gpt2"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"norm": "batch"}, r"norm is 'batch': choose from rms, layer"),
        ({"feedforward": "relu"}, "feedforward is 'relu': choose from"),
        ({"rotary_fraction": 0.0}, "rotary_fraction is 0.0"),
        ({"rotary_fraction": 0.4}, "3 of head_dim 8 would be rotated"),
        ({"rope_base": -1.0}, "rope_base is -1.0"),
        ({"norm_epsilon": -1e-5}, "norm_epsilon is -1e-05"),
    ],
)
def test_impossible_models_are_refused(change, message):
    with pytest.raises(InputError, match=message):
        dataclasses.replace(tiny.CONFIGS["llama"], **change)


def test_impossible_rotary_scaling_is_refused():
    with pytest.raises(InputError, match=r"high_freq_factor is 1\.0, but must be above low_freq_factor 4\.0"):
        RopeScaling(factor=8.0, low_freq_factor=4.0, high_freq_factor=1.0, original_max_length=8192)
    with pytest.raises(InputError, match=r"rope_base is 1\.0, but must be above 1 with the rotary scaling yarn"):
        dataclasses.replace(SCALINGS["yarn"], rope_base=1.0)
    with pytest.raises(InputError, match="factor is 0"):
        RopeScaling(factor=0.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_length=8192)


SCALING = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_length": 8192}
WHOLE = (2.0, True, "2", None, [2], -1, 2**31, 10**30, float("nan"))
NUMBERS = (True, "1", None, [], -1.0, 2**63 * 10**15, 1e31, float("inf"), float("-inf"), float("nan"))
OTHERS = (0, 1, "no", None, [], {})
WRONG = {
    **dict.fromkeys(("vocabulary", "width", "max_length"), (*WHOLE, 0)),
    **dict.fromkeys(("rope_base", "rotary_fraction"), (*NUMBERS, 0)),
    "norm_epsilon": (*NUMBERS, 2**63, 1.5),
    **dict.fromkeys(("bias", "tied", "qkv_bias", "qk_norm", "parallel"), OTHERS),
    **dict.fromkeys(("norm", "position", "feedforward", "precision"), OTHERS),
    "rope_scaling": ([], 1, "x", {}, False, {"kind": "ntk", "factor": 2.0}, {"kind": [], "factor": 2.0}),
    "blocks": (None, 3, [], {}, [3], [[]], [{}]),
}


def refused(change):
    """The message with which a config with these plain values is refused."""
    with pytest.raises(InputError) as error:
        ModelConfig.from_dict(tiny.CONFIGS["llama"].to_dict() | change)
    assert "\n" not in str(error.value)
    assert len(str(error.value)) < 300
    return str(error.value)


@pytest.mark.parametrize(("name", "values"), WRONG.items())
def test_a_field_of_another_type_or_out_of_range_is_refused(name, values):
    for value in values:
        assert name.removesuffix("s") in refused({name: value}), value


@pytest.mark.parametrize("name", ["heads", "kv_heads", "head_dim", "mlp_dim", "window"])
def test_so_is_one_of_a_layer(name):
    block = dataclasses.asdict(tiny.CONFIGS["llama"].blocks[0])
    for value in (*WHOLE, *([] if name == "window" else [0])):
        assert refused({"blocks": [block | {name: value}]}).startswith(name), value


@pytest.mark.parametrize("name", SCALING)
def test_and_one_of_the_rotary_scaling(name):
    for value in (*(WHOLE if name == "original_max_length" else NUMBERS), 0):
        assert name in refused({"rope_scaling": SCALING | {name: value}}), value


def test_fields_that_are_unknown_or_missing_are_named():
    values = tiny.CONFIGS["llama"].to_dict()
    block = values["blocks"][0]
    assert "experts" in refused({"experts": 8})
    assert "sinks" in refused({"blocks": [block | {"sinks": 1}]})
    assert "beta" in refused({"rope_scaling": SCALING | {"beta": 1}})
    assert "factor" in refused({"rope_scaling": {key: SCALING[key] for key in SCALING if key != "factor"}})
    assert "mlp_dim" in refused({"blocks": [{key: block[key] for key in block if key != "mlp_dim"}]})
    del values["vocabulary"]
    with pytest.raises(InputError, match="vocabulary"):
        ModelConfig.from_dict(values)
    for junk in (None, [], 3, "x"):
        with pytest.raises(InputError, match="must be an object"):
            ModelConfig.from_dict(junk)


def test_heads_do_not_multiply_beyond_what_an_array_can_have():
    block = dataclasses.asdict(tiny.CONFIGS["llama"].blocks[0])
    assert "head_dim" in refused({"blocks": [block | {"heads": 2**20, "kv_heads": 1, "head_dim": 2**20}]})


def test_whole_numbers_stand_for_floats():
    config = ModelConfig.from_dict(tiny.CONFIGS["llama"].to_dict() | {"rope_base": 10**20, "norm_epsilon": 0})
    assert (type(config.rope_base), config.rope_base, type(config.norm_epsilon)) == (float, 1e20, float)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"kv_heads": 0}, "model.kv_heads is 0, but must be a whole number from 1"),
        ({"kv_heads": 3}, "model.heads 4 is not divisible by kv_heads 3"),
        ({"window": -1}, "model.window is -1"),
        ({"window": 2**31}, "model.window is 2147483648"),
        ({"layers": 10**9}, "model.layers is 1000000000"),
        ({"width": 12}, "model.width 12 / model.heads 4 is 3, but rotary positions need heads of an even size"),
        ({"mlp_dim": 2.0}, "model.mlp_dim is 2.0"),
        ({"family": "bert"}, "model.family is 'bert': choose from"),
        ({"tied": 1}, "model.tied is 1"),
    ],
)
def test_a_shape_is_refused_by_the_names_of_its_flags(change, message):
    with pytest.raises(InputError) as error:
        ModelShape(**change)
    assert str(error.value).startswith(message)
