"""tikhon demo: a network that overfits, and what each way of regularizing does about it."""

from __future__ import annotations

import itertools
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from tikhon.cli.folders import config_of
from tikhon.cli.option_groups import flag
from tikhon.cli.options import PrintOptions
from tikhon.options import OUTPUT, TRAINING

if TYPE_CHECKING:
    from tikhon.cli.terminal import Terminal
    from tikhon.comparison.demonstration import Variant
    from tikhon.training.fit import Run


def demo(
    quick: Annotated[bool, flag("Fewer strengths and epochs.", TRAINING)] = False,
    seed: Annotated[int, flag("First of the three seeds.", TRAINING)] = 0,
    output: Annotated[
        Path,
        flag(
            "Folder of the run; a demo replaces an earlier one.",
            OUTPUT,
            "RUN",
            flags=("--output", "-o"),
        ),
    ] = Path("runs/demo"),
    *,
    shown: PrintOptions,
) -> int:
    """Overfit digits with wrong labels, then compare L1, L2 and dropout, in under a minute."""
    from tikhon.cli.progress import StepProgress
    from tikhon.cli.results import conclude_saved, english
    from tikhon.cli.startup import limit_threads
    from tikhon.comparison import demonstration
    from tikhon.report.kinds.demo import verdict
    from tikhon.runs.interrupt import Stopped, interruptible
    from tikhon.runs.run_directory import RESULT, RunDirectory

    terminal = shown.terminal()
    setting = demonstration.Setting(seeds=(seed, seed + 1, seed + 2))
    methods = demonstration.METHODS
    if quick:
        setting, methods = demonstration.quick(setting)
    _introduce(terminal, setting)
    limit_threads(1)
    began = time.perf_counter()
    with RunDirectory(output) as folder:
        data = {"name": setting.data, "rows": setting.train_rows}
        model, adam = {"name": setting.model}, {"name": "adam"}
        config = config_of("demo", output, data, model, seed=seed, optimizer=adam)
        folder.take(config, overwrite=_is_demo(folder))
        with interruptible() as interrupt, StepProgress(terminal) as progress:
            total = sum(len(method.strengths) for method in methods) * len(setting.seeds)
            done = itertools.count(1)

            def on_run(method: Variant, strength: float, seed: int, run: Run) -> None:
                assert run.metrics is not None
                score = run.metrics["valid/accuracy"]
                text = f"{method.label}, strength {strength:g}: valid {score:.3f}"
                progress(text, next(done), total)

            try:
                result = demonstration.run_demonstration(
                    setting, methods, on_run=on_run, stop=interrupt.__bool__
                )
            except (Stopped, KeyboardInterrupt):
                terminal.note("stopped; run tikhon demo to start again")
                return 128 + int(interrupt.signal or 2)
        result["seconds"] = round(time.perf_counter() - began, 1)
        folder.rewrite_history(
            {"arm": method["name"], **row}
            for method in result["arms"]
            for row in method["history"]
        )
        result["verdict"] = english(verdict(result["arms"]))
        folder.write(RESULT, result)
        conclude_saved(terminal, result, output, ending=f"; runs in {output}", left_out=())
    return 0


def _is_demo(folder: Any) -> bool:
    """Return whether the folder holds a demo, which may be replaced."""
    from tikhon.runs.run_directory import CONFIG

    return folder.exists and folder.read(CONFIG).get("kind") == "demo"


def _introduce(terminal: Terminal, setting: Any) -> None:
    wrong = round(setting.wrong_labels * setting.train_rows)
    terminal.note(
        f"{setting.data}: {setting.train_rows} training rows, {wrong} of them with a wrong label "
        f"on purpose; model {setting.model}, adam, {setting.epochs} epochs, "
        f"{len(setting.seeds)} seeds; strengths are chosen on {setting.valid_rows} validation rows"
    )
