"""Who may import whom: the arrows of the architecture, held by reading every import."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FILES = sorted((ROOT / "efflm").rglob("*.py"))
BASE = {"config", "trees", "precision", "malloc", "model_files", "user_cache", "parallel.processes"} | {
    f"cli.{name}" for name in ("progress", "run_directory", "signals")
}
ALLOWED = {
    "config": set(),
    "trees": set(),
    "precision": {"config"},
    "malloc": set(),
    "user_cache": {"config"},
    "model_files": {"config"},
    "parallel": {"config", "ops", "trees"},
    "cli": {"config", "parallel.processes", "user_cache", "ops.kernels"},
    "text": BASE,
    "ops": BASE,
    "model": BASE | {"parallel", "ops"},
    "train": BASE | {"parallel", "ops", "model"} | {f"formats.{name}" for name in ("arrays", "checkpoint", "manifest")},
    "infer": BASE | {"parallel", "ops", "model", "text.encoding"},
    "evaluate": BASE | {"parallel", "ops", "model", "infer", "plan", "train.losses"},
    "plan": BASE | {"parallel", "ops", "model", "train"},
    "serve": BASE | {"ops", "model", "infer", "text"},
    "report": BASE | {"parallel", "ops", "model", "infer", "evaluate", "plan"},
    "compress": BASE | {"parallel", "ops", "model", "infer", "train"},
    "data": BASE | {"text"},
    "formats": BASE | {"parallel", "ops", "model", "text"},
    "api": BASE
    | {"cli", "parallel", "text", "ops", "model", "data", "infer", "compress", "evaluate", "formats", "report"},
}
ALLOWED_MODULES = {
    "cli.arguments": {"config", "model", "text", "data", "compress"},
    "cli.subject": {"config", "data", "formats"},
    "cli.writing": {"config", "formats", "infer.sampling"},
}
ONE_PLACE = {
    "absl": ("cli/flags.py",),
    "tensorflow_datasets": ("data/corpora.py",),
    "orbax": ("formats/arrays.py",),
    "tokenizers": ("text/tokenizer.py",),
    "jinja2": ("text/render_template.py", "report/page.py"),
    "gguf": ("formats/gguf_file.py",),
    "huggingface_hub": ("formats/hub.py", "formats/card.py"),
    "matplotlib": ("report/plots.py",),
    "grain": ("data/loader.py",),
    "tensorboardX": ("train/metrics.py",),
    "lm_eval": ("evaluate/lm_eval.py",),
}


def imports(path):
    """Every imported module, with what is taken from a package spelled out: efflm.train.loop."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            inside = [f"{node.module}.{alias.name}" for alias in node.names]
            submodule = lambda name: (
                (ROOT / (name.replace(".", "/") + ".py")).exists() or (ROOT / name.replace(".", "/")).is_dir()
            )
            yield from (name if submodule(name) else node.module for name in inside)


def package(path):
    return path.relative_to(ROOT / "efflm").parts[0].removesuffix(".py")


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_follow_the_arrows(path):
    mine = package(path)
    if mine == "__init__":
        return
    for name in imports(path):
        top, *rest = name.split(".")
        assert top != "experiments", f"{path} imports {name}"
        assert top not in ("tensorflow", "torch"), f"{path} imports {name}"
        if top in ONE_PLACE:
            assert path.relative_to(ROOT / "efflm").as_posix() in ONE_PLACE[top], f"{path} imports {name}"
        if top == "efflm" and rest and rest[0] != mine:
            module = ".".join(path.relative_to(ROOT / "efflm").with_suffix("").parts)
            allowed = ALLOWED_MODULES.get(module, ALLOWED[mine])
            assert rest[0] in allowed or ".".join(rest[:2]) in allowed, f"{mine} may not import {name}"


def test_methods_of_compression_know_only_what_they_share():
    shared = {
        "step",
        "calibrate",
        "plan",
        "fold",
        "obs",
        "select",
        "sensitivity",
        "fisher",
        "teacher_cache",
        "training",
    }
    parts = {f"structured.{name}" for name in ("allocation", "importance", "latency", "residual", "slicing", "target")}
    home = ROOT / "efflm" / "compress"
    for path in home.rglob("*.py"):
        if path.stem in ("recipe", "grammar", "methods", "__init__", "mixed"):  # what puts methods together
            continue
        known = shared | parts if path.parent.name == "structured" else shared
        taken = {name.removeprefix("efflm.compress.") for name in imports(path) if name.startswith("efflm.compress.")}
        assert taken <= known, path


def test_nothing_writes_json_with_numbers_that_json_does_not_have():
    for path in [*FILES, *(ROOT / "experiments").glob("*.py")]:
        if path.name == "render_template.py":  # writes for the templates of others, who expect Python's words
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and ast.unparse(node.func) in ("json.dump", "json.dumps"):
                strict = "allow_nan=False" in ast.unparse(node) or "ensure_ascii=False" in ast.unparse(node)
                assert strict, f"{path}:{node.lineno}: use run_directory.to_json"


def test_weights_are_made_float32_in_one_place():
    for path in FILES:
        if path.name != "qarray.py":
            assert not re.search(r"dequantize\(.*\)\.astype\(jnp\.float32\)", path.read_text()), (
                f"{path}: ops.in_float32"
            )


def test_importing_the_library_starts_nothing():
    modules = [".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__") for path in FILES]
    program = f"import {', '.join(modules)}\nfrom jax._src import xla_bridge\nassert not xla_bridge._backends"
    subprocess.run([sys.executable, "-c", program], check=True, cwd=ROOT, timeout=120)


def test_import_efflm_is_quick_and_lists_what_it_offers():
    program = (
        "import sys, efflm\n"
        "assert {'load', 'compress', 'measure', 'generate', 'save'} <= set(dir(efflm))\n"
        "slow = {'jax', 'numpy', 'flax', 'rich', 'tokenizers', 'efflm.api'} & set(sys.modules)\n"
        "assert not slow, slow\n"
        "assert issubclass(efflm.InputError, ValueError)\n"
        "assert 'jax' not in sys.modules\n"
        "from efflm.compress import recipe\n"  # now efflm.compress is the package
        "from efflm import api, compress, load\n"
        "assert load is api.load is efflm.load\n"
        "assert callable(efflm.compress) and compress.recipe is recipe\n"
        "try: efflm.nonsense\n"
        "except AttributeError as error: assert 'it offers' in str(error)\n"
    )
    subprocess.run([sys.executable, "-c", program], check=True, cwd=ROOT, timeout=120)


def test_the_experiments_answer_help_without_the_slow_libraries():
    program = (
        "import sys, experiments.quickstart, experiments.compress, experiments.generate\n"
        "slow = {'orbax', 'tensorflow_datasets', 'grain', 'matplotlib', 'tensorboardX', 'gguf', 'jinja2', "
        "'huggingface_hub'}\n"
        "slow &= set(sys.modules)\n"
        "assert not slow, slow"
    )
    subprocess.run([sys.executable, "-c", program], check=True, cwd=ROOT, timeout=120)
