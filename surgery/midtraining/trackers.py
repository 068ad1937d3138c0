"""Where else a run's numbers go: TensorBoard and Weights & Biases, each with the extra [tracking].

    views = [TensorBoard(folder / "tensorboard", resumed=500), Wandb(folder, project="anneal", resumed=500)]
    log = RunLog(folder, views, resumed=500)

Names are paths: loss, router/max_load, time/tokens_per_second, heldout/math/loss, tasks/arc_easy/rc_0shot/acc.
"""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

from surgery.errors import SurgeryError
from surgery.midtraining.log import Record, flat


def numbers(record: Record, prefix: str = "") -> dict[str, float]:
    """What of a record can be drawn, but for its step."""
    found = flat(record, prefix)
    return {k: float(v) for k, v in found.items() if isinstance(v, (int, float)) and k != "step"}


@contextlib.contextmanager
def _needs(package: str) -> Any:
    try:
        yield
    except ImportError:
        hint = "pip install 'checkpoint-surgery[tracking]'"
        raise SurgeryError(f"{package} is not installed", hint=hint) from None


class TensorBoard:
    """Event files in a folder.  A resumed run hides what was written after the step that it goes on from."""

    def __init__(self, folder: Path, resumed: int | None = None) -> None:
        """Raises SurgeryError if tensorboard is not installed."""
        with _needs("tensorboard"):
            from torch.utils.tensorboard import SummaryWriter
        self.writer: Any = SummaryWriter(str(folder), purge_step=None if resumed is None else resumed + 1)

    def step(self, metrics: Record, times: Record) -> None:
        self._write(metrics["step"], {**numbers(metrics), **numbers(times, "time/")})

    def evaluation(self, record: Record) -> None:
        self._write(record["step"], numbers(record))

    def event(self, record: Record) -> None:
        self.writer.add_text(record["level"], record["text"], record["step"])

    def close(self) -> None:
        self.writer.close()

    def _write(self, step: int, values: dict[str, float]) -> None:
        for name, value in values.items():
            self.writer.add_scalar(name, value, step)


class Wandb:
    """A run of Weights & Biases, which its own settings (WANDB_MODE, WANDB_API_KEY ...) rule.

    Its id is kept in the run's folder, so that a resumed run goes on in the same one; what it had said of steps behind
    the checkpoint stays there, and is said again.
    """

    ID = "wandb-id"

    def __init__(self, folder: Path, project: str, config: Record | None = None, resumed: int | None = None) -> None:
        """Raises SurgeryError if wandb is not installed."""
        with _needs("wandb"):
            import wandb
        kept = folder / self.ID
        known = kept.read_text().strip() if resumed is not None and kept.is_file() else None
        self.run: Any = wandb.init(
            project=project, name=folder.resolve().name, dir=str(folder), id=known, resume="allow" if known else None,
            config=dict(config or {}),
        )  # fmt: skip
        kept.write_text(str(self.run.id))
        for pattern in ("*", "heldout/*", "tasks/*", "time/*", "router/*", "attention_router/*"):
            self.run.define_metric(pattern, step_metric="step")

    def step(self, metrics: Record, times: Record) -> None:
        self._write(metrics["step"], {**numbers(metrics), **numbers(times, "time/")})

    def evaluation(self, record: Record) -> None:
        self._write(record["step"], numbers(record))

    def event(self, record: Record) -> None:
        if record["level"] == "alarm":
            self.run.alert(title=f"step {record['step']}", text=record["text"])

    def close(self) -> None:
        self.run.finish()

    def _write(self, step: int, values: dict[str, float]) -> None:
        self.run.log({"step": step, **values})
