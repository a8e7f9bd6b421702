"""Find the layers that read a layer's units, by changing the units and watching what changes.

Where switching the dead units on changes an input column of a layer, that layer reads them there;
where other noise changes the same column, the units are mixed with something else.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from relubook.units.passes import LAYERS, NORMS, TRANSPOSED, Passes, Plan, Sink, unit_dim


class Unpaired(Exception):  # noqa: N818  (a finding, not an error)
    """A site cannot be repaired; the text is the reason that the reader sees."""


def find_readers(
    model: nn.Module, sites: Sequence[Any], batch: Any
) -> tuple[list[Plan], dict[str, str]]:
    """Say for every site with dead units how to repair it, or why not.

    Args:
        model: The model; nothing of it is changed.
        sites: The sites of a report.
        batch: A batch, see :func:`run`.

    Returns:
        The plans, and for each site that is left the reason, by its name.

    Raises:
        ValueError: If a site names a layer that the model does not have.
    """
    producers = [site.producer for site in sites]
    names = {name for name, _ in model.named_modules()}
    for site in sites:
        if site.producer not in {None, *names}:
            raise ValueError(
                f"the report's site {site.name!r} names the layer {site.producer!r}, which the "
                "model does not have: diagnose this model"
            )
    plans: list[Plan] = []
    reasons: dict[str, str] = {}
    dead = [site for site in sites if bool(site.dead.any())]
    probe = _Search(model, batch) if dead else None
    if probe is None:
        return plans, reasons
    for site in dead:
        try:
            plans.append(probe.plan(site, producers.count(site.producer)))
        except Unpaired as reason:
            reasons[site.name] = str(reason)
    for step in (probe.find_sinks, probe.check_training):
        reasons |= {plan.site: reason for plan, reason in step(plans)} if plans else {}
        plans = [plan for plan in plans if plan.site not in reasons]
    return plans, reasons


class _Search(Passes):
    """Says of each site how to repair it."""

    def plan(self, site: Any, uses: int) -> Plan:
        """The layer to repair for a site; whom it feeds is found later."""
        name = site.producer
        if name is None:
            call = site.name.split("#")[0].replace("_()", "()")
            what = self.between.get(call) or self.between.get(f".{call}", "something")
            raise Unpaired(f"{what} lies between it and the layers: none feeds it alone")
        if not site.silences:
            raise Unpaired(f"{site.kind} has no input on which it is silent")
        if uses > 1:
            raise Unpaired(
                f"{name!r} feeds {uses} rectifier sites, so its units cannot be changed for one "
                "of them"
            )
        module, before = self.modules[name], None
        if isinstance(module, NORMS):
            self._check(name, NORMS)
            fed = self.feeds[name]
            if fed not in self.modules:
                raise Unpaired(f"{fed} lies between {name!r} and the layers")
            before, name = (name, module), fed
            module = self.modules[name]
        self._check(name, LAYERS)
        if name in self.nonfinite:
            raise ValueError(f"on the batch the pre-activations of {name!r} are not finite")
        outputs = module.out_features if isinstance(module, nn.Linear) else module.out_channels
        units = site.dead.detach().cpu().nonzero().flatten()
        if outputs != site.dead.numel():
            raise Unpaired(f"it has {site.dead.numel()} units, but {name!r} has {outputs} outputs")
        if site.unit_dim not in (unit_dim(module), unit_dim(module) + len(site.shape)):
            raise Unpaired(f"its units lie along dimension {site.unit_dim}, not those of {name!r}")
        plan = Plan(site.name, name, module, units, before)
        self._check_parameters(plan)
        return plan

    def _check(self, name: str, kinds: tuple[type, ...]) -> None:
        module = self.modules[name]
        if not is_plain(module, kinds):
            raise Unpaired(
                f"{name!r} is a {type(module).__name__}; linear layers and convolutions can be "
                "repaired"
            )
        if any(k in dir(module) and k not in module._parameters for k in ("weight", "bias")):
            raise Unpaired(
                f"the weight of {name!r} is computed from other parameters (a parametrization, "
                "weight norm or pruning): remove that first"
            )
        if self.calls[name] != 1:
            raise Unpaired(f"{name!r} is called {self.calls[name]} times")

    def _check_parameters(self, plan: Plan) -> None:
        everything = list(self.model.named_parameters(remove_duplicate=False))
        for name, parameter in plan.parameters():
            if not parameter.requires_grad:
                raise Unpaired(f"{name!r} is frozen (requires_grad is False)")
            if id(parameter) in self.outside:
                raise Unpaired(f"{name!r} is also used outside of its layer")
            for other, twin in everything:
                if other != name and parameter.data_ptr() == twin.data_ptr():
                    raise Unpaired(f"{name!r} shares its memory with {other!r}")

    def find_sinks(self, plans: list[Plan]) -> list[tuple[Plan, str]]:
        """Find who reads each plan's units; returns the plans that fail, with the reasons."""
        self.plans = plans
        try:
            self.off, self.other = self.observe(0), self.observe(1)
        except Exception as error:  # whatever the model's code raises on noise
            return [(p, f"the model does not run on made-up activations ({error})") for p in plans]
        self.noisy = self.off.changed(self.other)
        leaks = bool(self._leaks(plans))
        failed = []
        for plan in plans:
            try:
                if leaks and self._leaks([plan]):
                    raise Unpaired(
                        f"what {plan.producer!r} computes goes to 2 places or more, not to one "
                        "rectifier"
                    )
                try:
                    plan.sinks = self._sinks(plan)
                except Unpaired:
                    plan.sinks = self._gates(plan)
                    if not plan.sinks:
                        raise
                    plan.sinks = self._sinks(plan)
                self._check_parameters(plan)
            except Unpaired as reason:
                failed.append((plan, str(reason)))
        return failed

    def _leaks(self, plans: list[Plan]) -> bool:
        """Whether anything but the rectifiers sees how silent the units are."""
        changed = self.off.changed(self.observe(shifted=plans))
        norms = {plan.before[0] for plan in plans if plan.before}
        return any(name not in norms for name, _ in changed)

    def _sinks(self, plan: Plan) -> list[Sink]:
        """Every layer that reads a plan's units, and the gates that are given and reached."""
        given = {s.name: s for s in plan.sinks}
        sinks = []
        touched = self.off.changed(self.observe(on=[plan], gated=[plan]))
        passed = [(self.off.returns.get(str(name)), at) for (name, _), at in touched.items()]
        known = torch.cat(
            [torch.zeros(1)] + [_constant(r, c)[0] for r, c in passed if r is not None]
        )
        for (name, call), columns in touched.items():
            if name is None:
                raise Unpaired(
                    self._mixer(plan) or "its units are the model's output: they have no next layer"
                )
            module = self.modules[name]
            if isinstance(module, NORMS):
                sinks += [given[name]] if name in given else []
                continue
            if not isinstance(module, LAYERS):
                raise Unpaired(
                    f"its units reach {name!r} ({type(module).__name__}), which may mix them with "
                    "others"
                )
            self._check(name, LAYERS)
            if bool((self.noisy.get((name, call), columns & False) & columns).any()):
                raise Unpaired(
                    self._mixer(plan) or f"its units reach {name!r} together with others"
                )
            constant, even = _constant(self.off.reads[name, call], columns)
            gaps = (constant[columns, None] - known).abs().amin(1)
            even &= bool((gaps <= 1e-6 * constant[columns].abs()).all())
            if bool((constant != 0).any()) or not even:
                behind = f"its units, while silent, are not 0 to {name!r}"
                if module.bias is None:
                    raise Unpaired(f"{behind}, which has no bias that could take over the rest")
                if not even or isinstance(module, TRANSPOSED) or _pads_zeros(module):
                    raise Unpaired(f"{behind}, nor the same constant everywhere")
            sinks.append(Sink(name, module, columns, constant))
        if not sinks:
            raise Unpaired("no layer reads its units")
        return sinks

    def _gates(self, plan: Plan) -> list[Sink]:
        """The norms that a plan's units pass, where their scale can be cut."""
        plan.sinks = []
        gates = []
        for (name, _), columns in self.off.changed(self.observe(on=[plan])).items():
            norm: Any = None if name is None else self.modules[name]
            if name is None or not is_plain(norm, NORMS) or self.calls[name] != 1:
                continue
            mine, its = self.off.returns[name][:, columns], self.other.returns[name][:, columns]
            constant, even = _constant(self.off.returns[name], columns)
            if even and torch.equal(mine, its) and norm._parameters.get("weight") is not None:
                gates.append(Sink(name, norm, columns, constant))
        return gates

    def check_training(self, plans: list[Plan]) -> list[tuple[Plan, str]]:
        """The plans whose units reach other places in training than in evaluation mode."""

        def strays(plans: list[Plan]) -> bool:
            known = {s.name for plan in plans for s in plan.sinks}
            known |= {n for n, m in self.modules.items() if isinstance(m, NORMS)}
            off = self.observe(gated=plans, training=True)
            on = self.observe(on=plans, gated=plans, training=True)
            return any(name not in known for name, _ in off.changed(on))

        try:
            failed = [plan for plan in plans if strays([plan])] if strays(plans) else []
        except Exception:  # a model may not run in training mode on a batch alone
            return []
        return [(p, "its units go other ways in training than in evaluation mode") for p in failed]

    def _mixer(self, plan: Plan) -> str | None:
        """The first function that makes one value of a plan's units and of something else."""
        passes = [
            self.observe(noise, on=on, functions=True).functions
            for noise in (0, 1)
            for on in ([], [plan])
        ]
        for (label, a), (_, b), (_, c), (_, d) in zip(*passes, strict=False):
            rounding = 1e-6 + 1e-12 * max(abs(a), abs(b), abs(c), abs(d))
            if not abs((b - a) - (d - c)) <= rounding:
                return f"its units reach {label}, which may mix them with others"
        return None


def is_plain(module: Any, kinds: tuple[type, ...]) -> bool:
    """Whether a module is of one of the kinds and computes what that kind computes."""
    forward = getattr(type(module), "forward", None)
    return any(isinstance(module, k) and forward is getattr(k, "forward", None) for k in kinds)


def _constant(digest: Tensor, columns: Tensor) -> tuple[Tensor, bool]:
    """What some columns hold, 0 elsewhere, and whether it is the same everywhere."""
    low, high = digest[1], digest[2]
    even = (high - low) <= 1e-6 * torch.maximum(low.abs(), high.abs())
    return torch.where(columns, (low + high) / 2, 0.0), bool(even[columns].all())


def _pads_zeros(module: Any) -> bool:
    if isinstance(module, nn.Linear) or module.padding_mode != "zeros":
        return False
    return module.padding != "valid" and (module.padding == "same" or any(module.padding))
