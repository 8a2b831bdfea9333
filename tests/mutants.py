"""Deliberate faults, each of which must turn at least one test red. Run: python tests/mutants.py [WORD ...]

Every mutant replaces one piece of one file in a scratch copy of the package and runs the tests that should notice.
Words given on the command line pick the mutants whose name holds one of them.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

from rich.console import Console
from rich.progress import track

ROOT = Path(__file__).parents[1]


class Mutant(NamedTuple):
    name: str
    file: str  # under rankflow/
    old: str
    new: str
    tests: str  # what should turn red


MUTANTS = [
    Mutant(
        "drop the moment map",
        "moments.py",
        "first = {key: carry_first(m, N, M, self.factor) for key, m in self.first.items()}",
        "first = {key: m[..., : N.shape[-2], :] if self.factor == 'A' else m[..., : N.shape[-2]] "
        "for key, m in self.first.items()}",
        "tests/test_optim.py tests/test_surgeon.py",
    ),
    Mutant(
        "carry first moments as displacements instead of gradients",
        "carry.py",
        "return f64(M).mT.to(moment64.device) @ moment64",
        "return f64(N).to(moment64.device) @ moment64",
        "tests/test_linalg.py",
    ),
    Mutant(
        "forget the bound on second moments",
        "carry.py",
        "carried = torch.maximum(carried, bias_second * (f64(m) / bias_first).square())",
        "pass",
        "tests/test_linalg.py",
    ),
    Mutant(
        "transpose N",
        "linalg.py",
        "return N.detach().to(A) @ A",
        "N = N.mT if N.shape[-1] == N.shape[-2] else N; return N.detach().to(A) @ A",
        "tests/test_linalg.py tests/test_surgeon.py",
    ),
    Mutant(
        "take what Cholesky left of a singular matrix for its root",
        "roots.py",
        "if not bool(failed.any()):",
        "if failed is not None:",
        "tests/test_linalg.py",
    ),
    Mutant(
        "trust short sums of columns that nearly depend on each other",
        "roots.py",
        ">= _APART * size",
        ">= 0 * size",
        "tests/test_linalg.py",
    ),
    Mutant(
        "square bfloat16 out of float32's range",
        "roots.py",
        "& (size > 1e-20) & (size < 1e30) ",
        "",
        "tests/test_linalg.py",
    ),
    Mutant(
        "scale singular values twice",
        "linalg.py",
        "R_B = scaling * root_B if S_B is None else root(f64(S_B))",
        "R_B = scaling * scaling * root_B if S_B is None else root(f64(S_B))",
        "tests/test_linalg.py",
    ),
    Mutant(
        "go on from the first old directions, not from those that are kept most",
        "nearest.py",
        "old.append(int(diagonal.argmax()))",
        "old.append(len(old))",
        "tests/test_linalg.py",
    ),
    Mutant(
        "choose old directions without regard to those already chosen",
        "nearest.py",
        "    rest = rest - torch.outer",
        "    torch.outer",
        "tests/test_linalg.py",
    ),
    Mutant(
        "rely on old directions that do not stand for what is kept",
        "nearest.py",
        "if S[0] > _CONDITION * S[-1]:",
        "if S[0] < 0:",
        "tests/test_linalg.py",
    ),
    Mutant(
        "give all that is lost to one factor",
        "nearest.py",
        "new_N = Vh.mT @ ((U / root).mT @ projector[old])",
        "new_N = Vh.mT @ ((U / S).mT @ projector[old]); root = torch.ones_like(S)",
        "tests/test_linalg.py",
    ),
    Mutant(
        "let live cuts move factors to the sorted basis",
        "transitions.py",
        'gauge: Gauge = "nearest"',
        'gauge: Gauge = "keep"',
        "tests/test_surgeon.py",
    ),
    Mutant(
        "skip alpha",
        "patterns.py",
        "        alpha,\n        {anchored(name): rank",
        "        8,\n        {anchored(name): rank",
        "tests/test_adapters.py tests/test_surgeon.py",
    ),
    Mutant(
        "leave patterns unanchored",
        "patterns.py",
        'return "^" + re.escape(name)',
        "return re.escape(name)",
        "tests/test_adapters.py tests/test_surgeon.py",
    ),
    Mutant(
        "skip the ramp",
        "ramps.py",
        "(note.old + step * note.scale).to(p.dtype)",
        "(note.old + step).to(p.dtype)",
        "tests/test_optim.py tests/test_surgeon.py",
    ),
    Mutant(
        "reorder a group when a module comes back",
        "optim.py",
        "group.params.insert(place, p)",
        "group.params.append(p)",
        "tests/test_controller.py tests/test_surgeon.py",
    ),
    Mutant(
        "leave stale optimizer state",
        "optim.py",
        "new_state[new] = state.pop(id(new))",
        "new_state[new] = entries",
        "tests/test_surgeon.py tests/test_controller.py",
    ),
    Mutant(
        "grow with columns of B that are not zero",
        "staging.py",
        "b.new_zeros(*b.shape[:-1], op.n)",
        "b.new_full((*b.shape[:-1], op.n), 1e-6)",
        "tests/test_surgeon.py",
    ),
    Mutant(
        "do not roll back",
        "journal.py",
        "        if kind is not None:\n            self.rollback()",
        "        pass",
        "tests/test_surgeon.py tests/test_adapters.py",
    ),
    Mutant(
        "ignore a restore in the ledger",
        "ledger.py",
        'out = out[: event["events"]]',
        "pass",
        "tests/test_ledger.py",
    ),
    Mutant(
        "count calls instead of optimizer steps",
        "controller.py",
        "if self._counted == self.step:",
        "self._counted = self.step + 1\n        if False:",
        "tests/test_controller.py",
    ),
    Mutant(
        "draw the same new directions at every step",
        "surgeon.py",
        "keyed_generator(self.seed, step, target[name].shared or name)",
        "keyed_generator(self.seed, 0, target[name].shared or name)",
        "tests/test_surgeon.py tests/test_controller.py",
    ),
    Mutant(
        "sample with the seed of the process instead of the run's",
        "controller.py",
        "self.seed = self._surgeon.seed = self._gates.seed = self._probes.seed =",
        "self.seed = self._surgeon.seed = self._gates.seed =",
        "tests/test_controller.py",
    ),
    Mutant(
        "grow with the seed of the process instead of the run's",
        "controller.py",
        "self.seed = self._surgeon.seed = self._gates.seed = self._probes.seed =",
        "self.seed = self._gates.seed = self._probes.seed =",
        "tests/test_controller.py",
    ),
    Mutant(
        "draw noise with the seed of the process instead of the run's",
        "controller.py",
        "self._surgeon.seed = self._gates.seed = self._probes.seed =",
        "self._surgeon.seed = self._probes.seed =",
        "tests/test_gates.py::test_a_resumed_run_ends_where_an_uninterrupted_one_does",
    ),
    Mutant(
        "deal held-out batches with the seed of the process instead of the run's",
        "controller.py",
        "            self._held_out.seed = self.seed",
        "            pass",
        "tests/test_gates.py::test_a_resumed_run_goes_on_in_the_held_out_data",
    ),
    Mutant(
        "let a non-finite score decide",
        "controller.py",
        '            if bad := _non_finite(observed):\n                self._skip(f"{bad} is not finite", warn=due)',
        '            if bad := None:\n                self._skip(f"{bad} is not finite", warn=due)',
        "tests/test_controller.py",
    ),
    Mutant(
        "pass the budget at the last growth",
        "budget.py",
        "new = _next_rank(moving[i], ranks[i], want, left // costs[i])",
        "new = _next_rank(moving[i], ranks[i], want, want)",
        "tests/test_budget.py tests/test_increlora.py",
    ),
    Mutant(
        "carry d as z is carried",
        "statistics.py",
        "M.mT @ self.mean_dd @ M, torch.where",
        "N @ self.mean_dd @ N.mT, torch.where",
        "tests/test_statistics.py",
    ),
    Mutant(
        "take new directions for measured",
        "statistics.py",
        "torch.nn.functional.pad(self.measured, (0, n))",
        "torch.nn.functional.pad(self.measured, (0, n), value=1.0)",
        "tests/test_statistics.py",
    ),
    Mutant(
        "take a mixed direction for as measured as the best of it",
        "statistics.py",
        "torch.where(into, self.measured, torch.inf).amin(-1)",
        "torch.where(into, self.measured, 0.0).amax(-1)",
        "tests/test_statistics.py",
    ),
    Mutant(
        "average what is not finite",
        "statistics.py",
        "return torch.where(usable, mixed, mean)",
        "return mixed",
        "tests/test_statistics.py",
    ),
    Mutant(
        "leave averages behind at a resize",
        "surgeon.py",
        "self.averages.carry(journal, plan.ops)",
        "pass",
        "tests/test_averages.py::test_a_module_that_comes_back_starts_unmeasured",
    ),
    Mutant(
        "move averages outside the journal",
        "averages.py",
        "journal.contents(self._running, moved)",
        "self._running = moved",
        "tests/test_averages.py::test_a_resize_that_fails_leaves_them_to_the_bit_at_whatever_write",
    ),
    Mutant(
        "average gradients of a mean loss",
        "averages.py",
        "S_B * most.square().to(S_B.device)",
        "S_B * 1.0",
        "tests/test_averages.py::test_the_averages_are_those_of_z_and_d_of_the_summed_loss",
    ),
    Mutant(
        "start averages afresh on resume",
        "controller.py",
        'load_state_dict(state.get("averages", {}))',
        "load_state_dict({})",
        "tests/test_averages.py::test_a_resumed_run_has_them_to_the_bit_and_cuts_by_them_alike",
    ),
    Mutant(
        "trust averages of no token",
        "policies/squeeze.py",
        "float(signals[Signal.MEASURED].min()) < slot.rank",
        "False",
        "tests/test_squeeze_policy.py",
    ),
    Mutant(
        "resume without reshaping",
        "trainer.py",
        "            match_layout(self, model_id, adapter_name)",
        "            pass",
        "tests/test_trainer.py",
    ),
    Mutant(
        "believe in checkpoints above the budget",
        "trainer.py",
        "            state.best_metric = None",
        "            pass",
        "tests/test_trainer.py",
    ),
    Mutant(
        "score with absolute gradients",
        "recorder.py",
        "self._add(Signal.DELTA_SCORE, delta_score(A, B, g, contract) / norm)",
        "self._add(Signal.DELTA_SCORE, delta_score(A, B, g.abs(), contract) / norm)",
        "tests/test_probes.py",
    ),
    Mutant(
        "let gates forget Adam's averages in a resize",
        "learnt.py",
        "torch.cat([t, torch.zeros_like(fresh[key])])",
        "0 * torch.cat([t, torch.zeros_like(fresh[key])])",
        "tests/test_gates.py",
    ),
    Mutant(
        "forget what scaling a module left with",
        "controller.py",
        "self._adapter.sites[name].recall(slot.scaling)",
        "pass",
        "tests/test_shipped.py -k adalora",
    ),
    Mutant(
        "go on under any policy",
        "controller.py",
        'if own == saved["written"]:',
        "if own:",
        "tests/test_shipped.py -k another",
    ),
    Mutant(
        "let the first listener that leaves speak for all",
        "eagerness.py",
        "_listeners.discard(listener)",
        "_listeners.clear()",
        "tests/test_eagerness.py",
    ),
    Mutant(
        "save raw factors under gates",
        "gated.py",
        "state |= {key: gated(module, name).detach() for key, module, name in found if key in state}",
        "pass",
        "tests/test_gates.py",
    ),
    Mutant(
        "train outer gates on training batches",
        "gates.py",
        'wanted = self.gate.trained_on == ("outer" if outer else "inner")',
        "wanted = True",
        "tests/test_gates.py",
    ),
    Mutant(
        "train one copy of shared factors on its own gradient",
        "sharing.py",
        "        for p in copies:",
        "        for p in copies[1:]:",
        "tests/test_sharing.py",
    ),
    Mutant(
        "start shared factors from rows of each module's own",
        "surgeon.py",
        "target[name].shared or name",
        "name",
        "tests/test_sharing.py",
    ),
    Mutant(
        "let shared factors keep the optimizer state of their modules",
        "surgeon.py",
        "if any(isinstance(op, Share) and op.group for op in ops)",
        "if False",
        "tests/test_sharing.py",
    ),
    Mutant(
        "open a gate and let the function jump",
        "staging.py",
        "(self.B.index_select(-1, at) * scale).to(self.B.dtype)",
        "self.B.index_select(-1, at)",
        "tests/test_open.py",
    ),
    Mutant(
        "expect of a direction behind a gate the gradients of an open one",
        "moments.py",
        "guess(t) * gate**2",
        "guess(t)",
        "tests/test_open.py",
    ),
    Mutant(
        "count reserves in the budget",
        "policies/increlora.py",
        "if budget.spent(bare) >= budget.amount:",
        "if budget.spent(layout) >= budget.amount:",
        "tests/test_increlora.py",
    ),
    Mutant(
        "open reserves all the way",
        "policies/increlora.py",
        "range(rank + kept, rank + reserve)), self.reserve_gate)",
        "range(rank + kept, rank + reserve)))",
        "tests/test_increlora.py",
    ),
    Mutant(
        "grow beside a reserve instead of opening it",
        "policies/increlora.py",
        "opened = min(held, rank - slot.rank)",
        "opened = 0",
        "tests/test_increlora.py",
    ),
    Mutant(
        "do not ask a policy that leaves",
        "controller.py",
        "self._change(lambda: self._policy.leave(self._state, self.layout))",
        "pass",
        "tests/test_increlora.py",
    ),
    Mutant(
        "fold without the moments",
        "moments.py",
        "return self._map(lambda t: divide(t, 1, 0.0), lambda t: divide(t, 2, t.double()))",
        "return self",
        "tests/test_gates.py",
    ),
    Mutant(
        "resume on folded factors",
        "gates.py",
        "                    p.copy_(raw)",
        "                    pass",
        "tests/test_gates.py",
    ),
    Mutant(
        "shrink gates by a threshold that ignores the learning rate",
        "policies/sora.py",
        'xi *= lr if self.threshold == "lr_scaled" else 1.0',
        "pass",
        "tests/test_sora.py",
    ),
    Mutant(
        "prune the directions of greatest score",
        "pruning.py",
        "not wanted[i], -values[i], i))",
        "not wanted[i], values[i], i))",
        "tests/test_sora.py",
    ),
    Mutant(
        "measure uncertainty against the old average",
        "scores.py",
        "    return i, beta2 * u + (1 - beta2) * abs(s - i)",
        "    return i, beta2 * u + (1 - beta2) * abs(s - (i - (1 - beta1) * s) / beta1)",
        "tests/test_adalora.py tests/test_increlora.py",
    ),
    Mutant(
        "take the absolute value of gradients before their mean",
        "recorder.py",
        "self._add(Signal.WEIGHT_SCORE, contract(g[rows]) / self.site.scaling)",
        "self._add(Signal.WEIGHT_SCORE, (contract(g[rows]) / self.site.scaling).abs())",
        "tests/test_gora.py tests/test_probes.py",
    ),
    Mutant(
        "read a Conv1D's weight as a Linear's",
        "base_weight.py",
        'turned = site.kind == "embedding" or getattr(site.layer, "fan_in_fan_out", False)',
        'turned = site.kind == "embedding"',
        "tests/test_probes.py",
    ),
    Mutant(
        "round ranks down instead of to the nearest",
        "budget.py",
        "budget.cost(slot) / (i + 0.5)",
        "budget.cost(slot) / (i + 1)",
        "tests/test_gora.py tests/test_colora.py",
    ),
    Mutant(
        "forget that the means of two batches differ",
        "pca.py",
        "stacked = torch.cat([self.rows, spread, shift[None]])",
        "stacked = torch.cat([self.rows, spread])",
        "tests/test_pca.py",
    ),
    Mutant(
        "count hidden tokens as inputs",
        "recorder.py",
        "seen = None if mask is None or mask.shape != x.shape[:-1] else mask.to(x.device).flatten()",
        "seen = None",
        "tests/test_probes.py tests/test_eva.py",
    ),
    Mutant(
        "find first directions beside the old rows",
        "opening.py",
        'grown = [*ops_to(0, slot.rank, first(())), Grow(rank, "grad", sketch)]',
        'grown = [Grow(rank, "grad", sketch), Keep(tuple(range(slot.rank, slot.rank + rank)))]',
        "tests/test_eva.py",
    ),
    Mutant(
        "start a trained adapter anew",
        "opening.py",
        "if bool(record[Signal.A].any()) and bool(record[Signal.B].any()):",
        "if False:",
        "tests/test_gora.py tests/test_eva.py",
    ),
    Mutant(
        "let one module have all the rank",
        "policies/eva.py",
        "max(rank, round(self.rho * mean), 1)",
        "layout[name].max_rank",
        "tests/test_eva.py",
    ),
    Mutant(
        "let the least modules stay",
        "policies/diffora.py",
        "key=lambda i: (-means[i], i))",
        "key=lambda i: (means[i], i))",
        "tests/test_diffora.py",
    ),
    Mutant(
        "drop the strongest directions",
        "policies/rigl.py",
        "heapq.nsmallest(",
        "heapq.nlargest(",
        "tests/test_rigl.py",
    ),
    Mutant(
        "compare directions without their scaling",
        "policies/rigl.py",
        "obs[name][Signal.B], slot.scaling)",
        "obs[name][Signal.B], 1.0)",
        "tests/test_rigl.py",
    ),
    Mutant(
        "grow anew what was dropped and wins again",
        "policies/rigl.py",
        "candidates = [*_again(obs[name], dropped[name]), *candidates]",
        "candidates = [*((s, None) for s, _ in _again(obs[name], dropped[name])), *candidates]",
        "tests/test_rigl.py",
    ),
    Mutant(
        "leave what a phase froze to the next",
        "controller.py",
        "        if self.step + 1 >= self.phase.end:\n            self._thaw()",
        "        pass",
        "tests/test_lisa.py",
    ),
    Mutant(
        "forget at a resume who was frozen",
        "controller.py",
        'self._freeze(set(state.get("frozen", ())))',
        "pass",
        "tests/test_lisa.py",
    ),
    Mutant(
        "train what its owner had frozen",
        "sites.py",
        "flags = {role: on if role in roles else was for role, was in self._flags().items()}",
        "flags = dict.fromkeys(self._flags(), on)",
        "tests/test_surgeon.py tests/test_lisa.py",
    ),
    Mutant(
        "keep the gradients of what is frozen",
        "sites.py",
        '                journal.attr(p, "grad", None)',
        "                pass",
        "tests/test_surgeon.py",
    ),
    Mutant(
        "draw the same layers at every event",
        "policies/lisa.py",
        'keyed_generator(self.seed, "lisa", step)',
        'keyed_generator(self.seed, "lisa")',
        "tests/test_lisa.py",
    ),
    Mutant(
        "take absolute values at every point of a path",
        "studies.py",
        "                passes += 1\n            probes.end_batch()",
        "                passes += 1\n                probes.end_batch()",
        "tests/test_colora.py",
    ),
    Mutant(
        "score every point of a path at the adapter's own scaling",
        "recorder.py",
        "gradients = [_working(g) / scaling for g, _, scaling in passes]",
        "gradients = [_working(g) / self.site.scaling for g, _, _ in passes]",
        "tests/test_colora.py",
    ),
    Mutant(
        "start a path half a step from the adapter",
        "policies/colora.py",
        "1 - k / self.points",
        "1 - (k + 0.5) / self.points",
        "tests/test_colora.py",
    ),
    Mutant(
        "share ranks out whatever the size of a module",
        "policies/colora.py",
        "(c / top) ** self.beta * full[name] if",
        "(c / top) ** self.beta if",
        "tests/test_colora.py",
    ),
    Mutant(
        "give a module more parameters than its weights",
        "budget.py",
        "quotient * _LATER",
        "quotient",
        "tests/test_colora.py",
    ),
    Mutant(
        "forget the growth that a cut asks for",
        "transitions.py",
        ", *([Grow(cut.fresh)] if cut.fresh else [])]",
        "]",
        "tests/test_squeeze_policy.py tests/test_surgeon.py",
    ),
    Mutant(
        "quantise what gates have left instead of what rounding has",
        "bits.py",
        "quantised, residual_of = quantised + on * e, residual_of + e",
        "quantised, residual_of = quantised + on * e, residual_of + on * e",
        "tests/test_bayesian_lora.py",
    ),
    Mutant(
        "round off the grid at its edge",
        "bits.py",
        "_INSIDE = 1 - 1e-6",
        "_INSIDE = 1.0",
        "tests/test_bayesian_lora.py",
    ),
    Mutant(
        "leave gates on that are mostly closed",
        "hardconcrete.py",
        "return torch.sigmoid(_SHIFT - logit) < MOST_CLOSED",
        "return torch.sigmoid(_SHIFT - logit) < 1 - MOST_CLOSED",
        "tests/test_bayesian_lora.py",
    ),
    Mutant(
        "charge bits whose parents are off",
        "policies/bayesian_lora.py",
        'chain(probability(t["bits"])).unbind(-1)',
        'probability(t["bits"]).unbind(-1)',
        "tests/test_bayesian_lora.py",
    ),
    Mutant(
        "never fix the gates",
        "policies/bayesian_lora.py",
        "return step <= self.last",
        "return True",
        "tests/test_bayesian_lora.py",
    ),
    Mutant(
        "fold the noise of the last forward",
        "gates.py",
        "        self._draw(None)  # the last forward may have been one with noise",
        "",
        "tests/test_bayesian_lora.py",
    ),
    Mutant(
        "keep integers that are not the adapter's",
        "quantized.py",
        "_check(modules, path)\n    tensors: dict",
        "tensors: dict",
        "tests/test_bayesian_lora.py",
    ),
    Mutant(
        "unpack small integers without their sign",
        "quantized.py",
        "torch.where(flat >= 2 ** (bits - 1), flat - 2**bits, flat)",
        "flat",
        "tests/test_bayesian_lora.py",
    ),
]


def survives(mutant: Mutant) -> bool:
    """Whether the tests stay green with the fault in place."""
    with tempfile.TemporaryDirectory() as scratch:
        package = Path(scratch) / "rankflow"
        shutil.copytree(ROOT / "rankflow", package, ignore=shutil.ignore_patterns("__pycache__"))
        shutil.copytree(ROOT / "policies", Path(scratch) / "policies")
        path = package / mutant.file
        text = path.read_text()
        if text.count(mutant.old) != 1:
            raise SystemExit(
                f"{mutant.name}: found {text.count(mutant.old)} times in {mutant.file}, not once; update it"
            )
        path.write_text(text.replace(mutant.old, mutant.new))
        command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", *mutant.tests.split()]
        # Safe path: `python -m` would put this checkout before the scratch copy, and no mutant would ever run.
        env = {
            **os.environ,
            "PYTHONSAFEPATH": "1",
            "PYTHONPATH": scratch,
            "OMP_NUM_THREADS": "1",
            "PYTHONDONTWRITEBYTECODE": "1",
        }
        done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)
    if done.returncode not in (0, 1):
        raise SystemExit(f"{mutant.name}: pytest could not run\n{done.stdout[-2000:]}{done.stderr[-2000:]}")
    return done.returncode == 0


def main() -> None:
    console = Console()
    chosen = [m for m in MUTANTS if not sys.argv[1:] or any(word in m.name for word in sys.argv[1:])]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        fates = track(pool.map(survives, chosen), "mutants", len(chosen), console=console)
        alive = [m for m, survived in zip(chosen, fates, strict=True) if survived]
    for mutant in alive:
        console.print(f"[red]survived[/red] {mutant.name}: {mutant.tests} stayed green")
    console.print(f"{len(chosen) - len(alive)} of {len(chosen)} mutants were noticed")
    sys.exit(bool(alive))


if __name__ == "__main__":
    main()
