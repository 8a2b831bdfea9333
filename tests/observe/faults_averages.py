"""What `test_averages.py` must notice."""

from fault import Fault

FAULTS = [
    Fault(
        "leave averages behind at a resize",
        "surgery/surgeon.py",
        "self.averages.carry(transaction, plan.ops)",
        "pass",
        "::test_a_module_that_comes_back_starts_unmeasured",
    ),
    Fault(
        "move averages outside the transaction",
        "observe/averages.py",
        "transaction.contents(self._running, moved)",
        "self._running = moved",
        "::test_a_resize_that_fails_leaves_them_to_the_bit_at_whatever_write",
    ),
    Fault(
        "average gradients of a mean loss",
        "observe/averages.py",
        "S_B * most.square().to(S_B.device)",
        "S_B * 1.0",
        "::test_the_averages_are_those_of_z_and_d_of_the_summed_loss",
    ),
    Fault(
        "start averages afresh on resume",
        "training/state.py",
        'load_state_dict(state.get("averages", {}))',
        "load_state_dict({})",
        "::test_a_resumed_run_has_them_to_the_bit_and_cuts_by_them_alike",
    ),
]
