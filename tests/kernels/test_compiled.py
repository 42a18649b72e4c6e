"""Every Triton kernel compiles for an H100 and fits into its registers, on a machine without a GPU too."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


def has_compiler():
    spec = importlib.util.find_spec("triton")
    return spec is not None and (Path(spec.origin).parent / "backends/nvidia/bin/cuobjdump").exists()


@pytest.mark.skipif(not has_compiler(), reason="needs Triton with NVIDIA's compiler")
def test_every_kernel_compiles_for_sm_90_without_spills():
    """Each with every value of each of its switches once, at its largest; without --switches all cases compile."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-W", "ignore", ROOT / "benchmarks/compile_kernels.py", "--switches"]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stdout + done.stderr
    for name in ("rms_norm_fwd_kernel", "rotary_kernel", "swiglu_kernel", "linear_logps_fwd_kernel"):
        assert f"\n{name} " in done.stdout
