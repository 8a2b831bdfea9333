"""HTML reports: what is in the file, and what a browser makes of it."""

from __future__ import annotations

import base64
import hashlib
import html
import json
import re
import shutil
import subprocess
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path

import pytest
from matplotlib.image import imread
from pydantic import TypeAdapter

from rankflow import inspect, squeeze
from rankflow.analysis.inspection import Inspection
from rankflow.analysis.run import Run, run_of
from rankflow.analysis.run_comparison import Comparison, compare
from rankflow.cli.json_schemas import schemas
from rankflow.compress.report import SqueezeReport
from rankflow.plans.layout import Layout, Slot
from rankflow.plans.ops import Grow, Keep
from rankflow.plans.plan import RankPlan
from rankflow.render.html import render, write_page
from rankflow.render.reports import inspection_page, run_page, squeeze_page
from rankflow.training.ledger import Ledger
from tests.analysis.test_inspection import LLAMA, layered, make
from tests.cli.test_app import refused, run
from tests.render.test_tables import run as a_run

ROOT = Path(__file__).parents[2]
HOSTILE = ["a.<script>alert(1)</script>", 'b." onmouseover="alert(2)', "c.&lt;b&gt;{{ 7 * 7 }}"]


class Reader(HTMLParser):
    """Every element with its attributes, and the tables' cells."""

    def __init__(self, text: str):
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.rows: list[list[str]] = []
        self._in_cell = False
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag == "tr":
            self.rows.append([])
        elif tag in ("td", "th"):
            self.rows[-1].append("")
            self._in_cell = True

    def handle_endtag(self, tag: str) -> None:
        self._in_cell = self._in_cell and tag not in ("td", "th")

    def handle_data(self, data: str) -> None:
        if self._in_cell:
            self.rows[-1][-1] += data


def hostile_adapter(folder: Path) -> Path:
    return make(folder, ["plain.q", *HOSTILE])


def hostile_ledger() -> Ledger:
    ledger = Ledger()
    ledger.append("attach", 0, layout=Layout({name: Slot(2, 8, 8, 1.0) for name in HOSTILE}).to_json())
    ledger.append("phase", 0, policy="<img src=x onerror=alert(3)>", end=9)
    ledger.append("skip", 4, policy="increlora", reason="</script><script>alert(4)</script>")
    ledger.append("fold", 8, policy="sora", gates={name: {"rank": 2, "<i>": 1.5} for name in HOSTILE}, total={})
    return ledger


def pages(folder: Path) -> list[str]:
    src = hostile_adapter(folder / "src")
    done = squeeze(src, energy=0.9, dry_run=True)
    source = "<b>runs</b>.jsonl"
    return [
        render(inspection_page(inspect(src))),
        render(squeeze_page(done)),
        render(run_page(hostile_ledger(), source)),
    ]


def test_names_are_text_whatever_is_in_them(tmp_path: Path):
    for text in pages(tmp_path):
        read = Reader(text)
        tags = [tag for tag, _ in read.elements]
        assert tags.count("script") == 1
        assert not {"i", "u"} & set(tags)
        assert not [name for _, attrs in read.elements for name in attrs if name.startswith("on")]
        assert all(attrs["src"].startswith("data:") for tag, attrs in read.elements if tag == "img")
        shown = [row[0] for row in read.rows]
        assert all(any(name.partition(".")[2] in cell for cell in shown) for name in HOSTILE)
        assert "49" not in shown


def test_nothing_is_fetched_and_only_our_script_runs(tmp_path: Path):
    for text in pages(tmp_path):
        read = Reader(text)
        for tag, attrs in read.elements:
            for name in ("src", "href", "srcset", "action", "poster"):
                assert (attrs.get(name) or "data:").startswith("data:"), (tag, attrs)
        style = text[text.index("<style>") : text.index("</style>")]
        assert "url(" not in style
        assert "@import" not in style
        (policy,) = [a["content"] for tag, a in read.elements if tag == "meta" and "http-equiv" in a]
        script = re.search(r"<script>(.*?)</script>", text, re.DOTALL)
        assert script is not None
        digest = base64.b64encode(hashlib.sha256(script[1].encode()).digest()).decode()
        assert policy.split("; ") == [
            "default-src 'none'", "img-src data:", "style-src 'unsafe-inline'", f"script-src 'sha256-{digest}'",
        ]  # fmt: skip


def test_the_inspection_is_all_there(tmp_path: Path):
    found = inspect(make(tmp_path / "src", layered(3, LLAMA)))
    read = Reader(render(inspection_page(found)))
    types, modules = read.rows[1:8], read.rows[9:]
    assert [row[0] for row in types] == sorted(LLAMA)
    assert len(modules) == 21
    assert modules[0][:3] == ["mlp.down_proj 0", "8", f"{found.modules[0].rank_effective:.1f}"]
    assert sum(tag == "svg" for tag, _ in read.elements) == 21
    values = [attrs["data-value"] for tag, attrs in read.elements if tag == "td"]
    assert str(found.types[0].energy_share) in values


def test_the_command_writes_a_report_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    src = make(tmp_path / "src", layered(1, ["q"]))
    out = tmp_path / "report.html"
    assert f"Wrote {out}" in run("inspect", src, "--html", out).stdout.replace("\n", "")
    first = out.read_text()
    assert "<title>src</title>" in first
    assert "is there already" in refused("squeeze", src, "--target-rank", 2, "--html", out)
    run("squeeze", src, "--target-rank", 2, "--html", out, "--force")
    assert "<title>src-r2</title>" in out.read_text()
    assert "is an .html file" in refused("inspect", src, "--html", tmp_path / "x.txt")
    assert "no such folder" in refused("inspect", src, "--html", tmp_path / "nowhere" / "x.html")
    (tmp_path / "folder.html").mkdir()
    assert "is a folder" in refused("squeeze", src, "--target-rank", 3, "--html", tmp_path / "folder.html")
    assert "is of one adapter" in refused("squeeze", src, "--ranks", "1,3", "--html", out)
    before = out.read_text()
    monkeypatch.setattr(Path, "write_text", lambda *_, **__: (_ for _ in ()).throw(OSError(28, "No space left")))
    assert "No space left" in refused("inspect", src, "--html", out, "--force")
    assert out.read_text() == before
    assert {p.name for p in tmp_path.iterdir()} == {"src", "src-r2", "report.html", "folder.html"}


def test_a_run_is_reported_where_and_as_asked(tmp_path: Path):
    path = tmp_path / "run.jsonl"
    path.write_text("".join(json.dumps(event) + "\n" for event in a_run(2).events))
    run("report", path, "--html", tmp_path / "run.html")
    read = Reader((tmp_path / "run.html").read_text())
    assert [row[1] for row in read.rows if row[0] == "80"] == ["skip"]
    assert len([row for row in read.rows if row[0].startswith("self_attn")]) == 4
    told = json.loads(run("report", path, "--json").stdout)
    ledger = Ledger.read(path)
    assert told["total_ranks"] == [sum(ranks.values()) for _, ranks in ledger.history()]
    assert {m["name"]: m["ranks"][-1] for m in told["modules"]} == ledger.layout().ranks
    assert [e["event"] for e in told["events"]] == [e["event"] for e in ledger.events]
    assert [e["reason"] for e in told["events"] if e["event"] == "skip"] == ["loss is not finite"]
    assert {p.name for p in tmp_path.iterdir()} == {"run.jsonl", "run.html"}


def test_a_runs_page_counts_growth_and_cuts_alike():
    layout = Layout({name: Slot(4, 8, 8, 1.0) for name in ("layers.0.q", "layers.0.v")})
    ledger = Ledger()
    ledger.append("attach", 0, layout=layout.to_json())
    for step, op in enumerate((Keep((0, 1)), Keep((0,)), Grow(3)), 1):
        ledger.append("resize", step, RankPlan({"layers.0.q": (op,)}, "x"))
    tables = [section.table for section in run_page(ledger, "x.jsonl").sections if section.table]
    table = next(table for table in tables if table.columns[-1].name == "changes")
    told = [i for i, column in enumerate(table.columns) if column.name in ("first", "last", "least", "most", "changes")]
    assert [[row[i].text for i in told] for row in table.rows] == [
        ["4", "4", "1", "4", "3"],
        ["4", "4", "4", "4", "0"],
    ]


def test_published_schemas_are_those_of_the_code():
    folder = ROOT / "rankflow" / "cli" / "schemas"
    assert {path.stem: json.loads(path.read_text()) for path in folder.iterdir()} == schemas()


def test_real_output_is_what_the_schemas_say(tmp_path: Path):
    src = make(tmp_path / "src", layered(2, ["q"]))
    done = squeeze(src, energy=0.9, dry_run=True)
    documents: dict[str, tuple[type, dict]] = {
        "inspection": (Inspection, inspect(src).to_json()),
        "squeeze": (SqueezeReport, done.to_json()),
        "run": (Run, run_of(hostile_ledger(), "x").to_json()),
        "comparison": (Comparison, compare(hostile_ledger(), hostile_ledger()).to_json()),
    }
    for name, (document, given) in documents.items():
        given = json.loads(json.dumps(given))
        schema = schemas()[name]
        assert set(given) == set(schema["properties"])
        adapter = TypeAdapter(document)
        again = adapter.dump_python(adapter.validate_json(json.dumps(given), strict=True), mode="json")
        assert again == {key: value for key, value in given.items() if key in again}
        broken = {**given, next(iter(schema["required"])): None}
        with pytest.raises(ValueError, match="1 validation error"):
            adapter.validate_json(json.dumps(broken), strict=True)


# -- in a browser ---------------------------------------------------------------------------------------------------

PROBE = """<script>
addEventListener("load", () => {
  const found = {};
  const tables = [...document.querySelectorAll("table")];
  found.rows = tables.map((t) => t.tBodies[0].rows.length);
  found.pictures = [...document.images].map((i) => i.naturalWidth);
  found.curves = [...document.querySelectorAll("svg.curve")].filter((c) => c.getBBox().width > 0).length;
  const table = tables[tables.length - 1];
  const column = (i) => [...table.tBodies[0].rows].map((r) => r.cells[i].dataset.value);
  found.sorted = [];
  for (const [i, head] of [...table.tHead.rows[0].cells].entries()) {
    for (const _ of [1, 2]) {
      head.querySelector("button").click();
      found.sorted.push([i, head.hasAttribute("data-text"), head.getAttribute("aria-sort"), column(i)]);
    }
  }
  found.alerts = window.alerts;
  found.requests = performance.getEntriesByType("resource").map((r) => r.name).filter((n) => !n.startsWith("data:"));
  found.wide = document.documentElement.scrollWidth - innerWidth;
  found.ground = getComputedStyle(document.body).backgroundColor;
  const said = document.createElement("pre");
  said.id = "found";
  said.textContent = JSON.stringify(found);
  document.body.append(said);
});
window.alerts = [];
window.alert = (what) => window.alerts.push(what);
</script>"""


@pytest.fixture
def browser(tmp_path: Path) -> Callable[..., str]:
    """Opens a file in a browser without a screen, with a profile of its own, and gives back what that prints."""
    found = next(
        (path for name in ("chromium", "chromium-browser", "google-chrome") if (path := shutil.which(name))), None
    )
    if found is None:
        pytest.skip("no chromium, chromium-browser or google-chrome on the path")

    def look(page: Path, *options: str) -> str:
        profile = tmp_path / f"profile{len(list(tmp_path.glob('profile*')))}"
        profile.mkdir()
        command = [
            found, "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
            "--disable-background-networking", "--disable-component-update", "--disable-sync", "--hide-scrollbars",
            f"--user-data-dir={profile}", "--virtual-time-budget=5000", *options, page.resolve().as_uri(),
        ]  # fmt: skip
        done = subprocess.run(command, capture_output=True, timeout=240, check=True)
        return done.stdout.decode()

    return look


def probed(page: Path) -> Path:
    """A copy of a page with our questions in it, which its policy would keep from being asked."""
    text = re.sub(r'<meta http-equiv="Content-Security-Policy"[^>]*>', "", page.read_text())
    out = page.with_name(f"probed-{page.name}")
    out.write_text(text.replace("<title>", f"{PROBE}<title>", 1))
    return out


def answers(dom: str) -> dict:
    read = re.search(r'<pre id="found">(.*?)</pre>', dom, re.DOTALL)
    assert read is not None, dom[-2000:]
    return json.loads(html.unescape(read[1]))


@pytest.mark.slow
def test_a_browser_shows_every_row_and_picture_sorts_and_fetches_nothing(tmp_path: Path, browser: Callable[..., str]):
    names = [*layered(32, LLAMA), *HOSTILE]
    write_page(inspection_page(inspect(make(tmp_path / "src", names))), tmp_path / "page.html")
    as_it_is = browser(tmp_path / "page.html", "--dump-dom")
    assert as_it_is.count("<table data-sorts") == 2, "the page's own policy lets its script run"
    found = answers(browser(probed(tmp_path / "page.html"), "--dump-dom"))
    assert found["rows"] == [10, 227]
    assert all(width > 500 for width in found["pictures"])
    assert len(found["pictures"]) == 1
    assert found["curves"] == 227
    assert found["alerts"] == found["requests"] == []
    for i, text, order, values in found["sorted"]:
        keys = values if text else [float(v) for v in values]
        if not text:
            assert keys == sorted(keys, reverse=order == "descending"), i
        else:
            numbered = [int(v.split()[1]) for v in values if v.startswith("model.layers.*.mlp.down_proj")]
            assert numbered == sorted(numbered, reverse=order == "descending")
    assert all(len(set(values)) > 200 for i, _, _, values in found["sorted"] if i in (0, 2, 3))
    assert [order for i, _, order, _ in found["sorted"] if i == 0] == ["ascending", "descending"]
    assert [order for i, _, order, _ in found["sorted"] if i == 2] == ["descending", "ascending"]


@pytest.mark.slow
def test_it_fits_a_phone_and_is_dark_where_the_reader_is(tmp_path: Path, browser: Callable[..., str]):
    write_page(inspection_page(inspect(make(tmp_path / "src", layered(2, LLAMA)))), tmp_path / "page.html")
    grounds, shots = [], []
    for scheme in (1, 0):  # light, dark
        how = (f"--blink-settings=preferredColorScheme={scheme}", "--window-size=500,900")
        found = answers(browser(probed(tmp_path / "page.html"), "--dump-dom", *how))
        assert found["wide"] <= 0, "only tables and pictures scroll sideways"
        grounds.append(found["ground"])
        shot = tmp_path / f"{scheme}.png"
        browser(tmp_path / "page.html", f"--screenshot={shot}", *how)
        shots.append(imread(shot)[..., :3])
    assert grounds == ["rgb(255, 255, 255)", "rgb(22, 24, 29)"]
    light, dark = shots
    assert light.mean() > 0.7 > 0.4 > dark.mean()
    for pixels in shots:
        drawn = abs(pixels - pixels[-1, -1]).max(axis=-1) > 0.1
        assert min(drawn[:, :250].mean(), drawn[:, 250:].mean()) > 0.02, "neither side is blank"


@pytest.mark.slow
def test_a_runs_report_opens_too(tmp_path: Path, browser: Callable[..., str]):
    write_page(run_page(hostile_ledger(), "x.jsonl"), tmp_path / "page.html")
    found = answers(browser(probed(tmp_path / "page.html"), "--dump-dom"))
    assert found["rows"] == [4, 3, 3]
    assert found["alerts"] == found["requests"] == []
    assert all(width > 500 for width in found["pictures"])
