"""Send the numbers of a report to TensorBoard or Weights & Biases, through their own writers."""

from typing import Any

from relubook.units.report import UnitListing
from relubook.units.watch import WatchReport

__all__ = ["log_scalars", "scalars"]


def scalars(report: UnitListing[Any]) -> dict[str, float]:
    """Return the shares of dead units of a report of ``diagnose`` or ``Watch``, by their names.

    ``units/dead_fraction`` is that of all units, ``units/dead_fraction/NAME`` that of a site. From
    ``Watch`` come ``units/deaths`` and ``units/revivals`` too, the numbers within its last window.
    """
    numbers = {"units/dead_fraction": report.dead_fraction}
    if isinstance(report, WatchReport):
        kinds = [event.kind for event in report.history if event.until == report.step]
        numbers |= {f"units/{kind}s": float(kinds.count(kind)) for kind in ("death", "revival")}
    sites = [site for site in report if site.silences and site.units]
    shares = {f"units/dead_fraction/{s.name}": int(s.dead.sum()) / s.units for s in sites}
    return numbers | shares


def log_scalars(report: UnitListing[Any], writer: Any, *, step: int | None = None) -> None:
    """Write :func:`scalars` of a report; under ``torch.distributed``, do so in one process.

    TypeError unless ``writer`` is TensorBoard's ``SummaryWriter`` or a run of W&B. A run counts
    steps itself and gets ``units/step``. The default of ``step`` is the last of Watch's window.
    """
    check(writer)
    numbers, step = scalars(report), getattr(report, "step", None) if step is None else step
    if hasattr(writer, "define_metric"):
        return writer.log(numbers if step is None else {**numbers, "units/step": step})
    for name, value in numbers.items():
        writer.add_scalar(name, value, step)


def check(writer: Any) -> None:
    """Raise TypeError unless :func:`log_scalars` can use the writer."""
    if not (hasattr(writer, "add_scalar") or hasattr(writer, "define_metric")):
        kind = type(writer).__name__
        raise TypeError(f"writer must be a SummaryWriter or a run of W&B, not a {kind}")
