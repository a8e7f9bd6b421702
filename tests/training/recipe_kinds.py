"""One recipe for each kind of network that can be stacked, as changes to a plain one."""

from relubook.training.stack import RESIDUALS

KINDS = {
    "plain": {},
    "linear": {"widths": ()},
    "maxout": {"activation": "maxout", "activation_options": {"pieces": 3}},
    "prelu": {"activation": "prelu"},
    "prelu, one slope a unit": {
        "activation": "prelu",
        "activation_options": {"num_parameters": 6, "init": 0.1},
    },
    "rai": {"initializer": "rai"},
    "torch": {"initializer": "torch"},
    "drawn bias": {"bias": (0.0, 0.2)},
    "no bias": {"bias": False},
    "batch": {"normalization": "batch"},
    "layer": {"normalization": "layer"},
    "dropout": {"dropout": 0.3},
    **{form: {"residual": form} for form in RESIDUALS[1:]},
    "all": {
        "residual": "pre-activation",
        "normalization": "batch",
        "dropout": 0.2,
        "activation": "prelu",
    },
    "maxout block": {"residual": "pre-activation", "activation": "maxout"},
}
