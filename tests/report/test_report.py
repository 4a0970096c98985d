"""Laws of the page: offline, escaped, complete, small, and written whole or not at all."""

from __future__ import annotations

import html
import json
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from plotly.graph_objects import Figure
from plotly.offline import get_plotlyjs

from expertmix.core.site import Site, SiteInfo
from expertmix.core.trace import Trace
from expertmix.errors import OutputError, TraceError
from expertmix.report import Effect, Report, Table

from . import world

EVIL = "<script>alert('&\"')</script><b>`x`"


def without_plotly(page: str) -> str:
    """The page without the library, which holds addresses of its own."""
    return page.replace(get_plotlyjs(), "")


def data_of(page: str) -> dict[str, Any]:
    """The data that the page's script reads."""
    found = re.search(r'<script id="report-data" type="application/json">(.*?)</script>', page)
    assert found
    loaded: dict[str, Any] = json.loads(found[1])
    return loaded


def words_of(page: str) -> str:
    """What a person reads: no tags, no style, no script."""
    body = re.sub(r"<(script|style)\b.*?</\1>", "", without_plotly(page), flags=re.DOTALL)
    return html.unescape(re.sub(r"<[^>]+>", "", body))


@pytest.fixture(scope="module")
def full_page() -> str:
    """The page of the embedded default with everything on it."""
    return Report.of(
        world.named_trace(6),
        title="Eight experts",
        intro="What was run.",
        effects=world.make_effects(),
        tables=world.make_tables(),
    ).html()


def test_nothing_is_fetched(full_page: str) -> None:
    """The page names no resource outside itself, and forbids the browser to load any."""
    ours = without_plotly(full_page)
    assert not re.search(r"""(src|href)\s*=\s*(?!["']?(#|data:,))""", ours)
    assert "url(" not in ours
    assert "@import" not in ours
    assert "default-src 'none'" in ours
    assert "http://" not in ours
    assert "https://" not in ours


def test_plotly_is_inlined_once(full_page: str) -> None:
    """plotly.js stands in the page exactly once."""
    assert full_page.count(get_plotlyjs()) == 1


def test_sections(full_page: str) -> None:
    """Every section is there, in order, and those with numbers have a headline."""
    found = re.findall(r'<section id="([\w-]+)" aria-labelledby', full_page)
    assert found == [
        "findings", "serves", "tokens", "load", "effects", "table-0", "evenness", "flow", "dead",
        "about",
    ]  # fmt: skip
    assert full_page.count('class="headline"') == 8
    assert full_page.count("<h1>") == 1


def test_headlines_are_computed(full_page: str) -> None:
    """The findings say what the numbers say."""
    text = words_of(full_page)
    assert "Each of the 8 kinds of text goes first to the expert of its own name." in text
    assert "All 48 experts were called at least once in 544 tokens." in text
    assert "The mixture beats its base on 8 of 8 kinds of text." in text
    worst = max(world.make_effects(), key=lambda effect: effect.delta)
    assert f"with “{worst.intervention}”, loss on {worst.label} goes from {worst.base:.2f}" in text


def test_figures_are_plotly(full_page: str) -> None:
    """plotly itself accepts every chart, and every chart has a place and an accessible name."""
    plots = data_of(full_page)["plots"]
    assert set(plots) == {"load-0", "evenness-lines", "evenness-peak", "flow-chart"}
    for key, plot in plots.items():
        Figure({"data": plot["data"], "layout": plot["layout"]})
        assert re.search(rf'id="{key}" role="img" aria-label="[^"]{{30,}}"', full_page)


def test_load_map_is_frequency(full_page: str) -> None:
    """The heat map shows frequencies, for all text and for each label."""
    report = Report.of(world.named_trace(6))
    (plot,) = (p for p in data_of(full_page)["plots"].values() if p["choices"])
    assert len(plot["choices"]) == 1 + len(world.NAMES)
    for choice, label in zip(plot["choices"], [None, *world.NAMES], strict=True):
        for column, site in enumerate(report.usage):
            expected = site.tally(label).frequency.tolist()
            assert [row[column] for row in choice] == pytest.approx(expected, abs=1e-4)


def test_flow_keeps_tokens(full_page: str) -> None:
    """What flows into a column of the flow chart flows out of it again."""
    link = data_of(full_page)["plots"]["flow-chart"]["data"][0]["link"]
    out, into = [0] * 40, [0] * 40
    for source, target, value in zip(link["source"], link["target"], link["value"], strict=True):
        out[source] += value
        into[target] += value
    assert sum(out[:8]) == 544
    assert into[8:32] == out[8:32]


def test_text_is_escaped() -> None:
    """No label, name, token, table or intervention can put markup into the page."""
    names = tuple(f"{EVIL}{number}" for number in range(4))
    trace = world.make_trace(world.make_infos(3, 4, 2, names), {EVIL: EVIL + " word"})
    edit = {"kind": "ablate", "sites": EVIL, "experts": [0]}
    meta = replace(trace.meta, model=EVIL, interventions=(edit,), settings={EVIL: EVIL})
    page = Report.of(
        Trace(meta, trace._store),
        title=EVIL,
        intro=EVIL,
        effects=[Effect(EVIL, EVIL, 1, 2, kind=EVIL, metric=EVIL)],
        tables=[Table(EVIL, (EVIL, EVIL), ((EVIL, EVIL),), note=EVIL, headline=EVIL)],
    ).html()
    ours = without_plotly(page)
    assert "<script>alert" not in ours
    assert "<b>`x`" not in ours
    assert ours.count("<script") == 3
    assert EVIL in words_of(page)
    drawn = json.dumps(data_of(page)["plots"]).replace("<extra></extra>", "")
    assert "<" not in drawn
    assert "&lt;script&gt;" in drawn


def test_tokens_are_readable(full_page: str) -> None:
    """Byte-level tokens show as text, line breaks are marked, padding is not shown."""
    text = words_of(full_page)
    assert "A baker sells 14 loaves in the morning" in text
    assert "def longest_word(text: str) -> str:↵" in text
    assert "Ġ" not in text
    assert "<pad>" not in text


def test_text_is_left_out_unless_recorded() -> None:
    """Without text the strips are blocks, and the page says how to keep the words."""
    page = Report.of(world.named_trace(3, text=False)).html()
    assert page.count("<i></i>") == 544
    assert "expertmix trace --text" in words_of(page)
    assert "baker" not in words_of(page)


def test_no_strips_on_demand() -> None:
    """With strips=0 no token text is on the page."""
    page = Report.of(world.named_trace(3), strips=0).html()
    assert "baker" not in without_plotly(page)
    assert data_of(page)["tokens"] is None


def test_strips_hold_the_decisions(full_page: str) -> None:
    """What the script reads are the experts of each token, best first, and their shares."""
    import base64
    import struct

    packed = data_of(full_page)["tokens"]["strips"][1][2]
    width, experts, shares = packed[0], base64.b64decode(packed[1]), base64.b64decode(packed[2])
    report = Report.of(world.named_trace(6))
    strip, site = report.strips[1], report.usage.sites[2].site
    assert strip.label == "python"
    assert struct.unpack(f"<{len(experts) // 2}H", experts) == tuple(
        strip.experts[site].flatten().tolist()
    )
    assert width == 2
    expected = strip.shares[site].flatten().tolist()
    assert [value / 255 for value in shares] == pytest.approx(expected, abs=1 / 500)


def test_interventions_are_said() -> None:
    """A trace that was recorded with an edit says so at the top."""
    trace = world.named_trace(3)
    edits = (
        {"kind": "ablate", "sites": "*", "experts": [1]},
        {
            "kind": "in_order",
            "interventions": [{"kind": "reweight", "sites": "layers.2.*", "stage": "logits"}],
        },
    )
    text = words_of(Report.of(Trace(replace(trace.meta, interventions=edits), trace._store)).html())
    assert "The model did not run as it is." in text
    assert "ablate python at all sites" in text
    assert "reweight at layers.2.* stage logits" in text


def test_dead_experts_are_named() -> None:
    """Experts that were never called are listed by site."""
    trace = world.make_trace(world.make_infos(3, 40, 1), {"maths": "2 + 2 = 4"})
    page = words_of(Report.of(trace).html())
    assert re.search(r"\d+ of 120 experts were never called in 9? ?\d* ?tokens", page)
    assert "None: every expert" not in page


MIXED = (
    SiteInfo(Site("model.layers.0.mlp"), 4, 1),
    SiteInfo(Site("model.layers.1.mlp"), 16, 4),
    SiteInfo(Site("model.layers.2.mlp"), 4, 2),
)
CHAIN = tuple(
    SiteInfo(Site(f"model.layers.{layer}.mlp", step), 6, 2) for layer in (0, 1) for step in (0, 1)
)


@pytest.mark.parametrize(
    "infos",
    [
        world.make_infos(1, 4, 1),
        world.make_infos(1, 1, 1),
        world.make_infos(2, 8, 8),
        (SiteInfo(Site("orchestrator"), 5, 2, ("a", "b", "c", "d", "e")),),
        MIXED,
        CHAIN,
    ],
    ids=["one site", "one expert", "two sites", "orchestrator", "mixed sizes", "chain of experts"],
)
@pytest.mark.parametrize("labels", [True, False])
def test_any_shape(infos: tuple[SiteInfo, ...], labels: bool) -> None:
    """One site, one expert, sites of different sizes, steps, no labels: each gives a page."""
    page = Report.of(world.make_trace(infos, labels=labels)).html()
    for plot in data_of(page)["plots"].values():
        Figure({"data": plot["data"], "layout": plot["layout"]})
    assert "nan" not in words_of(page)


def test_experts_without_names_are_never_pooled() -> None:
    """Expert 3 of one layer is not expert 3 of another: the table then shows a single layer."""
    text = words_of(Report.of(world.make_trace(world.make_infos(5, 8, 2))).html())
    assert "nothing to do with expert 3 of another" in text
    assert not re.search(r"counted over \d+ layers", text)


@pytest.mark.parametrize(("layers", "experts", "top_k"), [(48, 64, 8), (60, 160, 6)])
def test_size(layers: int, experts: int, top_k: int) -> None:
    """A large model's page stays below 8 MB, all sites and experts included."""
    page = Report.of(world.make_trace(world.make_infos(layers, experts, top_k))).html()
    assert len(page.encode()) < 8_000_000
    z = data_of(page)["plots"]["load-0"]["data"][0]["z"]
    assert (len(z), len(z[0])) == (experts, layers)


def test_many_labels() -> None:
    """Hundreds of labels give a page with the largest ones, which says so."""
    texts = {f"label {number}": "a b c" for number in range(200)}
    page = Report.of(world.make_trace(world.make_infos(4, 8, 2), texts)).html()
    assert "Of 200 kinds of text" in words_of(page)
    assert len(page.encode()) < 6_000_000


def test_empty_trace() -> None:
    """A trace without tokens, sites or decisions is a TraceError."""
    for infos in ((), world.make_infos(2, 4, 1)):
        with pytest.raises(TraceError):
            Report.of(world.make_trace(infos, {}))
    trace = world.named_trace(2)
    idle = [replace(chunk, decisions={}) for chunk in trace.chunks()]
    with pytest.raises(TraceError, match="no site ran"):
        Report.of(Trace(trace.meta, type(trace._store)(idle)))


def test_reads_the_trace_once() -> None:
    """A report makes one pass over the trace."""
    trace = world.named_trace(2)
    passes = []
    chunks = trace._store.chunks
    trace._store.chunks = lambda sites: passes.append(sites) or chunks(sites)  # type: ignore[method-assign]
    Report.of(trace)
    assert len(passes) == 1


@pytest.fixture(scope="module")
def small() -> Report:
    return Report.of(world.make_trace(world.make_infos(1, 4, 1)))


def test_save(small: Report, tmp_path: Path) -> None:
    """Saving writes one file, replaces an older one, and leaves nothing else."""
    target = tmp_path / "report.html"
    target.write_text("old")
    assert small.save(str(target)) == target
    assert target.read_text(encoding="utf-8") == small.html()
    assert [path.name for path in tmp_path.iterdir()] == ["report.html"]


def full_disk(path: Path, target: Path) -> None:
    raise OSError(28, "No space left on device")


def test_save_makes_its_folder(small: Report, tmp_path: Path) -> None:
    """As saving a trace does."""
    assert small.save(tmp_path / "new" / "report.html").is_file()


@pytest.mark.parametrize("broken", ["folder", "disk"])
def test_save_fails_whole(
    broken: str, small: Report, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What cannot be written is an OutputError that names the file; no half file is left."""
    (tmp_path / "file").touch()
    target = tmp_path / "report.html"
    if broken == "folder":
        target = tmp_path / "file" / "report.html"
    else:
        monkeypatch.setattr(Path, "replace", full_disk)
    with pytest.raises(OutputError, match=re.escape(str(target))):
        small.save(target)
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_save_over_a_folder(small: Report, tmp_path: Path) -> None:
    """A folder in the way is an OutputError."""
    (tmp_path / "report.html").mkdir()
    with pytest.raises(OutputError):
        small.save(tmp_path / "report.html")
    assert [path.name for path in tmp_path.iterdir()] == ["report.html"]


def test_file_is_memory(tmp_path: Path) -> None:
    """The page of a trace read from its file is the page of the trace in memory."""
    pytest.importorskip("expertmix.core.parquet")
    trace = world.named_trace(3)
    saved = Trace.load(trace.save(tmp_path / "trace.parquet"))
    assert data_of(Report.of(saved).html()) == data_of(Report.of(trace).html())


def test_import_is_light() -> None:
    """Importing the room imports neither torch nor plotly."""
    code = (
        "import sys, expertmix.report; "
        "raise SystemExit('torch' in sys.modules or 'plotly' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


BROWSER = shutil.which("chromium") or shutil.which("google-chrome")
FLAGS = (
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
    "--disable-background-networking", "--disable-component-update", "--disable-sync",
    "--enable-logging=stderr", "--virtual-time-budget=8000", "--dump-dom",
)  # fmt: skip


@pytest.fixture
def browse(tmp_path: Path) -> Callable[[str], tuple[str, str]]:
    """Opens a page; gives the document after its scripts ran, and the console."""

    def run(page: str) -> tuple[str, str]:
        assert BROWSER
        path = tmp_path / "page.html"
        path.write_text(page, encoding="utf-8")
        with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
            command = [BROWSER, *FLAGS, f"--user-data-dir={profile}", path.as_uri()]
            done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=True)
        console = [line for line in done.stderr.splitlines() if "CONSOLE" in line]
        return without_plotly(done.stdout), "\n".join(console)

    return run


@pytest.mark.skipif(BROWSER is None, reason="no Chromium here")
def test_browser(full_page: str, browse: Callable[[str], tuple[str, str]]) -> None:
    """In a browser every chart is drawn, every token has its color, and the console is empty."""
    document, console = browse(full_page)
    assert console == ""
    plots = data_of(full_page)["plots"]
    assert len(re.findall(r'class="plot js-plotly-plot"', document)) == len(plots)
    assert len(re.findall(r"--tint: ?rgba", document)) >= 544
    assert re.search(r'title="python \d+', document)
