"""What `test_html.py` must notice."""

from fault import Fault

FAULTS = [
    Fault(
        "let names into the page as they are",
        "render/html.py",
        "autoescape=True",
        "autoescape=False",
    ),
    Fault(
        "let the page run any script",
        "render/html.py",
        'script_hash=f"sha256-{base64.b64encode(digest).decode()}",',
        'script_hash="unsafe-inline",',
    ),
    Fault(
        "write the page where it is to be and not beside",
        "render/html.py",
        "with atomic_file(path) as partial:",
        "for partial in [path]:\n        partial.open('w').close()",
    ),
    Fault(
        "fetch the page's style from elsewhere",
        "render/pages/page.html",
        "<style>",
        '<link rel="stylesheet" href="https://example.org/page.css"><style>',
    ),
    Fault(
        "leave out of the run's JSON why a decision was skipped",
        "analysis/run.py",
        'named = ("policy", "reason",',
        'named = ("policy",',
    ),
    Fault(
        "count growth alone on a run's page",
        "render/run_tables.py",
        "sum(a != b for a, b in pairwise(ranks))",
        "sum(a < b for a, b in pairwise(ranks))",
        "::test_a_runs_page_counts_growth_and_cuts_alike",
    ),
]
