"""Metric names for whoever else hears of a run: TensorBoard, Weights & Biases, trackio, ... through accelerate."""

from __future__ import annotations

import secrets
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from npd.config import Config, config_tree, flat
from npd.errors import UserError
from npd.records import Line
from npd.store import write_text

if TYPE_CHECKING:
    from accelerate import Accelerator


def start_trackers(accelerator: Accelerator, config: Config, folder: Path) -> None:
    """Start the trackers that `config` names, with the run's options; what they write goes to `folder` where they let us.

    Raises:
        UserError: one of them can't start.
    """
    names = config.tracking.trackers
    if not names:
        return
    run = Path(config.run_dir).resolve().name
    folder.mkdir(parents=True, exist_ok=True)
    again = {"id": run_id(folder), "resume": "allow"} if accelerator.is_main_process else {}
    options = {"wandb": {"name": run, "dir": str(folder), **again}, "trackio": {"name": run}}
    try:
        accelerator.init_trackers("npd", config=options_of(config), init_kwargs=options)
    except Exception as error:  # each raises what it likes
        why = " ".join(str(error).split())[:300]
        raise UserError(
            f"tracking.trackers {list(names)} cannot start ({type(error).__name__}: {why}). Log in to it, set it to work "
            "offline (WANDB_MODE=offline for wandb), or leave it out; metrics.jsonl and the report have all figures anyway."
        ) from error


def run_id(folder: Path) -> str:
    """What a tracker knows this run directory by: the same after a resume, another in a directory that is made anew."""
    file = folder / "id"
    if not file.exists():
        write_text(file, f"{secrets.token_hex(8)}\n")
    return file.read_text(encoding="utf-8").strip()


class Trackers:
    """Tells every tracker a run's figures; one that fails is a warning, once, and never the end of a run."""

    def __init__(self, accelerator: Accelerator, say: Callable[[str], None]) -> None:
        self.accelerator, self.say, self.failed = accelerator, say, False

    def log(self, line: Line) -> None:
        try:
            self.accelerator.log(figures_of(line), step=line.step)
        except Exception as error:  # each raises what it likes
            if not self.failed:
                why = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
                self.say(
                    f"A tracker failed at step {line.step} ({why}); metrics.jsonl and the report have all figures anyway."
                )
            self.failed = True


def options_of(config: Config) -> dict[str, int | float | str | bool]:
    """Options by their dotted names with plain values: what every tracker takes."""
    return {k: v if isinstance(v, int | float | str) else str(v) for k, v in flat(config_tree(config)).items()}


def figures_of(line: Line) -> dict[str, float]:
    """The figures of a line of metrics.jsonl: what trackers hear, under the same names."""
    figures = line.to_json()
    return {k: v for k, v in figures.items() if isinstance(v, int | float) and not isinstance(v, bool) and k != "step"}
