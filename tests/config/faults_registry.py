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
    Fault(
        "let a policy have the name of a shipped policy file",
        "config/registry.py",
        "{*shipped_policies(), *shipped()}",
        "shipped_policies()",
    ),
    Fault(
        "show a broken policy as one without settings",
        "cli/policies.py",
        "found[name].broken",
        "not found[name].name",
    ),
]
