"""Claims: the verdicts on effects that are known, runs that stop and go on, and every claim once at a tiny size."""

import dataclasses
import json
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from scipy import stats

from efflm.cli.flags import launch
from efflm.config import InputError
from efflm.config.parallel import MeshConfig
from efflm.config.train import TrainConfig
from efflm.evaluate.windows import Scoring
from efflm.model import init_params
from efflm.trees import flatten
from experiments import claims, refute
from experiments.claimed import claim, distillation, optimization
from experiments.claimed.claim import Claim, Effect, concluded, judged
from tests import tiny

GROUPS = {"model": claims.MODEL, "train": claims.TRAIN, "score": Scoring(), "mesh": MeshConfig()}
TINY = [
    "--model.layers=4", "--model.width=64", "--model.heads=2", "--model.kv_heads=1", "--model.mlp_dim=96",
    "--model.vocabulary=300", "--model.max_length=64", "--train.steps=40", "--train.length=32", "--train.batch=8",
    "--score.tokens=32",
]  # fmt: skip


def run(*flags):
    launch(claims.main, claims.__doc__, ["x", *flags], run=claims.Run(), **GROUPS)


# --- verdicts --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(40))
def test_a_verdict_is_that_of_the_t_test(seed):
    """Against scipy's: beyond the bound with p < 5%, on the claimed side or on the other."""
    rng = np.random.default_rng(seed)
    values = rng.normal(rng.choice([-1.0, 0.0, 1.0]), rng.choice([0.1, 0.5, 2.0]), rng.integers(3, 8)) + 3
    test = stats.ttest_1samp(values, 3)
    side = "undecided" if test.pvalue >= 0.05 else "supported" if test.statistic > 0 else "not supported"
    opposite = {"supported": "not supported", "not supported": "supported"}.get(side, side)
    assert judged(Effect("x", above=3.0), values).verdict == side
    assert judged(Effect("x", below=3.0), values).verdict == opposite


def test_an_effect_at_its_bound_is_rarely_supported():
    values = np.random.default_rng(0).normal(0.0, 1.0, (2000, 3))
    found = [judged(Effect("x", above=0.0), each).verdict for each in values]
    assert 0.01 < found.count("supported") / len(found) < 0.04
    assert 0.01 < found.count("not supported") / len(found) < 0.04


def test_what_is_called_detectable_is_found_four_times_in_five():
    distance = judged(Effect("x", above=0.0), list(np.random.default_rng(1).normal(0, 1, 10))).detectable
    deviation = np.std(np.random.default_rng(1).normal(0, 1, 10), ddof=1)
    samples = np.random.default_rng(2).normal(distance, deviation, (2000, 10))
    assert np.mean(stats.ttest_1samp(samples, 0, axis=1).pvalue < 0.05) == pytest.approx(0.8, abs=0.04)


@pytest.mark.parametrize(
    ("effect", "values", "verdict"),
    [
        (Effect("x", above=0.0), [1.0, 1.1], "undecided"),  # two seeds
        (Effect("x", above=0.0), [1.0, 1.1, np.inf], "undecided"),
        (Effect("x", above=0.0), [], "undecided"),
        (Effect("x", above=1.0), [1.0] * 3, "not supported"),  # exact figures: at the bound is not beyond it
        (Effect("x", below=1.0), [0.9] * 3, "supported"),
        (Effect("x"), [1.0, 2.0, 3.0], "recorded"),
    ],
)
def test_verdicts_at_the_edges(effect, values, verdict):
    assert judged(effect, values).verdict == verdict


@pytest.mark.parametrize("values", [[0.3, 0.9, -0.2], [0.5, 1.0, 1.5]])  # a little, and nearly enough
def test_what_a_verdict_would_take(values):
    found = judged(Effect("x", above=0.0), values)
    seeds = int(found.takes.split()[1])
    enough = lambda n: claim.half(np.std(values, ddof=1), n) < np.mean(values)
    assert found.verdict == "undecided"
    assert enough(seeds)
    assert not enough(seeds - 1)


def test_an_effect_at_its_bound_would_take_more_than_seeds():
    assert "larger" in judged(Effect("x", above=0.0), [1.0, -1.0, 0.001]).takes


def test_a_claim_is_as_good_as_its_worst_effect():
    assert concluded(["supported", "recorded"]) == "supported"
    assert concluded(["supported", "undecided"]) == "undecided"
    assert concluded(["undecided", "not supported", "supported"]) == "not supported"
    assert concluded(["recorded"]) == "undecided"


def test_claims_are_whole_and_preset():
    assert list(claims.CLAIMS) == list(range(1, 17))
    for each in claims.CLAIMS.values():
        assert any(each.rules.values())
        assert len(each.rules) == len(each.effects)
        assert "arXiv" in each.source
    assert 55 <= sum(each.minutes for each in claims.CLAIMS.values()) <= 180


# --- runs ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def known(monkeypatch):
    """Two claims that measure nothing, and the list of what was asked of them."""
    asked = []

    def measure(number):
        def figures(lab, seed):
            asked.append((number, seed))
            return {"gain": number - 1.5 + 0.01 * (seed % 3), "beside": float(seed)}

        return figures

    words = dict.fromkeys(("statement", "source", "question", "protocol"), "words")
    effects = (Effect("gain", above=0.0), Effect("beside"))
    made = {n: Claim(number=n, minutes=30, effects=effects, measure=measure(n), **words) for n in (1, 2)}
    monkeypatch.setattr(claims, "CLAIMS", made)
    monkeypatch.setattr(claims, "prepared", lambda *given: None)
    return dict(made), asked


def results(folder):
    return json.loads((folder / "results.json").read_text())


def test_a_run_goes_on_where_it_was_stopped(known, tmp_path, monkeypatch):
    made, asked = known
    flags = [f"--run_dir={tmp_path}", "--claims=1,2"]

    def interrupted(lab, seed):
        raise KeyboardInterrupt

    monkeypatch.setitem(claims.CLAIMS, 2, dataclasses.replace(made[2], measure=interrupted))
    with pytest.raises(KeyboardInterrupt):
        claims.main(claims.Run(run_dir=str(tmp_path), claims=(1, 2)), **GROUPS)
    assert results(tmp_path)["verdicts"] == {"1": "not supported", "2": "undecided"}
    monkeypatch.setitem(claims.CLAIMS, 2, made[2])
    run(*flags)
    run(*flags, "--seeds=4")
    assert asked == [(1, 0), (1, 1), (1, 2), (2, 0), (2, 1), (2, 2), (1, 3), (2, 3)]
    found = results(tmp_path)
    assert found["verdicts"] == {"1": "not supported", "2": "supported"}
    row = found["rows"][2]
    assert row["by_seed"] == pytest.approx({str(seed): 0.5 + 0.01 * (seed % 3) for seed in range(4)})
    assert (row["name"], row["verdict"], row["seeds"]) == ("2.1 gain", "supported", 4)
    page = (tmp_path / "report.html").read_text()
    assert "2.1 gain" in page
    assert "By seed" in page


def test_rules_and_sizes_cannot_change_in_a_run(known, tmp_path, monkeypatch, capsys):
    made, _ = known
    run(f"--run_dir={tmp_path}", "--claims=1", "--seeds=1")
    easier = dataclasses.replace(made[1], effects=(Effect("gain", above=-1.0), Effect("beside")))
    monkeypatch.setitem(claims.CLAIMS, 1, easier)
    for flags, message in (
        (["--seeds=2"], "the rules of claim 1 are not those"),
        (["--train.steps=7"], "was begun with another train: give another --run_dir"),
    ):
        with pytest.raises(SystemExit):
            run(f"--run_dir={tmp_path}", "--claims=1", *flags)
        assert message in capsys.readouterr().err
        monkeypatch.setitem(claims.CLAIMS, 1, made[1])


def test_a_claim_that_fails_is_undecided_and_the_others_go_on(known, tmp_path, monkeypatch):
    made, _ = known

    def fails(lab, seed):
        raise InputError("the loss is nan")

    monkeypatch.setitem(claims.CLAIMS, 1, dataclasses.replace(made[1], measure=fails))
    run(f"--run_dir={tmp_path}", "--claims=1,2")
    assert results(tmp_path)["verdicts"] == {"1": "undecided", "2": "supported"}
    monkeypatch.setitem(claims.CLAIMS, 1, made[1])
    run(f"--run_dir={tmp_path}", "--claims=1,2")  # which tries again
    assert results(tmp_path)["verdicts"] == {"1": "not supported", "2": "supported"}


def test_a_budget_leaves_out_what_would_not_end_within_it(known, tmp_path, capsys):
    _, asked = known
    run(f"--run_dir={tmp_path}", "--claims=1,2", "--budget=1s")  # a seed of half an hour is ten minutes
    assert asked == []
    assert "left out for the budget of 1s: claims 1 (seed 0), 1 (seed 1)" in capsys.readouterr().out
    run(f"--run_dir={tmp_path}", "--claims=1,2", "--budget=10.5m")  # the first took no time, so the others follow
    assert len(asked) == 6


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--claims=3,17"], "claims holds [17], but the claims are 1 Optimizer state"),
        (["--claims=eight"], "--claims is 'eight', but must be a whole number"),
        (["--budget=20"], "budget is '20', but must be a time, as in 90s, 20m or 2h"),
        (["--seeds=0"], "seeds is 0"),
        (["--seed=-1"], "seed is -1, but must be from 0"),
        (["--train.length=2000"], "longer than model.max_length"),
        (["--train.steps=39"], "train.steps is 39, but runs of a share of it need 40"),
        (["--corpus=/nowhere"], "corpus /nowhere does not exist"),
    ],
)
def test_bad_input_is_one_line_and_leaves_nothing(tmp_path, capsys, flags, message):
    with pytest.raises(SystemExit) as stopped:
        run(f"--run_dir={tmp_path / 'runs' / 'c'}", *flags)
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "runs").exists()


def test_a_figure_that_does_not_depend_on_the_seed_is_exact():
    assert claims.mean(2.0, 0.0) == ("2", "exactly")
    assert claims.mean(0.5123, 0.012) == ("0.512", "± 0.012")
    assert claims.mean(0.5123, None) == ("0.5123", "")


def test_the_list_says_every_rule(tmp_path, capsys):
    run("--list", "--claims=8,16", f"--run_dir={tmp_path}")
    said = capsys.readouterr().out
    assert "4 bits: loss, % > 0.1" in said
    assert "(for the record)" in said


# --- refuted ---------------------------------------------------------------------------------------------------------


def refuted(tmp_path, *flags):
    launch(refute.main, refute.__doc__, ["x", f"--run_dir={tmp_path / 'again'}", *flags], run=refute.Run())
    return results(tmp_path / "again")


def test_a_claim_is_measured_again_with_other_seeds_and_text(known, tmp_path, monkeypatch):
    made, asked = known
    run(f"--run_dir={tmp_path / 'first'}", "--claims=2")
    given = [f"--results={tmp_path / 'first' / 'results.json'}", "--claim=2"]
    assert refuted(tmp_path, *given)["held"]
    assert asked[3:] == [(2, 100), (2, 101), (2, 102)]
    assert results(tmp_path / "again" / "again")["began"]["split"] == "validation"
    worse = lambda lab, seed: {"gain": -1.0, "beside": 0.0}
    monkeypatch.setitem(claims.CLAIMS, 2, dataclasses.replace(made[2], measure=worse))
    found = refuted(tmp_path, *given, "--seed=200")
    assert not found["held"]
    assert found["rows"][0]["verdict_now"] == "undecided"  # three of its seeds gave what they gave before


def test_a_ruled_effect_holds_by_its_verdict_and_a_figure_by_its_error():
    assert not refute.compared("x", (1.0, 0.5), (0.9, 0.5), ("supported", "undecided")).held
    assert refute.compared("x", (1.0, 0.1), (3.0, 0.1), ("supported", "supported")).held
    assert not refute.compared("x", (1.0, 0.1), (None, None)).held


def test_a_row_is_measured_again_by_its_command(tmp_path, monkeypatch, capsys):
    row = {"name": "w8", "loss": 1.0, "loss_stderr": 0.1, "bytes": 3}
    file, commands = tmp_path / "results.json", []

    def ended(loss):
        def one(command):
            commands.append(command[2:])
            (tmp_path / "again" / "again").mkdir(parents=True, exist_ok=True)
            new = {"rows": [row | {"loss": loss}], "command": ""}
            (tmp_path / "again" / "again" / "results.json").write_text(json.dumps(new))
            return SimpleNamespace(returncode=0)

        return one

    # Two standard errors of the difference are 0.283.
    for command, loss, held in (("compress --model=m", 1.28, True), ("quickstart", 1.29, False)):
        file.write_text(json.dumps({"rows": [row], "command": f"bash launch/run.sh experiments.{command}"}))
        monkeypatch.setattr(refute, "subprocess", SimpleNamespace(run=ended(loss)))
        assert refuted(tmp_path, f"--results={file}", "--row=w8", "--corpus=c")["held"] == held
    folder = f"--run_dir={tmp_path / 'again' / 'again'}"
    assert commands[0] == ["experiments.compress", "--model=m", folder, "--seed=100", "--corpus=c"]
    assert commands[1] == ["experiments.quickstart", folder, "--seed=100", "--corpus=c"]
    for flags, message in (
        ([f"--results={file}", "--row=w9"], "has no row 'w9', only w8"),
        ([f"--results={file}"], "give one of claim and row"),
        ([f"--results={file}", "--claim=3"], "has no claim 3, only none"),
        (["--results=/nowhere", "--claim=3"], "is no results.json"),
    ):
        with pytest.raises(SystemExit):
            refuted(tmp_path, *flags)
        assert message in capsys.readouterr().err


# --- the claims ------------------------------------------------------------------------------------------------------


def test_the_best_rate_is_the_vertex_of_a_parabola():
    rates = [2.0**i for i in range(5)]
    assert optimization.best(rates, [(i - 2.3) ** 2 for i in range(5)]) == pytest.approx(2.3)
    assert optimization.best(rates, [5, 4, 3, 2, 1]) == 4  # an edge
    assert optimization.best(rates, [1, 0, np.inf, np.inf, np.inf]) == 1


def test_the_budget_at_which_a_teacher_gains_nothing():
    lab = SimpleNamespace(steps=lambda share: round(1600 * share))
    assert distillation.crossing(lab, [2.0, 1.0, -1.0]) == pytest.approx(800)  # halfway in the logarithm
    assert distillation.crossing(lab, [2.0, 1.0, 0.5]) == 3200


def test_mup_divides_the_rate_of_what_reads_the_width():
    shape = dataclasses.replace(tiny.UNTIED, layers=1)
    wide = dataclasses.replace(shape, width=4 * shape.width, heads=16, kv_heads=8, mlp_dim=4 * shape.mlp_dim)
    by = optimization.multipliers(wide.config(), shape.config())
    fourth = {path for path in by if path.endswith("/kernel") or path == "unembedding"}
    assert len(fourth) == 8
    assert by == {path: 0.25 if path in fourth else 1.0 for path in by}
    given = optimization.mup(wide.config(), shape.config(), TrainConfig(), 1e-3, 0)["start"]()
    for path, w in flatten(given):
        fresh = dict(flatten(init_params(wide.config(), 0)))[path]
        factor = {"unembedding": 0.25}.get(path, 0.5 if path in fourth else 1.0)
        np.testing.assert_allclose(w, factor * fresh, rtol=1e-6)


def test_norms_of_matrices_stay_fixed_and_steps_are_of_one_angle():
    """Against the equation in numpy: W <- R Norm(W - rate R Norm(u)) with Adam's u, the sign of the first gradient."""
    rng, train = np.random.default_rng(0), TrainConfig(steps=10, warmup=0, schedule="constant")
    params = {"block_0": {"attention": {"query": {"kernel": jnp.array(rng.normal(size=(4, 6)), jnp.float32)}}}}
    params |= {"embedding": jnp.array(rng.normal(size=(8, 4)), jnp.float32)}
    rule = optimization.fixed_norm(train, 0.01)
    grads = jax.tree.map(jnp.sign, params)
    updates, _ = rule.update(grads, rule.init(params), params)
    after = optax.apply_updates(params, updates)
    (_, w), (_, e) = flatten(params)
    (_, new), (_, other) = flatten(after)
    w, norm = np.asarray(w, np.float64), np.linalg.norm
    u = np.sign(w)
    moved = w - 0.01 * optimization.FIXED * norm(w) * u / norm(u)
    np.testing.assert_allclose(new, norm(w) * moved / norm(moved), rtol=1e-4)
    np.testing.assert_allclose(other, e - 0.01 * np.sign(e), rtol=1e-4)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    folder, rng = tmp_path_factory.mktemp("text"), np.random.default_rng(0)
    for i in range(80):
        (folder / f"{i}.txt").write_text(" ".join(rng.choice(["alpha", "beta", "gamma", "for", "(", ")", "\n"], 250)))
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("number", claims.CLAIMS)
def test_every_claim_gives_the_figures_it_names(number, corpus, tmp_path_factory):
    """In one run directory, so that models which claims share are trained once."""
    folder = tmp_path_factory.getbasetemp() / "claims"
    run(f"--run_dir={folder}", f"--corpus={corpus}", f"--claims={number}", "--seeds=1", "--mesh.data=1", *TINY)
    found = results(folder)["claims"][str(number)]["seeds"]["0"]
    assert found.keys() == claims.CLAIMS[number].rules.keys()
    assert all(np.isfinite(value) for value in found.values()), found
    kept = sorted(file.stat().st_mtime_ns for file in (folder / "models").glob("seed0-step*.safetensors"))
    assert len(kept) in (0, 5)
    before = getattr(test_every_claim_gives_the_figures_it_names, "kept", None) or kept
    assert before == kept
    test_every_claim_gives_the_figures_it_names.kept = kept
