"""Find the layers that read a layer's units, by changing the units and watching what changes.

Where switching the dead units on changes an input column of a layer, that layer reads them there;
where other noise changes the same column, the units are mixed with something else.
"""

from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from relubook.units.passes import LAYERS, NORMS, SUM, Passes, Plan, Reads, Sink, is_plain, unit_dim


class Unpaired(Exception):  # noqa: N818  (a finding, not an error)
    """A site cannot be repaired; the text is the reason that the reader sees."""


def find_readers(
    model: nn.Module, sites: Sequence[Any], batch: Any
) -> tuple[list[Plan], dict[str, str]]:
    """Say for every site of a report how to repair it, or by its name why not.

    Raises:
        ValueError: If a site names a layer that the model does not have.
    """
    names = {None, *dict(model.named_modules())}
    for site in sites:
        if site.producer not in names:
            claim = f"the report's site {site.name!r} names the layer {site.producer!r}"
            raise ValueError(f"{claim}, which the model does not have: diagnose this model")
    dead = [site for site in sites if bool(site.dead.any())]
    if not dead:
        return [], {}
    search, uses = _Search(model, batch), Counter(site.producer for site in sites)
    for site in dead:
        with search.leaving(site.name):
            search.plans.append(search.plan(site, uses[site.producer]))
    search.find_all_sinks()
    plans = [plan for plan in search.plans if plan.site not in search.reasons]
    strays = {plan.site for plan in search.strays(plans)}
    reason = "its units go other ways in training than in evaluation mode"
    kept = [plan for plan in plans if plan.site not in strays]
    return kept, search.reasons | dict.fromkeys(strays, reason)


class _Search(Passes):
    """Says of each site how to repair it, or in ``reasons`` why not."""

    def __init__(self, model: nn.Module, batch: Any) -> None:
        super().__init__(model, batch)
        self.reasons: dict[str, str] = {}

    @contextmanager
    def leaving(self, site: str) -> Iterator[None]:
        """Note the reason where a site turns out to be beyond repair."""
        try:
            yield
        except Unpaired as reason:
            self.reasons[site] = str(reason)

    def plan(self, site: Any, uses: int) -> Plan:
        """The layer to repair for a site; whom it feeds is found later."""
        name, before = site.producer, None
        if name is None:
            what = self.feeds.get(site.name.split("#")[0].replace("_()", "()"), "something")
            raise Unpaired(f"{what} lies between it and the layers: none feeds it alone")
        if uses > 1:
            raise Unpaired(f"{name!r} feeds {uses} rectifier sites, and only one could be repaired")
        if isinstance(self.modules[name], NORMS):
            self._check(name, NORMS)
            before, name = (name, self.modules[name]), self.feeds[name]
            if name not in self.modules:
                raise Unpaired(f"{name} lies between {before[0]!r} and the layers")
        self._check(name, LAYERS)
        module, dead = self.modules[name], site.dead.detach().cpu()
        outputs = getattr(module, "out_features", None) or module.out_channels
        dim = unit_dim(module)
        if outputs != len(dead) or site.unit_dim not in (dim, dim + len(site.shape)):
            where = f"its {len(dead)} units lie along dimension {site.unit_dim}"
            raise Unpaired(f"{where}, which is not that of the {outputs} outputs of {name!r}")
        plan = Plan(site.name, name, module, dead.nonzero().flatten(), before)
        self._check_parameters(plan)
        return plan

    def _check(self, name: str, kinds: tuple[type, ...]) -> None:
        module = self.modules[name]
        if not is_plain(module, kinds):
            kind = type(module).__name__
            raise Unpaired(f"{name!r} is a {kind}; linear layers and convolutions can be repaired")
        if any(k in dir(module) and k not in module._parameters for k in ("weight", "bias")):
            why = "computed from other parameters (a parametrization, weight norm or pruning)"
            raise Unpaired(f"the weight of {name!r} is {why}: remove that first")
        if self.calls[name] != 1:
            raise Unpaired(f"{name!r} is called {self.calls[name]} times")

    def _check_parameters(self, plan: Plan) -> None:
        everything = list(self.model.named_parameters(remove_duplicate=False))
        for name, parameter in plan.parameters():
            twins = [n for n, p in everything if n != name and p.data_ptr() == parameter.data_ptr()]
            if not parameter.requires_grad:
                raise Unpaired(f"{name!r} is frozen (requires_grad is False)")
            if id(parameter) in self.outside:
                raise Unpaired(f"{name!r} is also used outside of its layer")
            if twins:
                raise Unpaired(f"{name!r} shares its memory with {twins[0]!r}")

    def find_all_sinks(self) -> None:
        """Find who reads each plan's units."""
        try:
            self.off, self.other = self.observe(0), self.observe(1)
        except Exception as error:  # whatever the model's code raises on noise
            reason = f"the model does not run on made-up activations ({error})"
            self.reasons |= {plan.site: reason for plan in self.plans}
            return
        self.noisy = self.off.changed(self.other)
        leaks = self._leaks(self.plans)
        for plan in self.plans:
            with self.leaving(plan.site):
                if leaks and self._leaks([plan]):
                    raise Unpaired(f"what {plan.producer!r} computes goes to 2 places or more")
                touched = self._touched(plan)
                try:
                    plan.sinks = self._sinks(plan, touched)
                except Unpaired:
                    plan.sinks = self._gates(touched)
                    if not plan.sinks:
                        raise
                    plan.sinks = self._sinks(plan, self._touched(plan))
                self._check_parameters(plan)

    def _leaks(self, plans: list[Plan]) -> bool:
        """Whether anything but the rectifiers sees how silent the units are."""
        changed = self.off.changed(self.observe(shifted=plans))
        norms = {plan.before[0] for plan in plans if plan.before}
        return any(name not in norms for name, _ in changed)

    def _touched(self, plan: Plan) -> Reads:
        """Which columns of which reads a plan's units change, its gates being shut."""
        touched = self.off.changed(self.observe(on=[plan], gated=[plan]))
        for key, columns in touched.items():
            if key not in self.off.reads or columns.shape != self.off.reads[key].shape[1:]:
                raise Unpaired("its units decide which ways the values go")
        return touched

    def _sinks(self, plan: Plan, touched: Reads) -> list[Sink]:
        """Every layer that reads a plan's units, and those of the plan's gates that they reach."""
        gates = {sink.name: sink for sink in plan.sinks}
        sinks, known = [], torch.zeros(1)
        for (name, call), columns in touched.items():
            module = self.modules.get(str(name))
            if name is not None and isinstance(module, NORMS):
                known = torch.cat([known, _constant(self.off.returns[name], columns)[0]])
                sinks += [gates[name]] if name in gates else []
                continue
            mixed = bool((self.noisy.get((name, call), columns & False) & columns).any())
            if mixed and self.feeds[name] == SUM:
                raise Unpaired(f"its units reach add(), {SUM}, which mixes them with others")
            if name is None:
                raise Unpaired("its units are the model's output: they have no next layer")
            reach = f"its units reach {name!r}"
            if not isinstance(module, LAYERS):
                raise Unpaired(f"{reach} ({type(module).__name__}), which may mix them with others")
            self._check(name, LAYERS)
            if mixed:
                raise Unpaired(f"{reach} together with others, behind {self.feeds[name]}")
            constant, even = _constant(self.off.reads[name, call], columns)
            gaps = (constant[columns, None] - known).abs().amin(1)
            even &= bool((gaps <= 1e-6 * constant[columns].abs()).all())
            if bool((constant != 0).any()) or not even:
                behind = f"its units, while silent, are not 0 to {name!r}"
                if module.bias is None:
                    raise Unpaired(f"{behind}, which has no bias that could take over the rest")
                if not even or _is_uneven(module):
                    raise Unpaired(f"{behind}, nor the same constant everywhere")
            sinks.append(Sink(name, module, columns, constant))
        if not sinks:
            raise Unpaired("no layer reads its units")
        return sinks

    def _gates(self, touched: Reads) -> list[Sink]:
        """The norms that a plan's units pass, where their scale can be cut."""
        gates = []
        for (name, _), columns in touched.items():
            norm: Any = self.modules.get(str(name))
            if name is None or not is_plain(norm, NORMS) or self.calls[name] != 1:
                continue
            mine, its = self.off.returns[name], self.other.returns[name]
            constant, even = _constant(mine, columns)
            scaled = norm._parameters.get("weight") is not None
            if scaled and even and torch.equal(mine[:, columns], its[:, columns]):
                gates.append(Sink(name, norm, columns, constant))
        return gates

    def strays(self, plans: list[Plan]) -> list[Plan]:
        """The plans whose units reach other places in training than in evaluation mode."""

        def stray(plans: list[Plan]) -> bool:
            known = {s.name for plan in plans for s in plan.sinks}
            known |= {n for n, m in self.modules.items() if isinstance(m, NORMS)}
            off = self.observe(gated=plans, training=True)
            on = self.observe(on=plans, gated=plans, training=True)
            return any(name not in known for name, _ in off.changed(on))

        try:
            return [plan for plan in plans if stray([plan])] if plans and stray(plans) else []
        except Exception:  # a model may not run in training mode on a batch alone
            return []


def _constant(digest: Tensor, columns: Tensor) -> tuple[Tensor, bool]:
    """What some columns hold, 0 elsewhere, and whether it is the same everywhere."""
    low, high = digest[1], digest[2]
    even = (high - low) <= 1e-6 * torch.maximum(low.abs(), high.abs())
    return torch.where(columns, (low + high) / 2, 0.0), bool(even[columns].all())


def _is_uneven(module: Any) -> bool:
    """Whether a layer does not sum a constant input to the same value everywhere."""
    if isinstance(module, nn.Linear):
        return False
    pads = module.padding != "valid" and (module.padding == "same" or any(module.padding))
    return module.transposed or (module.padding_mode == "zeros" and pads)
