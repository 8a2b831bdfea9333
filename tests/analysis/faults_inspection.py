"""What `test_inspection.py` must notice."""

from fault import Fault

FAULTS = [
    Fault(
        "inspect another noise threshold than squeeze cuts at",
        "analysis/inspection.py",
        "noise_threshold=edge,",
        "noise_threshold=edge / 2,",
    ),
    Fault(
        "inspect types by the modules' number and not their energy",
        "analysis/inspection.py",
        "energy_share=own / total if total > 0 else 0.0,",
        "energy_share=len(members) / 21,",
    ),
    Fault(
        "inspect a metric of data in modules that were measured too little",
        "analysis/inspection.py",
        " if y.of_each[name] == m}",
        "}",
    ),
    Fault(
        "inspect the loss where only outputs were measured",
        "analysis/inspection.py",
        "if averages_of(metric) <= known]",
        "]",
    ),
    Fault(
        "draw rows of a panel in the order of their names",
        "plans/names.py",
        "return [int(part) for part in name.split(dot) if part.isdecimal()]",
        "return [part for part in name.split(dot) if part.isdecimal()]",
    ),
]
