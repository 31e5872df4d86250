"""Peak memory of attention, read from the operating system in a process of its own.

Shapes: B batch, H heads, T time, C head channels.
"""

import json
import re
import subprocess
import sys
from pathlib import Path

from megamf.errors import UserError

STATUS, RESET = Path("/proc/self/status"), Path("/proc/self/clear_refs")


def attention_memory_ratio(B: int, H: int, T: int, C: int) -> float:
    """Peak resident memory that forward and backward need beyond q, k, v and the output's gradient, over the bytes of
    q, k, v and the output together (float32). The output and the three gradients count as extra."""
    if not RESET.exists():
        raise UserError(
            f"the memory figure reads {STATUS} and {RESET}, which this system does not have: run it on Linux"
        )
    command = [sys.executable, "-m", "megamf.bench.memory", *map(str, (B, H, T, C))]
    result = subprocess.run(command, capture_output=True, text=True, timeout=600)
    if result.returncode:
        raise RuntimeError(f"measuring memory failed:\n{result.stderr}")
    return json.loads(result.stdout)["extra"] / (4 * B * H * T * C * 4)


def measure(B: int, H: int, T: int, C: int) -> int:
    """Extra bytes at the peak, in this process."""
    import torch

    from megamf.ops.stickbreaking import stickbreaking_attention

    def extra(length: int) -> int:
        q, k, v, grad = (torch.randn(B, H, length, C, requires_grad=i < 3) for i in range(4))
        RESET.write_text("5", encoding="ascii")  # 5: the peak starts anew from what is resident now
        before = peak_resident()
        torch.autograd.grad(stickbreaking_attention(q, k, v, stop=0.0), (q, k, v), grad)
        return peak_resident() - before

    extra(128)  # threads and libraries come up here
    return extra(T)


def peak_resident() -> int:
    """The largest resident size since the last reset, in bytes."""
    found = re.search(r"^VmHWM:\s+(\d+) kB$", STATUS.read_text(encoding="ascii"), re.MULTILINE)
    assert found, "the kernel reports VmHWM for every process"
    return int(found[1]) * 1024


if __name__ == "__main__":
    print(json.dumps({"extra": measure(*map(int, sys.argv[1:]))}))
