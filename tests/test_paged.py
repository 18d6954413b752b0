"""PagedAdamW: AdamW's updates bit for bit, with its state in files, under a cap on memory and on a full disk."""

from __future__ import annotations

import contextlib
import errno
import gc
import mmap
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from minipeft import nn, optim

linux = pytest.mark.skipif(sys.platform != "linux", reason="looks for the files where Linux lists them")
SIZES = (3, optim.UNIT + 5, 700)  # small ones that share a unit, and one that has two


def trained(seed: int = 0) -> list[nn.Parameter]:
    rng = np.random.default_rng(seed)
    return [nn.Parameter(rng.standard_normal(n).astype("float32")) for n in SIZES]


def steps(optimizer: optim.Optimizer, params: list[nn.Parameter], numbers: range = range(5)) -> None:
    for number in numbers:
        rng = np.random.default_rng(number)
        for p in params:
            p.grad = rng.standard_normal(p.shape).astype("float32")
        optimizer.step()


def files_in(directory: Path) -> dict[int, os.stat_result]:
    """The files there that this process holds, by number: they have no names in the directory."""
    found = {}
    for handle in os.listdir("/proc/self/fd"):
        with contextlib.suppress(OSError):  # the handle of the listing itself
            if os.readlink(f"/proc/self/fd/{handle}").startswith(f"{directory}/"):
                stat = os.stat(f"/proc/self/fd/{handle}")
                found[stat.st_ino] = stat
    return found


@pytest.mark.parametrize("amsgrad", [False, True])
def test_the_updates_are_adamws_bit_for_bit(tmp_path, amsgrad):
    params, paged = trained(), trained()
    steps(optim.AdamW(params, amsgrad=amsgrad), params)
    steps(optim.PagedAdamW(paged, amsgrad=amsgrad, page_dir=tmp_path), paged)
    assert all(a.data.tobytes() == b.data.tobytes() for a, b in zip(params, paged, strict=True))


def test_a_saved_state_goes_on_bit_for_bit(tmp_path):
    whole, parts = trained(), trained()
    steps(optim.PagedAdamW(whole, page_dir=tmp_path), whole)
    first = optim.PagedAdamW(parts, page_dir=tmp_path)
    steps(first, parts, range(3))
    second = optim.PagedAdamW(parts, page_dir=tmp_path)
    second.load_state_dict(first.state_dict())
    steps(second, parts, range(3, 5))
    assert all(a.data.tobytes() == b.data.tobytes() for a, b in zip(whole, parts, strict=True))


@linux
def test_the_state_is_in_files_that_go_with_the_optimizer(tmp_path):
    params = trained()
    optimizer = optim.PagedAdamW(params, page_dir=tmp_path)
    steps(optimizer, params, range(1))
    assert sum(file.st_size for file in files_in(tmp_path).values()) >= optimizer.nbytes == 2 * 4 * sum(SIZES)
    del optimizer
    gc.collect()
    assert not files_in(tmp_path)


@pytest.mark.skipif(os.name != "posix", reason="a file that is open has a name there")
def test_files_have_no_names_that_a_killed_process_leaves_or_a_tidy_system_removes(tmp_path):
    params, whole = trained(), trained()
    optimizer = optim.PagedAdamW(params, page_dir=tmp_path)
    steps(optimizer, params, range(2))
    state = optimizer.state_dict()
    assert state
    assert not list(tmp_path.rglob("*"))
    tmp_path.rmdir()
    steps(optimizer, params, range(2, 5))
    steps(optim.AdamW(whole), whole)
    assert all(a.data.tobytes() == b.data.tobytes() for a, b in zip(params, whole, strict=True))
    with pytest.raises(FileNotFoundError, match=r"page_dir: no file can be made in"):
        optimizer.state_dict()


@pytest.mark.parametrize("page_dir", ["missing", "file"])
def test_a_directory_that_takes_no_files_is_named_at_once(tmp_path, page_dir):
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match=rf"page_dir: no file can be made in .*{page_dir}"):
        optim.PagedAdamW(trained(), page_dir=tmp_path / page_dir)


def test_a_full_disk_is_an_error_before_any_parameter_has_changed(tmp_path, monkeypatch):
    params = trained()
    before = [p.data.copy() for p in params]

    def full(*arguments):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    optimizer = optim.PagedAdamW(params, page_dir=tmp_path)
    with pytest.raises(OSError, match=r"no room for .* pass page_dir on a larger disk"):
        steps(optimizer, params, range(1))
    assert all(p.data.tobytes() == b.tobytes() for p, b in zip(params, before, strict=True))
    assert sys.platform != "linux" or not files_in(tmp_path)
    monkeypatch.undo()
    steps(optimizer, params, range(1))  # with room again the same optimizer goes on
    assert not any(p.data.tobytes() == b.tobytes() for p, b in zip(params, before, strict=True))


@linux
def test_a_disk_that_is_full_halfway_is_noticed_where_space_is_reserved_by_writing(tmp_path, monkeypatch):
    """Systems without posix_fallocate: a write may be cut short, and only the next one says that nothing is left."""
    monkeypatch.delattr(os, "posix_fallocate", raising=False)
    params, room, write = trained(), [1000], os.write

    def nearly_full(handle, data):
        if not room[0]:
            raise OSError(errno.ENOSPC, "No space left on device")
        written = write(handle, data[: room[0]])
        room[0] -= written
        return written

    monkeypatch.setattr(os, "write", nearly_full)
    optimizer = optim.PagedAdamW(params, page_dir=tmp_path)
    with pytest.raises(OSError, match=r"no room for .* pass page_dir on a larger disk") as caught:
        steps(optimizer, params, range(1))
    assert caught.value.errno == errno.ENOSPC
    assert not files_in(tmp_path)
    monkeypatch.setattr(os, "write", write)
    steps(optimizer, params, range(1))
    assert all(file.st_blocks * 512 >= file.st_size for file in files_in(tmp_path).values())  # no holes


@linux
def test_a_copy_of_the_state_is_in_files_that_go_with_it_and_stays_as_it_was(tmp_path):
    params = trained()
    optimizer = optim.PagedAdamW(params, page_dir=tmp_path)
    steps(optimizer, params, range(2))
    gc.collect()
    before = files_in(tmp_path).keys()
    state = optimizer.state_dict()
    copies = {name: array.copy() for name, array in state.items()}
    assert {mapping_of(a) is not None for name, a in state.items() if not name.endswith("step")} == {True}
    assert files_in(tmp_path).keys() > before
    steps(optimizer, params, range(2, 4))
    assert all(state[name].tobytes() == copy.tobytes() for name, copy in copies.items())
    del state
    optimizer.copies.begin()  # as the next copy does
    gc.collect()
    assert files_in(tmp_path).keys() == before


def mapping_of(array):
    """The mapping that the array is a view of, or None."""
    while isinstance(array, np.ndarray):
        array = array.base
    return array if isinstance(array, mmap.mmap) else None


@linux
def test_the_space_of_an_earlier_layout_is_given_back(tmp_path):
    """Training other parameters for a while moves the state into a new layout each time."""
    params = trained()
    plain = trained()
    optimizer, reference = optim.PagedAdamW(params, page_dir=tmp_path), optim.AdamW(plain)
    sizes = []
    for round_ in range(6):
        for own, chosen in ((optimizer, params), (reference, plain)):
            rng = np.random.default_rng(round_)
            for i, p in enumerate(chosen):
                g = rng.standard_normal(p.shape).astype("float32")
                p.grad = g if round_ % 2 == 0 or i == 1 else None
            own.step()
        gc.collect()
        sizes.append(sum(file.st_size for file in files_in(tmp_path).values()))
    assert max(sizes[2:]) <= max(sizes[:2])
    assert all(a.data.tobytes() == b.data.tobytes() for a, b in zip(params, plain, strict=True))


@pytest.mark.parametrize("files", [0, 1])
def test_a_disk_that_is_full_when_the_layout_changes_loses_no_state(tmp_path, monkeypatch, files):
    """The state is copied out of its old places into files, and from there into new ones: either may find no room."""
    reserve, left = os.posix_fallocate, [files]

    def full(*arguments):
        if not left[0]:
            raise OSError(errno.ENOSPC, "No space left on device")
        left[0] -= 1
        reserve(*arguments)

    params, plain = trained(), trained()
    optimizer, reference = optim.PagedAdamW(params, page_dir=tmp_path), optim.AdamW(plain)
    for own, chosen in ((optimizer, params), (reference, plain)):
        steps(own, chosen, range(2))
        chosen[0].grad = None  # another layout
    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(OSError, match=r"no room for"):
        optimizer.step()
    monkeypatch.undo()
    optimizer.step(), reference.step()
    steps(optimizer, params, range(3, 5)), steps(reference, plain, range(3, 5))
    assert all(a.data.tobytes() == b.data.tobytes() for a, b in zip(params, plain, strict=True))


CAPPED = """
import resource, sys
import numpy as np
from minipeft import nn, optim
p = nn.Parameter(np.zeros(24 << 20, "float32"))                      # 96 MiB, and as much of gradient
p.grad = np.ones_like(p.data)
optimizer = getattr(optim, sys.argv[1])([p])
used = int(open("/proc/self/statm").read().split()[5]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_DATA, (used + (64 << 20),) * 2)   # room for a third of the state
optimizer.step()
print("finished", float(p.data[0]))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="caps the data segment as Linux counts it")
def test_under_a_cap_on_memory_adamw_fails_and_the_paged_one_finishes(tmp_path):
    def run(name: str) -> subprocess.CompletedProcess[str]:
        environment = {**os.environ, "TMPDIR": str(tmp_path), "OPENBLAS_NUM_THREADS": "1"}
        environment["PYTHONPATH"] = str(Path(optim.__file__).parents[1])
        return subprocess.run([sys.executable, "-c", CAPPED, name], capture_output=True, text=True, env=environment)

    plain, paged = run("AdamW"), run("PagedAdamW")
    assert plain.returncode == 1
    assert "MemoryError" in plain.stderr
    assert paged.stdout.startswith("finished -0.001"), paged.stderr
