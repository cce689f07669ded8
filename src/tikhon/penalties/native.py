"""The kernels of kernels.c, built by the machine's own C compiler where there is one.

They are built once a process for each type of weights, in under a second, and take numbers as
arguments: nothing is built again when strengths or rates move. A call costs a microsecond, where
a function of torch.compile costs 0.1 ms within a training step.
"""

from __future__ import annotations

import ctypes
import functools
import math
import os
import shlex
import struct
import subprocess
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from enum import IntEnum
from itertools import repeat
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

REALS = {torch.float32: "float", torch.float64: "double"}
THREADED_FROM = 2**20  # entries from which threads share a tensor: handing it out takes 70 us

_FLAGS = (
    "-std=c11 -O3 -march=native -shared -fPIC "
    "-fno-math-errno -fno-trapping-math -ffp-contract=off -fopenmp-simd"
)
_JOB = struct.Struct("PPnnndddddd")  # the fields of `struct job` in kernels.c


class Kind(IntEnum):
    """What a kernel does, with the numbers that it takes beside the step: `enum kind` in C."""

    ENTRIES = 0  # L1 and ElasticNet: its L2 part, in the unit of the step
    ROWS = 1  # GroupLasso on dimension 0, after an L1 of that size (SparseGroupLasso) if not 0
    FIRM = 2  # MCP below gamma * strength, which is the number
    HARD = 3  # MCP beyond
    CLIPPED = 4  # SCAD: strength and a
    LOG_SUM = 5  # its epsilon
    CLAMP = 6  # Box and NonNegative: the ends


class KernelJob(NamedTuple):
    """One prox in place.

    The step of an entry is `size / (sqrt(moment) + eps)`, without a moment `size`, in the unit of
    the weights and at most `max_step`. In C the moment is then lifted to `min_moment`, for the
    next step.
    """

    w: Tensor
    moment: Tensor | None
    kind: Kind
    size: float
    first: float = 0.0
    second: float = 0.0
    eps: float = 0.0
    max_step: float = math.inf
    min_moment: float = 0.0


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
    found.run.argtypes = [ctypes.c_char_p, ctypes.c_ssize_t, ctypes.c_void_p]
    found.run.restype = None
    return found


def run(jobs: Sequence[KernelJob]) -> None:
    """The jobs one after another, large tensors in as many threads as torch uses."""
    threads, together = torch.get_num_threads(), jobs
    if threads > 1:
        together = [job for job in jobs if job.w.numel() < THREADED_FROM]
        for job in jobs if len(together) < len(jobs) else ():
            if job.w.numel() >= THREADED_FROM:
                list(_threads(threads).map(_run, ([part] for part in _split_job(job, threads))))
    for dtype in {job.w.dtype: None for job in together}:
        _run([job for job in together if job.w.dtype is dtype])
    torch.autograd.graph.increment_version([job.w for job in jobs])


def _run(jobs: Sequence[KernelJob]) -> None:
    packed, longest = [], 0
    for w, moment, kind, *numbers in jobs:
        at, count = 0 if moment is None else moment.data_ptr(), w.numel()
        length = count // len(w) if kind is Kind.ROWS else 0
        if length > longest:
            longest = length
        packed.append(_JOB.pack(w.data_ptr(), at, count, length, kind, *numbers))
    room = jobs[0].w.new_empty(longest)
    library(room.dtype).run(b"".join(packed), len(packed), room.data_ptr())


def _split_job(job: KernelJob, count: int) -> list[KernelJob]:
    w, moment = job.w.detach(), job.moment
    if job.kind is not Kind.ROWS:
        w, moment = w.view(-1), None if moment is None else moment.view(-1)
    each = -(-len(w) // count)
    moments = repeat(None) if moment is None else moment.split(each)
    return [job._replace(w=one, moment=its) for one, its in zip(w.split(each), moments)]


@functools.cache
def _threads(count: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(count, "tikhon")


if hasattr(os, "register_at_fork"):  # threads do not survive it
    os.register_at_fork(after_in_child=_threads.cache_clear)
