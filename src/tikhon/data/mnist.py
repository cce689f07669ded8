"""MNIST, Fashion-MNIST and other data sets of the same four files."""

from __future__ import annotations

import hashlib
import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from tikhon.data import idx
from tikhon.data.dataset import Dataset
from tikhon.data.download import fetch
from tikhon.errors import DataError

PARTS = (
    "train-images-idx3-ubyte",
    "train-labels-idx1-ubyte",
    "t10k-images-idx3-ubyte",
    "t10k-labels-idx1-ubyte",
)


@dataclass(frozen=True)
class _Idx:
    """Download locations and checksums of an MNIST-like set, in the order of `PARTS`."""

    mirrors: tuple[str, ...]
    gz: tuple[str, ...]  # SHA-256 of the published .gz files
    content: tuple[str | None, ...]  # SHA-256 of the unpacked content, if known
    classes: tuple[str, ...]


SETS = {
    "mnist": _Idx(
        mirrors=(
            "https://storage.googleapis.com/cvdf-datasets/mnist/",
            "https://ossci-datasets.s3.amazonaws.com/mnist/",
        ),
        gz=(
            "440fcabf73cc546fa21475e81ea370265605f56be210a4024d2ca8f203523609",
            "3552534a0a558bbed6aed32b30c495cca23d567ec52cac8be1a0730e8010255c",
            "8d422c7b0a1c1c79245a5bcf07fe86e33eeafee792b84584aec276f5a2dbc4e6",
            "f7ae60f92e00ec6debd23a6088c31dbd2371eca3ffa0defaefb259924204aec6",
        ),
        content=(
            "ba891046e6505d7aadcbbe25680a0738ad16aec93bde7f9b65e87a2fc25776db",
            "65a50cbbf4e906d70832878ad85ccda5333a97f0f4c3dd2ef09a8a9eef7101c5",
            "0fa7898d509279e482958e8ce81c8e77db3f2f8254e26661ceb7762c4d494ce7",
            "ff7bcfd416de33731a308c3f266cc351222c34898ecbeaf847f06e48f7ec33f2",
        ),
        classes=tuple("0123456789"),
    ),
    "fashion-mnist": _Idx(
        mirrors=(
            "http://fashion-mnist.s3-website.eu-central-1.amazonaws.com/",
            "https://raw.githubusercontent.com/zalandoresearch/fashion-mnist/master/data/fashion/",
        ),
        gz=(
            "3aede38d61863908ad78613f6a32ed271626dd12800ba2636569512369268a84",
            "a04f17134ac03560a47e3764e11b92fc97de4d1bfaf8ba1a3aa29af54cc90845",
            "346e55b948d973a97e58d2351dde16a484bd415d4595297633bb08f03db6a073",
            "67da17c76eaffca5446c3361aaab5c3cd6d1c2608764d35dfb1850b086bf8dd5",
        ),
        content=(None,) * 4,
        classes=(
            *("T-shirt/top", "Trouser", "Pullover", "Dress", "Coat"),
            *("Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot"),
        ),
    ),
}


def load(name: str, data_dir: str | os.PathLike[str] | None, download: bool) -> Dataset:
    """Load the set of this name, verifying every file against its published checksum."""
    spec = SETS[name]
    paths = find(name, data_dir)
    if paths is None and data_dir is None and download:
        paths = _download(name, spec)
    if paths is None:
        raise DataError(_describe_sources(name, data_dir))
    for path, sha256, content in zip(paths, spec.gz, spec.content):
        if content is None and path.suffix == ".gz":
            _verify(path, sha256)
    return assemble(name, paths, spec.classes, spec.content)


def find(name: str, data_dir: str | os.PathLike[str] | None) -> list[Path] | None:
    """Return the four files in the first folder that has all of them, or None."""
    roots = [data_dir] if data_dir is not None else [os.environ.get("TIKHON_DATA"), _cache()]
    for root in filter(None, roots):
        for folder in (Path(root) / name, Path(root)):
            if paths := files(folder):
                return paths
    return None


def files(folder: Path) -> list[Path] | None:
    """Return the four files of an MNIST-like set in a folder, or None if one is missing."""
    found = [_find_file(folder, part) for part in PARTS]
    return [path for path in found if path] if all(found) else None


def _verify(path: Path, sha256: str) -> None:
    found = hashlib.sha256(path.read_bytes()).hexdigest()
    if found != sha256:
        raise DataError(
            f"{path} has the wrong checksum: SHA-256 {found[:12]}... instead of {sha256[:12]}...; "
            f"give the folder itself as DATA to read files of another origin"
        )


def _find_file(folder: Path, part: str) -> Path | None:
    """Find `part`, raw or gzipped, also named `...images.idx3...` as some unpackers do."""
    dotted = part.replace("-idx", ".idx")
    for candidate in (f"{part}.gz", part, f"{dotted}.gz", dotted):
        if (folder / candidate).is_file():
            return folder / candidate
    return None


def _download(name: str, spec: _Idx) -> list[Path]:
    try:
        return [
            fetch(f"{part}.gz", spec.mirrors, sha256=sha256, folder=_cache() / name)
            for part, sha256 in zip(PARTS, spec.gz)
        ]
    except DataError as error:
        raise DataError(f"{_describe_sources(name, None)}\n{error}") from error


def _cache() -> Path:
    import platformdirs

    return Path(platformdirs.user_cache_dir("tikhon"))


def _describe_sources(name: str, data_dir: str | os.PathLike[str] | None) -> str:
    searched = data_dir if data_dir is not None else os.environ.get("TIKHON_DATA") or _cache()
    return (
        f"{name} is not in {searched}. It can come from\n"
        f"  --data-dir DIR     a folder with {', '.join(PARTS)} (.gz or not)\n"
        f"  TIKHON_DATA=DIR    the same, for every run\n"
        f"  {_cache() / name}  the cache that a download fills\n"
        f"  the network        leave --data-dir out; needs pip install 'tikhon[data]'"
    )


def assemble(
    name: str, paths: list[Path], classes: tuple[str, ...], sha256: tuple[str | None, ...]
) -> Dataset:
    """Build a data set from the four files, in the order of `PARTS`."""
    train = idx.read_labelled(paths[0], paths[1], sha256=(sha256[0], sha256[1]))
    test = idx.read_labelled(paths[2], paths[3], sha256=(sha256[2], sha256[3]))
    known = classes or tuple(str(c) for c in range(int(train[1].max()) + 1))
    origin = {"source": str(paths[0].parent)}

    def dataset(images: np.ndarray, labels: np.ndarray, rest: Dataset | None = None) -> Dataset:
        if labels.max(initial=0) >= len(known):
            raise DataError(f"{name}: a label is {labels.max()}, {len(known)} classes are known")
        x = torch.from_numpy(images[:, None].astype(np.float32)).div_(255)
        y = torch.from_numpy(labels.astype(np.int64))
        return Dataset(name, x, y, "classification", known, test=rest, origin=origin)

    return dataset(*train, dataset(*test))
