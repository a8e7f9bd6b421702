"""How likely a random ReLU network is born constant: two bounds.

A network of depth L has L - 1 ReLU layers and one linear map behind them, all of one width N. It is
*born dead* when one of its layers is silent on all inputs before training. Weights are drawn
independently and symmetrically about 0. Here it has one input and no biases.
"""

import math

__all__ = ["lower_bound", "upper_bound"]


def upper_bound(width: int, depth: int) -> float:
    """Return 1 - (1 + 2q)(1 - q)^(L - 1), q = 2^-N, and 0 for L = 2; exact for L = 3.

    The first layer keeps one of the two half-lines alive, and after two layers the share of
    networks that keep both is known; from there on both live at most as often as one.
    """
    if depth <= 2:
        return 0.0
    q = 2.0**-width
    return -math.expm1((depth - 1) * math.log1p(-q) + math.log1p(2 * q))


def lower_bound(width: int, depth: int) -> float:
    """Return Lu et al.'s lower bound; exact for L <= 3."""
    q = 2.0**-width
    a, b, steps = 1 - q, 1 - 2 * q - (width - 1) * q * q, depth - 2
    # From two half-lines with nothing in common (open) to two in one direction (merged).
    share = (1 - 2 * q) * (1 - q) / (1 + (width - 1) * q)
    both = share * b**steps + (1 - 2 * q - share) * a**steps
    return max(0.0, 1 - 2 * a ** (depth - 1) + both)
