"""What `test_gates.py` must notice."""

from fault import Fault

FAULTS = [
    Fault(
        "draw noise with the seed of the process instead of the run's",
        "training/state.py",
        "(phases, phases.surgeon, phases.gates, phases.probes, phases.data.held_out)",
        "(phases, phases.surgeon, phases.probes, phases.data.held_out)",
        "::test_a_resumed_run_ends_where_an_uninterrupted_one_does",
    ),
    Fault(
        "deal held-out batches with the seed of the process instead of the run's",
        "training/state.py",
        "(phases, phases.surgeon, phases.gates, phases.probes, phases.data.held_out)",
        "(phases, phases.surgeon, phases.gates, phases.probes)",
        "::test_a_resumed_run_goes_on_in_the_held_out_data",
    ),
    Fault(
        "let gates forget Adam's averages in a resize",
        "gating/state.py",
        "torch.cat([t, torch.zeros_like(fresh[key])])",
        "0 * torch.cat([t, torch.zeros_like(fresh[key])])",
    ),
    Fault(
        "save raw factors under gates",
        "gating/parametrize.py",
        "gated(module, name, still=True, saved=state[key]).detach()",
        "state[key]",
    ),
    Fault(
        "train outer gates on training batches",
        "gating/forward.py",
        'wanted = gate.trained_on == ("outer" if outer else "inner")',
        "wanted = True",
    ),
    Fault(
        "fold without the moments",
        "optim/moments.py",
        "lambda t: divide(t, 1, 0.0),\n            lambda t: divide(t, 2, t.double()),",
        "lambda t: t,\n            lambda t: t,",
    ),
    Fault(
        "resume on folded factors",
        "gating/gates.py",
        "transaction.tensor(getattr(self._adapter.sites[name], factor), raw)",
        "pass",
    ),
    Fault(
        "save what the last noisy forward saw",
        "gating/parametrize.py",
        "fitted[name].still if still else None",
        "None",
    ),
    Fault(
        "merge what the last noisy forward saw",
        "gating/parametrize.py",
        "        module.__dict__[_FITTED][name].drop_noise()",
        "        pass",
    ),
]
