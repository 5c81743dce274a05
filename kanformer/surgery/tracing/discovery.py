"""Finding feed-forward blocks by running the model once, and proposing a spec for each class that is not known."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

from kanformer.errors import NoFeedForwardError, SurgeryError
from kanformer.surgery.finding.sites import Site
from kanformer.surgery.finding.spec import FFNSpec
from kanformer.surgery.modules import get_path
from kanformer.surgery.planning.blocks import Refusal
from kanformer.surgery.planning.patchable import check_patchable
from kanformer.surgery.planning.plan import SurgeryPlan, plan_surgery
from kanformer.surgery.tracing.blocks import TracedBlock, traced_blocks, why_no_block
from kanformer.surgery.tracing.discovery_text import discovery_text
from kanformer.surgery.tracing.parts import key_of
from kanformer.surgery.tracing.propose import Proposer
from kanformer.surgery.tracing.trace import trace_model
from kanformer.surgery.tracing.trial import Trial


@dataclass(frozen=True)
class Finding:
    """Blocks of one class.

    Attributes:
        owner: the class. paths: of the blocks (of the slots that KAN-FFNs would take, where a spec is known).
        verdict: "known", "proposed", "refused" (it is a block and cannot be replaced) or "left" (it only looks like one).
        reason: why it is refused or left.
        spec: for a proposed one.
    """

    owner: str
    paths: tuple[str, ...]
    verdict: str
    reason: str = ""
    spec: FFNSpec | None = None


@dataclass(frozen=True)
class Discovery:
    """What one run of a model shows of its feed-forward blocks. `print(discovery)` says it, with lines to paste.

    Attributes:
        findings: by class, in the order of the model.
        specs: the proposed descriptions, for `patch_model(model, specs=discovery.specs)`; the known ones apply to the other blocks.
        exclude: paths of the blocks that cannot be replaced, for `exclude_modules`.
        difference: of the outputs with the proposed blocks patched, relative to the largest number of each; None without proposals.
    """

    model_class: str
    inputs: tuple[str, ...]
    findings: tuple[Finding, ...]
    exclude: tuple[str, ...] = ()
    difference: float | None = None

    @property
    def specs(self) -> tuple[FFNSpec, ...]:
        return tuple(finding.spec for finding in self.findings if finding.spec is not None)

    def __str__(self) -> str:
        return discovery_text(self)


def discover(model: nn.Module, batch: Mapping[str, Any]) -> Discovery:
    """Runs the model once on `batch`, follows its values and says which feed-forward blocks it has: known ones, and specs for those that are not.

    A proposed spec computes what ran; its blocks are patched for a trial, the outputs compared, and everything is put back. The model is left as it was.

    Args:
        model: an unpatched model with its weights. Blocks that the batch does not reach (an expert without tokens) are not seen.
        batch: inputs as for `model(**batch)`; a few tokens do.

    Raises:
        SurgeryError: the model is patched, quantized, compiled, wrapped or on the meta device.
        DataError: the model does not take this batch.
    """
    check_patchable(model)
    if any(parameter.is_meta for parameter in model.parameters()):
        raise SurgeryError("run the model", subject=type(model).__name__, got="parameters on the meta device", expected="a model with its weights")
    search = _Search(model, batch)
    return search.result()


class _Search:
    def __init__(self, model: nn.Module, batch: Mapping[str, Any]) -> None:
        self.model, self.batch = model, batch
        self.trace = trace_model(model, batch)
        self.plan = _plan(model)
        self.known = {id(weight) for site in self.plan.sites for weight in site.weights.values()} if self.plan else set()

    @functools.cached_property
    def trial(self) -> Trial:
        """Made where there is something to try: it runs the model."""
        return Trial(self.model, self.batch)

    def result(self) -> Discovery:
        proposed, others = self._judge()
        specs, failed = self._tried(proposed)
        plan = _plan(self.model, tuple(specs))
        sites, refusals = (plan.sites, plan.refusals) if plan else ((), ())
        findings = [_known(type_name, paths) for type_name, paths in _by_owner([site for site in sites if site.spec not in specs]).items()]
        findings += [
            Finding(name, tuple(paths), "proposed", spec=spec)
            for spec in specs
            for name, paths in _by_owner([site for site in sites if site.spec == spec]).items()
        ]
        findings += self._refused(refusals, {**others, **failed})
        measured = self.trial.difference(specs, {site.path for site in sites if site.spec in specs}) if specs else None
        names = tuple(sorted(self.batch))
        return Discovery(type(self.model).__name__, names, tuple(findings), tuple(refusal.path for refusal in refusals), measured)

    def _judge(self) -> tuple[dict[tuple[str, ...], FFNSpec], dict[tuple[str, ...], Finding]]:
        """(specs, other findings) by what blocks of one kind share; a kind of which one instance is a block is a block."""
        kinds: dict[tuple[str, ...], list[TracedBlock]] = {}
        for block in traced_blocks(self.trace):
            if not self._is_known(block):
                kinds.setdefault(key_of(self.model, block), []).append(block)
        specs, others = {}, {}
        for key, blocks in kinds.items():
            reasons = [why_no_block(block) for block in blocks]
            paths = tuple(dict.fromkeys(block.ups[0].map.module for block in blocks if block.ups[0].map))
            if None not in reasons:
                others[key] = Finding(key[0], paths, "left", str(reasons[0]))
                continue
            proposal = Proposer(self.model, self.trace, blocks[reasons.index(None)]).propose()
            if proposal.spec is None:
                others[key] = Finding(key[0], paths, "refused", proposal.reason)
            else:
                specs[key] = proposal.spec
        return specs, others

    def _is_known(self, block: TracedBlock) -> bool:
        assert block.down.map
        module = get_path(self.model, block.down.map.module)
        return id(module._parameters[block.down.map.name]) in self.known

    def _tried(self, proposed: dict[tuple[str, ...], FFNSpec]) -> tuple[list[FFNSpec], dict[tuple[str, ...], Finding]]:
        """(the specs with which the model's outputs stay, findings for the others): each is tried on its own."""
        good, failed = [], {}
        for key, spec in proposed.items():
            spec = spec if spec.name not in {other.name for other in good} else _renamed(spec, good)
            plan = _plan(self.model, (*good, spec))
            sites = [site for site in plan.sites if site.spec == spec] if plan else []
            reason = self.trial.problem([*good, spec], {site.path for site in sites}) if sites else "its parts do not fit together"
            if reason is None:
                good.append(spec)
            else:
                failed[key] = Finding(key[0], tuple(site.path for site in sites) or (spec.up,), "refused", reason)
        return good, failed

    def _refused(self, refusals: tuple[Refusal, ...], others: dict[tuple[str, ...], Finding]) -> list[Finding]:
        """What cannot be replaced, the plan's reasons first, and what only looks like a block."""
        groups: dict[tuple[str, str], list[str]] = {}
        for refusal in refusals:
            groups.setdefault((refusal.owner or refusal.family, refusal.reason), []).append(refusal.path)
        found = [Finding(owner, tuple(paths), "refused", reason) for (owner, reason), paths in groups.items()]
        said = {path for finding in found for path in finding.paths}
        return found + [other for other in others.values() if not any(_within(path, said) for path in other.paths)]


def _within(path: str, others: set[str]) -> bool:
    return any(path == other or path.startswith(other + ".") for other in others)


def _renamed(spec: FFNSpec, others: list[FFNSpec]) -> FFNSpec:
    return dataclasses.replace(spec, name=f"{spec.name}-{len(others) + 1}")


def _known(owner: str, paths: list[str]) -> Finding:
    return Finding(owner, tuple(paths), "known")


def _by_owner(sites: list[Site]) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for site in sites:
        found.setdefault(type(site.owner).__name__, []).append(site.path)
    return found


def _plan(model: nn.Module, specs: tuple[FFNSpec, ...] = ()) -> SurgeryPlan | None:
    try:
        return plan_surgery(model, specs=specs)
    except NoFeedForwardError:
        return None
