"""The claim of the document's QLoRA section about paged optimizers."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np

from .. import nn, optim
from . import Evidence, claim


@claim("qlora.paged", "Paged optimizers avoid running out of memory.")
def paged() -> Evidence:
    """PagedAdamW against AdamW to the bit; both in a process that may not hold the state in its own memory."""
    params = {name: _parameters() for name in ("AdamW", "PagedAdamW")}
    for name, own in params.items():
        optimizer = getattr(optim, name)(own, lr=1e-2)
        for step in range(5):
            rng = np.random.default_rng(step)
            for p in own:
                p.grad = rng.standard_normal(p.shape).astype("float32")
            optimizer.step()
    equal = all(a.data.tobytes() == b.data.tobytes() for a, b in zip(*params.values(), strict=True))
    capped = _under_a_cap() if sys.platform == "linux" else None
    bounded, bounded_zh = "No cap was tried on this system.", "在这个系统上没有尝试限制内存。"
    if capped is not None:
        room, state, pages = (f"{capped[part] / 1e6:.0f}" for part in ("room", "state", "file"))
        own, ended = f"{capped['anonymous'] / 1e6:.1f}", {name: _ENDS_ZH[capped[name]] for name in params}
        bounded = (
            f"In a process with {room} MB left for {state} MB of state AdamW ends in {capped['AdamW']}; PagedAdamW has "
            f"{capped['PagedAdamW']} with {own} MB more of its own and {pages} MB in pages of files, which the system "
            "may take back."
        )
        bounded_zh = (
            f"进程只剩 {room} MB 可用，而优化器状态需要 {state} MB：AdamW {ended['AdamW']}；"
            f"PagedAdamW {ended['PagedAdamW']}，自身内存多占 {own} MB，另有 {pages} MB 在文件页中，系统随时可以收回。"
        )
    numbers = f"{sum(p.size for p in params['AdamW']):,}"
    return Evidence(
        f"After 5 steps {numbers} numbers {'are' if equal else 'are not'} AdamW's to the bit. {bounded}",
        f"5 步之后，{numbers} 个数与 AdamW 的结果{'逐位相同' if equal else '不是逐位相同'}。{bounded_zh}",
        holds=equal and capped is not None and _bounded(capped),
        within=equal and capped is None,
        figures={"equal": equal, "capped": capped},
    )


_ENDS_ZH = {"finished": "顺利完成", "MemoryError": "内存不足（MemoryError）"}


def _parameters() -> list[nn.Parameter]:
    rng = np.random.default_rng(0)
    return [nn.Parameter(rng.standard_normal(n).astype("float32")) for n in (3, optim.UNIT + 5, 700)]


def _bounded(capped: dict[str, Any]) -> bool:
    return (
        capped["AdamW"] == "MemoryError"
        and capped["PagedAdamW"] == "finished"
        and capped["anonymous"] < capped["room"] < capped["state"]
    )


_CAPPED = """
import json, resource
import numpy as np
from minipeft import nn, optim

def resident(kind):
    lines = dict(line.split(":") for line in open("/proc/self/status"))
    return 1024 * sum(int(lines[name].split()[0]) for name in kind)

p = nn.Parameter(np.ones(4 << 20, "float32"))
p.grad = np.ones_like(p.data)
found = {"state": 2 * p.data.nbytes, "room": 8 << 20}
used = int(open("/proc/self/statm").read().split()[5]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_DATA, (used + found["room"],) * 2)
for name in ("PagedAdamW", "AdamW"):
    anonymous, file = resident(["RssAnon"]), resident(["RssFile", "RssShmem"])
    try:
        optimizer = getattr(optim, name)([p])
        optimizer.step()
        found[name] = "finished"
    except MemoryError:
        found[name] = "MemoryError"
    if name == "PagedAdamW":
        found["anonymous"], found["file"] = resident(["RssAnon"]) - anonymous, resident(["RssFile", "RssShmem"]) - file
    del optimizer
print(json.dumps(found))
"""


def _under_a_cap() -> dict[str, Any]:
    """Both optimizers in a process of its own, whose data segment may grow by a quarter of the state."""
    source = str(Path(optim.__file__).parents[1])
    environment = {**os.environ, "PYTHONPATH": source, "OPENBLAS_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", _CAPPED], capture_output=True, text=True, env=environment, timeout=60)
    if done.returncode:
        raise RuntimeError(f"the capped process ended with {done.returncode}: {done.stderr.strip()[-300:]}")
    return json.loads(done.stdout)
