"""The kernels of kernels.c, built by the machine's own C compiler where there is one.

They are built once a process for each type of weights, in under a second, and take numbers as
arguments: nothing is built again when strengths or rates move. A call costs a microsecond, where
a function of torch.compile costs 0.1 ms within a training step.
"""

from __future__ import annotations

import ctypes
import functools
import os
import shlex
import subprocess
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import repeat
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

REALS = {torch.float32: "float", torch.float64: "double"}
SPLIT = 2**20  # entries from which threads share a tensor: handing it out takes 70 us

_FLAGS = (
    "-std=c11 -O3 -march=native -shared -fPIC "
    "-fno-math-errno -fno-trapping-math -ffp-contract=off -fopenmp-simd"
)
_POINTER, _COUNT, _NUMBER = ctypes.c_void_p, ctypes.c_ssize_t, ctypes.c_double
_SIGNATURES = {
    "entries": [_POINTER, _POINTER, _COUNT, _NUMBER, _NUMBER, _NUMBER],
    "rows": [_POINTER, _POINTER, _COUNT, _COUNT, _NUMBER, _NUMBER, _POINTER],
}


class Job(NamedTuple):
    """One prox in place: of L1 and ElasticNet, or with `rows` of GroupLasso on dimension 0.

    An entry is moved by `size / (sqrt(moment) + eps)`, without a moment by `size`; `ridge` is the
    L2 part in the same unit.
    """

    w: Tensor
    moment: Tensor | None
    size: float
    ridge: float
    eps: float
    rows: bool


@functools.cache
def library(dtype: torch.dtype) -> Any:
    """The kernels for weights of this type, or None without a working C compiler.

    The compiler is `cc`, or what the environment variable CC names; TIKHON_COMPILE=0 is none.
    """
    if os.environ.get("TIKHON_COMPILE") == "0" or dtype not in REALS:
        return None
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        built = Path(folder) / "kernels.so"
        command = shlex.split(os.environ.get("CC") or "cc") + _FLAGS.split()
        command += [f"-DREAL={REALS[dtype]}", str(Path(__file__).with_name("kernels.c"))]
        try:
            subprocess.run([*command, "-o", str(built), "-lm"], check=True, capture_output=True)
            found = ctypes.CDLL(str(built))
        except (OSError, subprocess.CalledProcessError):
            return None
    for name, arguments in _SIGNATURES.items():
        kernel = getattr(found, name)
        kernel.argtypes, kernel.restype = arguments, None
    return found


def run(jobs: Sequence[Job]) -> None:
    """The jobs one after another, large tensors in as many threads as torch uses."""
    threads = torch.get_num_threads()
    for job in jobs:
        if threads > 1 and job.w.numel() >= SPLIT:
            list(_threads(threads).map(_run, _parts(job, threads)))
        else:
            _run(job)
    torch.autograd.graph.increment_version([job.w for job in jobs])


def _run(job: Job) -> None:
    w, moment, size, ridge, eps, rows = job
    kernels, at = library(w.dtype), None if moment is None else moment.data_ptr()
    if rows:
        length = w.numel() // len(w)
        room = w.new_empty(length)
        kernels.rows(w.data_ptr(), at, len(w), length, size, eps, room.data_ptr())
    else:
        kernels.entries(w.data_ptr(), at, w.numel(), size, ridge, eps)


def _parts(job: Job, count: int) -> list[Job]:
    w, moment = job.w.detach(), job.moment
    if not job.rows:
        w, moment = w.view(-1), None if moment is None else moment.view(-1)
    each = -(-len(w) // count)
    moments = repeat(None) if moment is None else moment.split(each)
    return [job._replace(w=one, moment=its) for one, its in zip(w.split(each), moments)]


@functools.cache
def _threads(count: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(count, "tikhon")


if hasattr(os, "register_at_fork"):  # threads do not survive it
    os.register_at_fork(after_in_child=_threads.cache_clear)
