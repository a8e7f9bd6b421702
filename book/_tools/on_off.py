"""What each unit of one trained network does on fifty digits: the numbers behind *On/off*.

In 64 bits and at rates at which another processor's last digits change no cell. Run by
`make stills`.
"""

import base64
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

DATA = Path(__file__).resolve().parents[1] / "_static" / "explorables" / "on-off.json"
RATES = (0.0, 0.1, 0.32, 0.56, 0.8)  # 0: before training; at 1 last digits would decide
WAYS = ("as they are", "centered")
SEED, STEPS, EACH = 0, 300, 5  # the base seed; five images of each digit


def base36(number: int) -> str:
    """Write 0 to 1295 as two characters."""
    digits = "0123456789abcdefghijklmnopqrstuvwxyz"
    return digits[number // 36] + digits[number % 36]


def networks() -> Iterator[tuple[str, float, Any]]:
    """Yield images, learning rate, and which unit fires on which training image."""
    import torch

    from relubook.evidence.data import dataset
    from relubook.training.recipe import Recipe
    from relubook.training.train import train

    known = dataset("digits", dtype=torch.float64).train
    for way in WAYS:
        x = known.x - known.x.mean(0) * (way == "centered")
        for rate in RATES:
            stack = Recipe(64, (32, 32), 10).stack([SEED], dtype=torch.float64)
            if rate:
                setting = {"lr": rate, "batch_size": 64, "optimizer": "sgd", "record": []}
                train(stack, x, known.y, steps=STEPS, progress=False, **setting)
            with torch.no_grad():
                yield way, rate, torch.cat([post[0] > 0 for _, post in stack.hidden(x)], 1)


def shown(labels: Any) -> list[int]:
    """Return the first five training images of each digit, digit by digit."""
    return [k for digit in range(10) for k in (labels == digit).nonzero()[:EACH, 0].tolist()]


def compute() -> dict[str, Any]:
    """Return what the figure draws.

    Pixels of the images, 0 to 16 (a character each); for each network how many of all images make
    a unit fire (two characters a unit), and a bit for unit and image shown, unit by unit.
    """
    import torch

    from relubook.evidence.data import dataset

    known = dataset("digits", standardize=False).train
    rows = shown(known.y)
    pixels = (16 * known.x[rows]).round().int().flatten().tolist()
    states: dict[str, Any] = {way: [] for way in WAYS}
    for way, _, on in networks():
        bits = on[rows].T.flatten().int().view(-1, 8) * 2 ** torch.arange(7, -1, -1)
        packed = base64.b64encode(bytes(bits.sum(1).tolist())).decode()
        counts = "".join(map(base36, on.sum(0).tolist()))
        states[way].append({"fires": counts, "on": packed})
    return {
        "rates": RATES,
        "all": len(known),
        "units": [32, 32],
        "digits": known.y[rows].tolist(),
        "pixels": "".join(base36(value)[1] for value in pixels),
        "states": states,
    }


def write() -> None:
    """Store it."""
    text = json.dumps(compute(), separators=(",", ":"))
    DATA.write_text(text + "\n", encoding="utf-8", newline="\n")


if __name__ == "__main__":
    write()
