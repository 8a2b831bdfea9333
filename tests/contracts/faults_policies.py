"""What `test_policies.py` must notice."""

from fault import Fault

FAULTS = [
    Fault(
        "decide up to the last step of the run",
        "plans/schedule.py",
        "total_steps + 1 - min(left, total_steps - start))",
        "total_steps + 1)",
        "-k trained_for_some_time",
    ),
    Fault(
        "let what a run's last phase trains at the end be a share of the whole run, whatever was written",
        "plans/schedule.py",
        "settling) * (min(end, total_steps) - first))",
        "settling) * total_steps)",
        "-k stop_that_is_written",
    ),
    Fault(
        "squeeze: come to the budget one stage early",
        "plans/schedule.py",
        "stages = changes + (begin == 0)",
        "stages = changes + 1",
        "-k every_rank_of_its_ladder",
    ),
    Fault(
        "say nothing of a decision that no step trains",
        "policies/idleness.py",
        "total_steps in phase.policy.when.events",
        "total_steps + 1 in phase.policy.when.events",
        "-k stop_that_is_written",
    ),
]
