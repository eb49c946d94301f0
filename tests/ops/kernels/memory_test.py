"""The native CPU kernels under the compiler's sanitizers: every program of memory/, in every form that runs here.

A check of one more kernel is one more file there. Those of kernels take half a minute to compile and are slow tests;
the best form runs every time, the others with `-m combination`.
"""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

from efflm.ops.kernels.cpu import build
from tests import tiny

CHECKS = Path(__file__).parent / "memory"
MEMORY = ("-fsanitize=address,undefined,float-cast-overflow", "-fno-sanitize=null", "-fno-sanitize-recover=all")
THREADS = ("-fsanitize=thread",)
KERNELS = sorted(path.stem for path in CHECKS.glob("*.cc") if path.stem != "team")


def run_check(folder, name, form, sanitizers):
    compiler = next(filter(None, map(shutil.which, build.COMPILERS)), None)
    if compiler is None:
        pytest.skip("no C++ compiler")
    options = ("-std=c++17", "-O1", "-g", "-w", "-pthread", *build.FORMS[form][0], *sanitizers)
    empty, program = folder / "empty.cc", folder / name
    empty.write_text("int main() {}")
    if subprocess.run([compiler, *sanitizers, empty, "-o", program], capture_output=True).returncode:
        pytest.skip(f"{compiler} has no {sanitizers[0]}")
    compiled = [compiler, *options, "-I", build.SOURCES, CHECKS / f"{name}.cc", "-o", program]
    subprocess.run(compiled, check=True, timeout=300)
    # What the system would refuse is refused, as without a sanitizer.
    options = dict.fromkeys(("ASAN_OPTIONS", "TSAN_OPTIONS"), "allocator_may_return_null=1")
    done = subprocess.run([program], capture_output=True, text=True, timeout=300, env=os.environ | options)
    assert done.returncode == 0, (done.stdout + done.stderr)[:4000]


@pytest.mark.slow
@pytest.mark.parametrize("form", tiny.and_combinations(build.supported(), build.supported()[:1]))
@pytest.mark.parametrize("name", KERNELS)
def test_no_kernel_leaves_its_memory(tmp_path, name, form):
    run_check(tmp_path, name, form, MEMORY)


def test_threads_of_a_team_do_not_race(tmp_path):
    run_check(tmp_path, "team", "portable", THREADS)


@pytest.mark.slow
@pytest.mark.parametrize("name", tiny.and_combinations(KERNELS, ["dot"]))
def test_threads_of_a_kernel_do_not_race(tmp_path, name):
    run_check(tmp_path, name, "portable", THREADS)
