"""The estimate of memory, against the peak of a process that runs the model; memory that is freed."""

import platform
import subprocess
import sys

import pytest

from edgeq import files, memory

# ru_maxrss of a child counts what its parent had taken
RUN = """
import sys
import edgeq
path, ctx, kind, tokens = sys.argv[1], int(sys.argv[2]), sys.argv[3], int(sys.argv[4])
llm = edgeq.load(path, ctx=ctx, cache_type_k=kind, cache_type_v=kind)
for _ in llm.stream([5] * tokens, max_tokens=4, temperature=0):
    pass
print(next(line.split()[1] for line in open("/proc/self/status") if line.startswith("VmHWM")))
"""


@pytest.mark.model
@pytest.mark.skipif(sys.platform != "linux", reason="reads the peak from /proc")
@pytest.mark.parametrize(
    ("model", "ctx", "kind"),
    [("smollm2_path", 512, "f16"), ("smollm2_path", 4096, "q8_0"), ("gemma3_path", 2048, "f16")],
)
def test_the_estimate_is_within_a_tenth_of_the_peak(model, ctx, kind, request):
    path = request.getfixturevalue(model)
    meta, tensors = files.read(path)
    shape = memory.shape(meta, tensors, path)
    need = memory.estimate(shape, tensors, backend="numba", ctx=ctx, cache_types=(kind, kind))

    def peak(tokens):
        command = [sys.executable, "-c", RUN, str(path), str(ctx), kind, str(tokens)]
        return int(subprocess.run(command, capture_output=True, text=True, check=True).stdout) << 10

    peak(200)  # compiles what is missing, which takes memory, too
    assert peak(8) == pytest.approx(need.loaded, rel=0.1)
    assert peak(ctx - 8) == pytest.approx(need.total, rel=0.1)


HOLES = """
import numpy as np
from edgeq.kernels import scratch
def resident():
    with open("/proc/self/status") as lines:
        return next(int(line.split()[1]) for line in lines if line.startswith("RssAnon")) // 1024
{call}
for size in (30, 16):  # from which glibc learns to keep as much
    np.ones(size << 20, np.uint8)
blocks = [np.ones(8 << 20, np.uint8) for _ in range(8)]
full = resident()
del blocks[:7]
print(full - resident())
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc keeps what is freed")
@pytest.mark.parametrize(
    ("call", "returned"), [("", range(8)), ("scratch.keep_nothing_else()", range(50, 60))]
)
def test_freed_blocks_go_back_to_the_system(call, returned):
    run = subprocess.run([sys.executable, "-c", HOLES.format(call=call)], capture_output=True, check=True)
    assert int(run.stdout) in returned
