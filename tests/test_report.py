"""`surgery report`: one file that needs nothing else, true to the runs' files, whatever is in them or missing."""

from __future__ import annotations

import json
import math
import re
from dataclasses import replace
from html.parser import HTMLParser

import plotly.graph_objects as go
import pytest
from click.testing import CliRunner

from surgery.cli.main import main
from surgery.errors import FileError, UsageError
from surgery.midtraining.report.curves import POINTS, frame, mean, series, smoothed, thinned
from surgery.midtraining.report.figures import figures
from surgery.midtraining.report.page import named_apart, render, script_json, write_report
from surgery.midtraining.report.plots import COLOURS, style
from surgery.midtraining.report.tables import tables
from surgery.midtraining.report.verdict import tiles, verdict
from surgery.midtraining.run_folder import LINES, RunFolder, find_runs, read_folder, read_soup
from tests import runs as samples

HOSTILE = "</script><script>alert(1)</script><b>&\"'{{ 7 * 7 }}"


@pytest.fixture(scope="module")
def seeds(tmp_path_factory):
    """A folder of three runs and the soup of them."""
    top = tmp_path_factory.mktemp("runs") / "seeds"
    made = [samples.sample(top / f"seed-{s}", steps=100, seed=s, gain=0.01 * i) for i, s in enumerate((42, 666, 7))]
    samples.soup(top, made, gain=0.04)
    return top


@pytest.fixture(scope="module")
def moe(tmp_path_factory):
    return samples.sample(tmp_path_factory.mktemp("runs") / "moe", steps=80, of=200, experts=6, layers=3)


def opened(*paths):
    return named_apart([read_folder(path) for path in find_runs([str(p) for p in paths])])


class Page(HTMLParser):
    """What a browser sees: the text, the tags, and what they refer to."""

    def __init__(self, html):
        super().__init__()
        self.text, self.tags, self.links, self.rows, self.inside = [], [], [], [], ""
        self.feed(html)

    def handle_starttag(self, tag, attrs):
        self.inside = tag
        self.tags.append(tag)
        self.links += [value for name, value in attrs if name in ("src", "href", "data", "srcset")]
        if tag == "tr":
            self.rows.append([])

    def handle_endtag(self, tag):
        self.inside = ""

    def handle_data(self, data):
        if self.inside in ("td", "th") and self.rows and data.strip():
            self.rows[-1].append(data.strip())
        if self.inside not in ("script", "style") and data.strip():
            self.text.append(data.strip())


def page(*paths, soup=None):
    return Page(render(opened(*paths), soup or {}))


# the file


def test_one_file_without_a_network(seeds, tmp_path):
    assert write_report([str(seeds)], tmp_path / "r.html") == ["seed-42", "seed-666", "seed-7"]
    html = (tmp_path / "r.html").read_text()
    seen = Page(html)
    assert seen.links == []
    assert "link" not in seen.tags and "iframe" not in seen.tags and "img" not in seen.tags
    assert "default-src 'none'" in html  # the browser itself refuses to load anything
    styles = re.search(r"<style>(.*?)</style>", html, re.S)[1]
    assert "url(" not in styles and "@import" not in styles
    assert "prefers-color-scheme: dark" in styles
    assert not list(tmp_path.glob("*.partial"))


def test_names_from_files_are_text_and_nothing_else(tmp_path):
    samples.sample(tmp_path / "x", steps=20, name=HOSTILE, command=[HOSTILE], versions={HOSTILE: HOSTILE})
    for name in ("metrics.jsonl", "evals.jsonl", "events.jsonl"):
        path = tmp_path / "x" / name
        path.write_text(
            path.read_text().replace('"math"', json.dumps(HOSTILE)).replace("grouped_mm", json.dumps(HOSTILE)[1:-1])
        )
    (tmp_path / "x" / "config.resolved.yaml").write_text(HOSTILE)
    html = render(opened(tmp_path / "x"), {"kept": HOSTILE})
    assert "alert(1)</script>" not in html
    assert html.count("<script") == 3  # the data, plotly, and the page's own
    seen = Page(html)
    assert HOSTILE in seen.text
    assert "49" not in seen.text  # no template inside a template
    drawn = json.loads(re.search(r'id="figures">(.*?)</script>', html, re.S)[1])
    assert all("<b>" not in json.dumps(t["name"]) for f in drawn for t in f["traces"] if "name" in t)


def test_json_can_stand_in_a_script():
    value = {"</script>": ["<!--", "&amp;", "\u2028", "ü"]}
    text = script_json(value)
    assert not set("<>&") & set(text)
    assert text.isascii()
    assert json.loads(text) == value


# what it says


def test_the_verdict_comes_first(seeds):
    seen = page(seeds, soup=read_soup(seeds))
    wanted = "seeds: 3 runs", "The soup beats", "Held-out loss fell", "All 3 runs finished", "Nats per token at the end"
    at = [next(i for i, text in enumerate(seen.text) if text.startswith(words)) for words in wanted]
    assert at == sorted(at)


def test_the_table_of_losses_is_what_the_files_say(seeds):
    table = tables(opened(seeds), read_soup(seeds))[1]
    assert table.title == "Bits per byte at the end"
    rows = {row[0].text: [cell.text for cell in row[1:]] for row in table.rows}
    shown = page(seeds, soup=read_soup(seeds)).rows
    assert all([name, *values] in shown for name, values in rows.items())
    ends = {}
    for name in ("seed-42", "seed-666", "seed-7"):
        last = json.loads((seeds / name / "evals.jsonl").read_text().splitlines()[-1])
        ends[name] = [last["heldout"][d]["bpb"] for d in ("code", "math", "prose")]
    merged = [read_soup(seeds)["soup"]["heldout"][d]["bpb"] for d in ("code", "math", "prose")]
    for name, values in {**ends, "soup": merged}.items():
        assert rows[name] == [f"{v:.4f}" for v in (*values, sum(values) / 3)]
    best = [min(v[i] for v in ends.values()) for i in range(3)]
    assert rows["soup against the best ingredient"][:3] == [f"{m - b:+.4f}" for m, b in zip(merged, best, strict=True)]


def test_the_least_of_a_column_is_marked(seeds):
    table = tables(opened(seeds), read_soup(seeds))[0]
    marked = {(row[0].text, i) for row in table.rows for i, cell in enumerate(row) if cell.kind == "best"}
    assert marked == {("soup", i) for i in range(1, 5)}


def test_a_comparison_of_small_models_says_what_it_is_worth(seeds):
    told = "Models of 1.05M parameters show that each of these can be trained"
    assert told in tables(opened(seeds), {})[0].note and any(told in text for text in page(seeds).text)
    assert told not in tables(opened(seeds)[:1], {})[0].note  # nothing is compared
    large = [replace(run, run=run.run | {"model": {"active_parameters": 7e9}}) for run in opened(seeds)]
    assert tables(large, {})[0].note == "The least of each column is marked."


@pytest.mark.parametrize(("gain", "said"), [(0.04, "The soup beats its best ingredient, seed-7"),
                                            (-0.04, "The soup does not beat its best ingredient, seed-7")])  # fmt: skip
def test_a_soup_is_compared_with_its_best_ingredient(seeds, gain, said):
    soup = read_soup(seeds)
    for told in soup["soup"]["heldout"].values():
        told["loss"] += 0.04 - gain
    sentences = verdict(opened(seeds), soup).sentences
    assert sentences[0].startswith(said)


def test_other_runs_are_no_ingredients(seeds, moe):
    soup = read_soup(seeds)
    worse = samples.DOMAINS["math"][1]
    runs = opened(seeds, moe)
    for run in runs:
        if run.title == "moe":
            run.evals[-1]["heldout"] = {d: {"loss": 0.1 * worse} for d in samples.DOMAINS}
    assert "seed-7: held-out" in verdict(runs, soup).sentences[0]


def test_a_run_in_progress_says_so(moe):
    found = verdict(opened(moe), {})
    assert "The run (step 80 of 200): going on, or killed, for no end is written." in found.sentences
    assert "1 alarm: see Events." in found.sentences
    assert found.kind == ""


def test_a_failed_self_test_comes_before_everything(moe, tmp_path):
    folder = samples.sample(tmp_path / "bad", steps=10)
    tests = json.loads((folder / "selftests.json").read_text())
    tests[0]["passed"] = False
    samples.write(folder / "selftests.json", tests)
    samples.write(folder / "end.json", {"status": "failed", "step": 10, "reason": "a self-test failed."})
    found = verdict(opened(folder), {})
    assert found.kind == "bad"
    assert found.sentences[0] == "Self-tests that failed: causality."
    assert "The run (step 10) failed: a self-test failed." in found.sentences
    assert ["causality", "failed"] in [row[:2] for row in page(folder).rows]


def test_tiles_hold_the_figures(seeds, moe):
    found = {tile.name: tile for tile in tiles(opened(moe), {})}
    assert found["parameters"].value == "4.9M"
    assert found["parameters"].more == "1.65M active"
    assert found["tokens"].value == "163.8k"
    assert found["tokens per second"].more == "101.0 GFLOP/s"
    assert found["self-tests passed"].value == "4 of 4"
    several = {tile.name: tile for tile in tiles(opened(seeds), {})}
    assert several["tokens"].more == "3 runs of 100 steps"


def test_the_plan_shows_shares_and_epochs(seeds):
    (table,) = [t for t in tables(opened(seeds), {}) if t.section == "Data"]
    assert [cell.text for cell in table.rows[1]] == ["math", "50.0%", "1,760", "500", "3.52", "96", "64,000"]
    assert "3.52 epochs" in table.note


def test_provenance_marks_what_differs(seeds):
    (table,) = [t for t in tables(opened(seeds), {}) if t.section == "Provenance"]
    differs = {row[0].text for row in table.rows if any(cell.kind == "differs" for cell in row)}
    assert differs == {"name", "seed"}


# figures


def with_colours(value):
    """Colours by name are put in by the page."""
    if isinstance(value, dict):
        return {k: with_colours(v) for k, v in value.items()}
    if isinstance(value, list):
        return [with_colours(v) for v in value]
    return "#123456" if isinstance(value, str) and value.startswith("$") else value


def test_plotly_takes_every_figure(seeds, moe):
    drawn = figures(opened(seeds, moe))
    assert {f.section for f in drawn} == {"Training", "Held-out loss", "Tasks", "Speed", "Experts"}
    for figure in drawn:
        go.Figure(data=with_colours(figure.traces), layout=with_colours(figure.layout))


def test_colours_are_names_that_the_page_knows(seeds, moe):
    html = render(opened(seeds, moe), {})
    styles = re.search(r"<style>(.*?)</style>", html, re.S)[1]
    light, dark = styles.split("prefers-color-scheme: dark")
    used = set(re.findall(r'"\$([a-z]+[0-9]*)"', html.split('id="figures">')[1].split("</script>")[0]))
    assert used
    for name in used:
        assert f"--{name}:" in light and f"--{name}:" in dark, name


def test_more_runs_than_colours_are_told_apart_by_dashes():
    styles = [(style(i)["color"], style(i)["dash"]) for i in range(3 * COLOURS)]
    assert len(set(styles)) == len(styles)


def test_curves_are_what_the_files_say(seeds):
    figure = next(f for f in figures(opened(seeds)) if f.title == "Learning rate")
    for trace, run in zip([t for t in figure.traces if t.get("opacity") is None], opened(seeds), strict=True):
        assert trace["x"] == [r["step"] for r in run.metrics]
        assert trace["y"][50] == pytest.approx(run.metrics[50]["lr"])  # a straight line stays one when it is smoothed


def test_loads_are_multiples_of_an_equal_share(moe):
    (figure,) = [f for f in figures(opened(moe)) if f.title == "Load of the experts"]
    load = opened(moe)[0].experts[-1]["load"]
    assert figure.traces[0]["z"] == [pytest.approx([6 * share for share in row], rel=1e-3) for row in load]
    scale = figure.traces[0]["colorscale"]
    assert scale[1][0] * figure.traces[0]["zmax"] == pytest.approx(1)  # an equal share is the middle colour


def test_every_layer_can_be_chosen(moe):
    (figure,) = [f for f in figures(opened(moe)) if f.title == "Chosen together"]
    assert list(figure.choices) == ["layer 0", "layer 1", "layer 2"]
    together = opened(moe)[0].experts[-1]["together"][2]
    shown = figure.choices["layer 2"]["z"][0]
    assert [row[i] for i, row in enumerate(shown)] == [0] * 6
    assert shown[1][4] == pytest.approx(together[1][4], rel=1e-3)


def test_large_grids_are_offered_for_some_layers(tmp_path):
    reading = {"step": 1, "load": [[1 / 64] * 64] * 64, "together": [[[0.1] * 64] * 64] * 64}
    (figure,) = [f for f in figures([RunFolder(tmp_path, experts=(reading,))]) if f.title == "Chosen together"]
    assert 10 < len(figure.choices) < 64
    assert "Every 3 layers." in figure.note


# curves


def test_thinning_keeps_peaks():
    values = [math.sin(i / 50) for i in range(100_000)]
    values[77_777], values[5] = 9.0, -9.0
    xs, ys = thinned(range(100_000), values)
    assert len(xs) <= POINTS
    assert {9.0, -9.0} <= set(ys)
    assert xs == sorted(xs)
    assert thinned([1, 2], [None, 3.0]) == ([1, 2], [None, 3.0])
    assert len(thinned(range(9000), [None] * 9000)[0]) <= POINTS


def test_smoothing_is_a_mean_of_neighbours():
    assert smoothed([1, 2, 6, None, 3], 1) == [1.5, 3, 4, None, 3]


def test_frames_leave_out_spikes_and_the_first_fall():
    calm = [3 - i / 1000 for i in range(1000)]
    assert frame([calm]) is None
    low, high = frame([[11.0, 9.0, 5.0, *calm]])
    assert low < min(calm) and 3 < high < 4
    assert frame([[1.0, 50.0]]) is None  # too few to tell


def test_series_keep_gaps():
    records = [{"step": 1, "a": {"b": 1.0}}, {"step": 2}, {"step": 3, "a": {"b": "nan"}}, {"step": 4, "a": {"b": True}}]
    assert series(records, "a", "b") == ([1, 3, 4], [1.0, None, None])
    assert mean([1.0, None]) is None
    assert mean([]) is None


# old, broken and unfinished runs


@pytest.mark.parametrize("gone", [*LINES, "run.json", "plan.json", "selftests.json", "config.resolved.yaml"])
def test_a_file_that_is_missing_is_no_matter(tmp_path, gone):
    folder = samples.sample(tmp_path / "x", steps=20, experts=3)
    (folder / gone).unlink()
    assert "x" in page(folder).text


def test_only_metrics_with_only_a_loss(tmp_path):
    (tmp_path / "metrics.jsonl").write_text("".join(f'{{"step":{i},"loss":{9 - i}}}\n' for i in range(1, 4)))
    seen = page(tmp_path)
    assert "Training loss" in seen.text
    assert "6.000" in seen.text


def test_a_run_that_has_just_begun(tmp_path):
    samples.write(tmp_path / "run.json", {"name": "new", "steps": 100})
    assert "The run (step 0 of 100): going on, or killed, for no end is written." in page(tmp_path).text


@pytest.mark.parametrize(
    "content", [b"{", b"[]", b'{"step": 3', b"\xff\xfe", b'{"step": "x"}\n', b'{"step": 2}\n{"step": 1}\n']
)
def test_damage_is_named(tmp_path, content):
    folder = samples.sample(tmp_path / "x", steps=10)
    for name in ("plan.json", "events.jsonl"):
        (folder / name).write_bytes(content)
    found = " ".join(verdict(opened(folder), {}).sentences)
    lines = content.count(b"\n")
    assert ("plan.json" in found) == (content != b'{"step": "x"}\n')  # that is an object, if an odd one
    assert ("events.jsonl, line" in found) == (lines > 0)


@pytest.mark.parametrize(
    "value", [None, 3, 10**400, "text", [], {}, [1, [2]], {"a": 1}, [[1, "x"]], {"code": 5}, [{"name": None}]]
)
def test_values_of_other_kinds_break_nothing(tmp_path, value):
    folder = samples.sample(tmp_path / "x", steps=10, experts=3, model=value, versions=value, device=value)
    for name in ("metrics", "times", "evals", "experts", "events"):
        path = folder / f"{name}.jsonl"
        records = [json.loads(line) for line in path.read_text().splitlines()]
        for i, record in enumerate(records):
            records[i] = {k: value if k != "step" and (i + len(k)) % 2 else v for k, v in record.items()}
        path.write_text("".join(json.dumps(r) + "\n" for r in records))
    samples.write(folder / "plan.json", {"sources": value, "notes": value})
    samples.write(folder / "selftests.json", [{"name": value, "passed": value, "detail": value}])
    render(opened(folder), {"ingredients": value, "soup": {"heldout": value}})


def test_runs_of_one_name_are_told_apart(tmp_path):
    for parent in ("a", "b"):
        samples.sample(tmp_path / parent / "run", steps=3)
    assert [r.title for r in opened(tmp_path / "a/run", tmp_path / "b/run")] == [
        str(tmp_path / "a/run"),
        str(tmp_path / "b/run"),
    ]


# the command


def test_the_command(seeds, tmp_path):
    done = CliRunner().invoke(main, ["report", str(seeds), "-o", str(tmp_path / "x.html"), "--json"])
    assert done.exit_code == 0, done.output
    assert json.loads(done.output) == {"report": str(tmp_path / "x.html"), "runs": ["seed-42", "seed-666", "seed-7"]}
    done = CliRunner().invoke(main, ["report", str(seeds / "seed-7")])
    assert done.output == f"{seeds / 'seed-7' / 'report.html'}: seed-7\n"
    assert (seeds / "seed-7" / "report.html").is_file()


@pytest.mark.parametrize(("make", "error", "said"), [
    (lambda p: p / "nothing", FileError, "does not exist"),
    (lambda p: p, UsageError, "holds no run"),
    (lambda p: (p / "file").write_text("") or p / "file", FileError, "is no folder"),
])  # fmt: skip
def test_what_is_no_run_is_refused(tmp_path, make, error, said):
    with pytest.raises(error, match=said):
        write_report([str(make(tmp_path))], tmp_path / "r.html")
    assert not (tmp_path / "r.html").exists()


def test_of_very_many_events_some_are_shown(tmp_path):
    events = tuple({"step": i, "level": "alarm", "text": "again"} for i in range(5000))
    (table,) = [t for t in tables([RunFolder(tmp_path, events=events)], {}) if t.section == "Events"]
    assert len(table.rows) == 200
    assert "200 of 5,000" in table.note


def test_the_best_score_of_each_task_is_marked(seeds):
    runs = opened(seeds)
    (table,) = [t for t in tables(runs, {}) if t.section == "Tasks"]
    for row in table.rows:
        values = [run.evals[-1]["tasks"][row[0].text][row[1].text] for run in runs]
        best = min(values) if row[1].text == "bpb" else max(values)
        assert [cell.kind == "best" for cell in row[3:]] == [v == best for v in values]
