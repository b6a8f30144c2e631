"""Every set of vector instructions, forced through Numba's settings; and ARM's, compiled but not run."""

import io
import os
import subprocess
import sys

import kernel_checks
import llvmlite.binding as llvm
import pytest
from llvmlite import ir

from edgeq.kernels import host, simd

# one format for each plane and each form of scale: offsets, small integers, groups of 16, tables
FORMATS = ("q4_1", "q5_0", "q8_0", "q2_k", "q6_k", "iq4_xs", "f16", "bf16")
FORCED = {
    "avx512-vnni-amx": (
        "sapphirerapids",
        "+avx512f,+avx512bw,+avx512vl,+avx512dq,+avx512vnni,+avx512bf16,+amx-tile,+amx-bf16,+avx2,+fma,+f16c",
    ),
    "avx512-vnni": ("icelake-server", "+avx512f,+avx512bw,+avx512vl,+avx512dq,+avx512vnni,+avx2,+fma,+f16c"),
    "avx-vnni": ("alderlake", "+avx2,+avxvnni,+fma,+f16c,+gfni"),
    "avx2": ("haswell", "+avx2,+fma,+f16c"),
    "plain": ("x86-64", "+sse2"),
}


@pytest.mark.parametrize("path", FORCED)
def test_forced_path(path):
    cpu, features = FORCED[path]
    needed = next(p.needs for p in host.PATHS if p.name == path)
    if not needed <= host.features():
        pytest.skip(f"this CPU has no {' '.join(sorted(needed - host.features()))}")
    if path == host.path().name:
        pytest.skip("the path that all other tests take")
    run = subprocess.run(
        [sys.executable, kernel_checks.__file__, *FORMATS],
        env=os.environ | {"NUMBA_CPU_NAME": cpu, "NUMBA_CPU_FEATURES": features},
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stderr[-2000:]
    assert run.stdout.strip() == path


def test_a_path_for_every_machine():
    assert host.path() in host.PATHS
    assert not host.PATHS[-1].needs
    assert {p.name for p in host.PATHS} == {*FORCED, "arm-dotprod"}


@pytest.mark.parametrize(
    ("system", "cpu", "features", "path"),
    [
        ("Linux", "cortex-a76", "fp asimd crc32 atomics asimddp", "arm-dotprod"),  # Raspberry Pi 5
        ("Linux", "cortex-a72", "fp asimd crc32", "plain"),  # Raspberry Pi 4
        ("Linux", "generic", "fp asimd asimddp", "plain"),
        ("Darwin", "apple-m1", "", "arm-dotprod"),
    ],
)
def test_path_of_arm_machines(system, cpu, features, path, monkeypatch):
    monkeypatch.setattr(host.config, "CPU_FEATURES", None)
    monkeypatch.setattr(host.platform, "machine", lambda: "aarch64")
    monkeypatch.setattr(host.platform, "system", lambda: system)
    monkeypatch.setattr(host.llvm, "get_host_cpu_features", lambda: {"neon": True})
    monkeypatch.setattr(host.llvm, "get_host_cpu_name", lambda: cpu)
    monkeypatch.setattr("builtins.open", lambda name: io.StringIO(f"processor : 0\nFeatures\t: {features}\n"))
    assert host.path().name == path


@pytest.mark.parametrize("wide", [False, True])
def test_arm_path_becomes_sdot_on_cortex_a76(wide):
    llvm.initialize_all_targets()
    llvm.initialize_all_asmprinters()
    arm = next(p for p in host.PATHS if p.name == "arm-dotprod")
    module = ir.Module()
    module.triple = "aarch64-unknown-linux-gnu"
    acc, codes = ir.VectorType(simd.I32, 16), ir.VectorType(simd.I8, 64)
    function = ir.Function(module, ir.FunctionType(acc, [acc, codes, codes]), "dot")
    builder = ir.IRBuilder(function.append_basic_block())
    builder.ret(simd._dot4(builder, *function.args, wide, path=arm))
    machine = llvm.Target.from_triple(module.triple).create_target_machine(cpu="cortex-a76", opt=3)
    assembly = machine.emit_assembly(llvm.parse_assembly(str(module)))
    # four instructions for the sixteen lanes, and no multiplication beside them
    assert assembly.count("sdot") == 4
    assert "mul" not in assembly
