"""What `test_registry.py` must notice."""

from fault import Fault

FAULTS = [
    Fault(
        "import every package's policies for any file",
        "config/load.py",
        'schema.classes(phase["policy"] for phase in meant if isinstance(phase, dict))',
        "schema.classes(registry.policy_names())",
    ),
    Fault(
        "leave policies of others unchecked that were made in Python",
        "config/load.py",
        "if policy.name not in registry.policy_names()",
        "if policy.name not in registry.shipped_policies()",
    ),
]
