"""Runs the tests that compare numbers as on other processors, and prints a table.

    python -m parity_tests.processors [--settings NAME ...] [--jobs 2] [arguments for pytest]

The libraries below PyTorch and JAX select instructions by processor, and therefore sum or round
differently on another one. Each setting makes one of them select as on an older processor. A
setting that this processor does not support is skipped; one that has no effect, according to the
library itself, is an error.
"""

from __future__ import annotations

import argparse
import os
import platform
import re
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from xml.etree import ElementTree

from parity_tests.support import ROOT

TORCH = ("torch/test_golden", "torch/test_sharding", "torch/test_optimizers", "torch/test_llama",
         "torch/test_layerwise", "torch/test_checkpoint", "trainers/test_train_torch",
         "torch/test_in_other_hands", "torch/test_seam", "torch/test_residuals")  # fmt: skip
JAX = ("jax/test_golden", "jax/test_sharding", "jax/test_compose", "jax/test_layerwise",
       "jax/test_llama", "jax/test_dimension_numbers", "jax/test_checkpoint",
       "jax/test_train_step", "trainers/test_train_jax", "trainers/test_train_jax_hosts",
       "jax/test_set_at", "jax/test_x64", "jax/test_aliases", "jax/test_seam",
       "jax/test_residuals", "jax/test_attention")  # fmt: skip
BOTH = ("algorithm/test_oracle", "algorithm/test_jax_torch", "jax/test_blockwise",
        "algorithm/test_every_kth_step", "algorithm/test_rows", "algorithm/test_seam_agrees",
        "algorithm/test_stochastic_rounding", "algorithm/test_llama_checkpoints")  # fmt: skip


@dataclass(frozen=True)
class Setting:
    """A selection of instructions.

    Attributes:
        environment: Variables; `XLA_FLAGS` is appended to the existing value.
        needs: Instructions that the processor must have, with Linux's names; one of those separated
            by `|`.
        arrives: What a child's report must contain (see `REPORT`), a regular expression.
        modules: The test files that it can affect, within this folder.
    """

    environment: dict[str, str] = field(default_factory=dict)
    needs: str = ""
    arrives: str = ""
    modules: tuple[str, ...] = TORCH + BOTH


SETTINGS = {
    "as it is": Setting(modules=TORCH + JAX + BOTH),
    "2 threads": Setting({"OMP_NUM_THREADS": "2"}, arrives=r"threads: 2\b"),
    # oneDNN as well: where it finds AMX, ATen takes a packing that needs its own AVX-512.
    "ATen default": Setting(
        {"ATEN_CPU_CAPABILITY": "default", "ONEDNN_MAX_CPU_ISA": "AVX2"},
        "avx2|asimd",
        r"ATen: (DEFAULT|NO AVX)",
    ),
    "ATen AVX2": Setting(
        {"ATEN_CPU_CAPABILITY": "avx2", "ONEDNN_MAX_CPU_ISA": "AVX2"}, "avx2", "ATen: AVX2"
    ),
    "oneDNN AVX2": Setting({"ONEDNN_MAX_CPU_ISA": "AVX2"}, "avx2", r"isa:Intel AVX2\n"),
    "MKL compatible": Setting({"MKL_CBWR": "COMPATIBLE"}, "avx2", "CNR:COMPATIBLE"),
    "OpenBLAS Haswell": Setting(
        {"OPENBLAS_CORETYPE": "Haswell"}, "avx2", "Core: Haswell", JAX + BOTH
    ),
    "XLA SSE4.2": Setting(
        {"XLA_FLAGS": "--xla_cpu_max_isa=SSE4_2"}, "avx", 'max_isa: "SSE4_2"', JAX + BOTH
    ),
    "XLA AVX2": Setting(
        {"XLA_FLAGS": "--xla_cpu_max_isa=AVX2"}, "avx2", 'max_isa: "AVX2"', JAX + BOTH
    ),
    "XLA AVX512": Setting(
        {"XLA_FLAGS": "--xla_cpu_max_isa=AVX512"}, "avx512f", 'max_isa: "AVX512"', JAX + BOTH
    ),
}

# Makes each library report what it uses: automatically, through the variables of `ASK`, or in the
# options that XLA writes to the given folder.
REPORT = """
import sys, pathlib, torch
print("ATen:", torch.backends.cpu.get_cpu_capability())
print("threads:", torch.get_num_threads())
x = torch.ones(64, 64)
x @ x
if torch.backends.mkldnn.is_available():
    x.to_mkldnn().relu()
import jax
jax.jit(lambda x: 2 * x)(1.0)
import scipy.linalg
for path in pathlib.Path(sys.argv[1]).glob("*debug_options"):
    print(path.read_text())
"""
ASK = {"MKL_VERBOSE": "1", "ONEDNN_VERBOSE": "1", "OPENBLAS_VERBOSE": "2", "JAX_PLATFORMS": "cpu"}


@dataclass(frozen=True)
class Outcome:
    """What became of the tests under a setting: a row of the table."""

    setting: str
    passed: int
    failed: list[str]
    seconds: float
    note: str = ""

    def row(self) -> str:
        """Markdown."""
        said = self.note or ", ".join(self.failed)
        return (
            f"| {self.setting} | {self.passed} | {len(self.failed)} | {self.seconds:.0f} | {said} |"
        )


HEADER = "| setting | passed | failed | seconds | failures |\n|---|---:|---:|---:|---|"


def environment_of(setting: Setting) -> dict[str, str]:
    """This process' environment with the setting's, one thread if neither says otherwise."""
    environment = {"OMP_NUM_THREADS": "1", **os.environ, **setting.environment}
    flags = (os.environ.get("XLA_FLAGS", ""), setting.environment.get("XLA_FLAGS", ""))
    environment["XLA_FLAGS"] = " ".join(flags).strip()
    return environment


def instructions() -> set[str]:
    """Those of the processor, as Linux calls them; elsewhere none are known."""
    path = Path("/proc/cpuinfo")
    found = re.search(
        r"^(flags|Features)\s*:(.*)$", path.read_text() if path.exists() else "", re.M
    )
    return set(found[2].split()) if found else set()


def reason_to_skip(setting: Setting) -> str:
    """Why the processor cannot follow a setting, or nothing."""
    if not setting.needs or instructions() & set(setting.needs.split("|")):
        return ""
    return f"skipped: {platform.machine()} without {setting.needs}"


def report(setting: Setting) -> str:
    """What the libraries of a child with this setting say that they use."""
    with tempfile.TemporaryDirectory() as folder:
        environment = environment_of(setting) | ASK
        environment["XLA_FLAGS"] += f" --xla_dump_to={folder}"
        child = subprocess.run(
            [sys.executable, "-c", REPORT, folder],
            env=environment, capture_output=True, text=True,
        )  # fmt: skip
    return child.stdout + child.stderr


def run(name: str, arguments: list[str], jobs: int) -> Outcome:
    """Runs the tests under a setting; files in `arguments` replace those of the setting."""
    setting = SETTINGS[name]
    if reason := reason_to_skip(setting):
        return Outcome(name, 0, [], 0, reason)
    said = report(setting)
    if not re.search(setting.arrives, said):
        print(said, file=sys.stderr)
        return Outcome(name, 0, ["the setting did not arrive"], 0)
    if not any(".py" in argument for argument in arguments):
        arguments = [f"parity_tests/{module}.py" for module in setting.modules] + arguments
    workers = jobs // int(environment_of(setting)["OMP_NUM_THREADS"])
    if workers > 1:
        arguments = ["-n", str(workers), "--dist", "loadfile", *arguments]
    start = time.monotonic()
    with tempfile.NamedTemporaryFile(suffix=".xml") as results:
        command = ["-m", "pytest", "-q", "--no-header", f"--junitxml={results.name}", *arguments]
        child = subprocess.run(
            [sys.executable, *command], cwd=ROOT, env=environment_of(setting), stdout=2
        )
        seconds = time.monotonic() - start
        text = Path(results.name).read_text()
    cases = list(ElementTree.fromstring(text).iter("testcase")) if text else []
    failed = [
        f"`{case.get('classname', '').split('.')[-1]}::{case.get('name')}`"
        for case in cases
        if case.find("failure") is not None or case.find("error") is not None
    ]
    skipped = sum(case.find("skipped") is not None for case in cases)
    if child.returncode and not failed:
        failed = [f"pytest ended with {child.returncode}"]
        return Outcome(name, 0, failed, seconds)
    return Outcome(name, len(cases) - skipped - len(failed), failed, seconds)


def main(arguments: list[str] | None = None) -> int:
    """Prints the table; 1 if a test failed under any setting."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--settings", nargs="+", choices=SETTINGS, default=list(SETTINGS))
    parser.add_argument("--jobs", type=int, default=2, help="processes that run tests at a time")
    options, for_pytest = parser.parse_known_args(arguments)
    print(HEADER, flush=True)
    outcomes = []
    for name in options.settings:
        outcomes.append(run(name, for_pytest, options.jobs))
        print(outcomes[-1].row(), flush=True)
    return int(any(outcome.failed for outcome in outcomes))


if __name__ == "__main__":
    sys.exit(main())
