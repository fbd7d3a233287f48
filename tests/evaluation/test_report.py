"""The tables, the aligned samples and the self-contained page."""

import base64
import html
import json
import re
import xml.etree.ElementTree

import numpy as np
import pytest

from kforcing_jax.errors import RunError
from kforcing_jax.evaluation import trade_off
from kforcing_jax.evaluation.aligned import sample_blocks, samples_text
from kforcing_jax.evaluation.report import write_report
from kforcing_jax.evaluation.tables import WHY_LITTLE_GAIN, ratio_text, stages_of, table
from kforcing_jax.evaluation.trade_off import write_trade_off

AR = {"steps": 5, "seconds": 61.8, "validation_loss": 1.7, "sample_nll": 1.83, "sample_entropy": 1.85}
AR |= {"token_entropy": 2.7, "distinct_2": 0.17, "repetition_4": 0.01, "tokens_per_second": 10_000.0}
AR |= {"parameters": 1234, "tokens_per_pass": 1.0}
K4 = AR | {"agreement": [0.66, 0.54, 0.45, 0.36], "chance": [0.34, 0.33, 0.32, 0.3], "block_agreement": 0.1}
K4 |= {"tokens_per_second": 16_000.0, "tokens_per_pass": 3.9, "validation_loss": 0.9}
CLEAR, UNCLEAR = {"median": 1.44, "low": 1.38, "high": 1.5}, {"median": 1.05, "low": 0.9, "high": 1.2}
AR |= {"speed": {batch: {"tokens_per_second": 1.0} for batch in ("1", "8", "64")}}
K4 |= {"speed": {batch: {"vs_ar": r} for batch, r in (("1", CLEAR), ("8", UNCLEAR), ("64", CLEAR))}}
JOINT = {
    "joint_tv": 0.081,
    "joint_tv_null": 0.068,
    "joint_g_test": {"p_value": 0.0},
    "joint_g_test_null": {"p_value": 0.4},
}
SAMPLE = {
    "prompt": "<b>&",
    "seed": 7,
    "continuations": {"ar": "one\ntwo", "k1": "one two", "k2": "", "k4": "\x1b[31mx"},
}
SUMMARY = {
    "stages": {"k4-from-ar": K4, "k4": K4, "k10": {"steps": 3}, "ar": AR},
    "samples": [SAMPLE, SAMPLE | {"prompt": "other"}],
    "device": "1 x cpu",
    "date": "2026-11-23",
    "tau": 0.5,
    "evaluation_seconds": 20.0,
}


def at(confidence, per_pass, nll):
    figures = {"confidence": confidence, "tokens_per_pass": per_pass, "sample_nll": nll, "sample_entropy": 1.8}
    return figures | {"sample_nll_interval": [nll - 0.125, nll + 0.25], "tokens_per_pass_interval": None}


STRIDES = SUMMARY | {
    "stages": {"ar": AR, "k4": K4 | {"confident": [at(0.0, 3.9, 1.83), at(0.2, 3.2, 1.75), at(0.5, 2.25, 1.5)]}}
}


def record(stage, step, **metrics):
    return json.dumps({"stage": stage, "step": step, "loss": 2.0, "tokens_per_second": 1.0, "seconds": step} | metrics)


@pytest.fixture
def workdir(tmp_path):
    lines = [record("ar", 25), record("ar", 50), record("ar", 75), record("ar", 50, loss=1.5)]
    lines += [
        record("k4", s, **{f"{m}_{j}": 0.1 * j for m in ("loss", "agreement") for j in range(1, 5)}) for s in (1, 2)
    ]
    (tmp_path / "metrics.jsonl").write_text("\n".join(lines) + '\n{"stage": "k4", "st')
    (tmp_path / "summary.json").write_text(json.dumps(SUMMARY))
    (tmp_path / "config.json").write_text(json.dumps({"data": {"path": "<script>"}}))
    return tmp_path


def row(stage, which=0):
    return [line for line in table(SUMMARY).splitlines() if re.match(rf"{stage}\s", line)][which]


def test_the_tables_list_stages_by_window_with_the_teacher_first():
    names = [line.split()[0] for line in table(SUMMARY).splitlines() if re.match(r"(ar|k\d\S*)\s", line)]
    assert names == ["ar", "k4", "k4-from-ar", "k10"] * 2


def test_the_table_shows_every_offset_next_to_chance():
    assert ".66 .54 .45 .36" in row("k4") and ".34 .33 .32 .30" in row("k4")


def test_speeds_are_ratios_with_their_spread_beside_tokens_per_pass():
    speeds = row("k4", which=1)
    assert re.sub(" +", " ", speeds) == ("k4 3.90 16,000 1.44 [1.38, 1.50] 1.05 [0.90, 1.20] unclear 1.44 [1.38, 1.50]")
    header = next(line for line in table(SUMMARY).splitlines() if "tokens/pass" in line)
    assert re.findall(r"vs AR, \d+", header) == ["vs AR, 1", "vs AR, 8", "vs AR, 64"]
    assert WHY_LITTLE_GAIN in table(SUMMARY).replace("\n", " ") and "2k rows" in WHY_LITTLE_GAIN


@pytest.mark.parametrize(("low", "high", "unclear"), [(1.3, 1.55, False), (1.2, 1.8, True), (0.9, 1.7, True)])
def test_a_spread_larger_than_the_effect_is_said(low, high, unclear):
    assert ("unclear" in ratio_text({"median": 1.4, "low": low, "high": high})) == unclear


def test_the_temperature_of_all_samples_is_in_the_table():
    assert "tau = 0.5\n" in table(SUMMARY)
    assert "all sampled at tau = 0.5, top_p = 0.9\n" in table(SUMMARY | {"top_p": 0.9})


def test_a_loss_on_text_and_one_against_a_teacher_are_two_columns(workdir):
    page = write_report(workdir).read_text()
    head = re.findall(r"<th[^>]*>(.*?)</th>", re.search(r"<thead>.*?</thead>", page, re.DOTALL)[0])
    cells = {name: re.search(rf"<th>{name}</th>(.*?)</tr>", page)[1] for name in ("ar", "k4")}
    cells = {name: re.findall(r"<td[^>]*>(.*?)</td>", text) for name, text in cells.items()}
    text, teacher = head.index("loss on text") - 1, head.index("loss vs teacher") - 1
    assert [cells["ar"][text], cells["ar"][teacher]] == ["1.700", "-"]
    assert [cells["k4"][text], cells["k4"][teacher]] == ["-", "0.900"]


def test_what_is_not_measured_yet_is_a_dash():
    assert set(row("k10").split()[1:]) == set(row("k10", which=1).split()[1:]) == {"-"}
    assert "ar" not in table({"stages": {}}).split()
    assert "vs AR" not in table({"stages": {"ar": {"steps": 3}}})


def test_joint_columns_appear_only_when_there_is_a_joint():
    assert "AR null" not in table(SUMMARY)
    with_joint = table({"stages": {"ar": AR, "k4": K4 | JOINT}})
    assert "AR null" in with_joint and "0.081" in with_joint and "0.068" in with_joint


def test_strides_are_listed_by_tokens_per_pass_each_once_with_its_intervals():
    assert "c=0" not in table(SUMMARY)
    lines = [re.sub("  +", "  ", line) for line in table(STRIDES).partition("vs AR")[2].splitlines()]
    start = lines.index("stage  tokens/pass  NLL  entropy")
    assert lines[start + 2 : start + 6] == [
        "ar  1.00  1.83  1.85",
        "k4 c=0.5  2.25  1.50 [1.38, 1.75]  1.80",
        "k4 c=0.2  3.20  1.75 [1.62, 2.00]  1.80",
        "k4  3.90  1.83  1.85",
    ]


def test_the_tables_fit_120_columns():
    wide = {"stages": {"ar": AR, "k4-from-ar": K4 | JOINT | {"confident": [at(0.25, 2.0, 1.5)]}}}
    assert max(map(len, table(wide).splitlines())) <= 120


def test_samples_are_aligned_with_a_caret_under_the_first_difference():
    assert samples_text({"samples": [SAMPLE]}).splitlines() == [
        "Prompt (noise seed 7): <b>&",
        "ar  one⏎two",
        "k1  one two",
        "       ^",
        "k2  (end)",
        "    ^",
        "k4  ·[31mx",
        "    ^",
    ]


def test_long_samples_have_no_empty_rows_and_one_mark():
    texts = {"ar": "a" * 250, "k1": "a" * 120 + "b" * 130, "k2": "a" * 90}
    blocks = list(sample_blocks({"continuations": texts}))
    assert [[label.strip() for label, _, _ in block] for block in blocks] == [
        ["ar", "k1", "k2"],
        ["ar", "k1"],
        ["ar", "k1"],
    ]
    assert all(text for block in blocks for _, text, _ in block)
    carets = [line for line in samples_text({"samples": [{"continuations": texts}]}).splitlines() if "^" in line]
    assert carets == [" " * (4 + 120 - 96) + "^"]


def test_the_page_marks_the_first_difference_and_greys_what_follows(workdir):
    page = write_report(workdir).read_text()
    assert "<b>k1</b>  one<mark> </mark><i>two</i>" in page and "<b>ar</b>  one<s>⏎</s>two" in page
    assert page.count("Prompt (noise seed 7)") == 2


def test_the_page_needs_nothing_but_itself(workdir):
    page = write_report(workdir).read_text()
    assert not re.search(r"<script|<link|@import|url\(\s*['\"]?http|src=['\"](?!data:)", page)
    images = re.findall(r'src="data:image/svg\+xml;base64,([^"]+)"', page)
    assert len(images) == 6
    for image in images:
        xml.etree.ElementTree.fromstring(base64.b64decode(image))


def test_what_was_validated_while_it_trained_is_drawn_where_it_was(workdir):
    assert "Validation while it trained" not in write_report(workdir).read_text()
    figures = dict(validation_loss=1.5, validation_agreement_1=0.5, validation_agreement_2=0.4)
    lines = [record("k2", 10), record("k2", 20, validation_block_agreement=0.3, **figures)]
    (workdir / "metrics.jsonl").write_text("\n".join(lines))
    page = write_report(workdir).read_text()
    assert "Validation while it trained" in page and 'alt="k2: agreement with AR"' in page


def test_every_colour_of_a_plot_has_another_one_on_a_dark_page(workdir):
    (workdir / "summary.json").write_text(json.dumps(STRIDES))
    page = write_report(workdir).read_text()
    for image in re.findall(r'src="data:image/svg\+xml;base64,([^"]+)"', page):
        svg = base64.b64decode(image).decode()
        assert not re.findall(r'style="[^"]*#[0-9a-f]{6}', svg)
        light, dark = (dict(re.findall(r"(--c\w+):(#\w+)", part)) for part in svg.split("@media", 1))
        assert light.keys() == dark.keys() >= set(re.findall(r"var\((--c\w+)\)", svg))
        assert all(light[name] != dark[name] for name in light)


def test_the_page_shows_which_stride_to_take(workdir):
    assert "Which stride to take" not in write_report(workdir).read_text()
    (workdir / "summary.json").write_text(json.dumps(STRIDES))
    section = re.search(r"<h2>Which stride to take</h2>.*?</section>", write_report(workdir).read_text(), re.DOTALL)[0]
    assert "<th>k4 c=0.2</th>" in section
    picture = base64.b64decode(re.search(r'src="data:image/svg\+xml;base64,([^"]+)"', section)[1]).decode()
    drawn = re.findall(r"<text[^>]*>([^<]*)</text>", picture)
    assert {"0.2", "0.5", "k4", "AR, 95 %", "k4, confident at c", "all k tokens"} <= set(drawn)
    assert sum("nats per token" in text for text in drawn) == 2


def test_the_head_says_what_this_is_and_where_it_comes_from(workdir):
    facts = {"command": "python -m kforcing_jax.main --config=<x>", "revision": "abc-dirty", "seed": 0, "data": "news"}
    (workdir / "summary.json").write_text(json.dumps(SUMMARY | facts))
    head = re.search(r"<header>.*</header>", write_report(workdir).read_text(), re.DOTALL)[0]
    known = ["arXiv 2606.10820", *map(str, facts.values()), "1 x cpu", "2026-11-23", "ar 1,234", "tau = 0.5", "3:25"]
    for fact in known:
        assert html.escape(fact) in head


def test_everything_that_comes_from_the_run_is_escaped(workdir):
    page = write_report(workdir).read_text()
    assert "&lt;script&gt;" in page and "&lt;b&gt;&amp;" in page and "<b>&" not in page


def test_a_page_without_any_result_is_still_a_page(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    assert "No stage has ended yet" in write_report(tmp_path).read_text()


def test_the_picture_of_strides_is_a_file_of_its_own_too(workdir, tmp_path):
    with pytest.raises(RunError, match=r"summary\.json has no figures of confident strides"):
        write_trade_off(workdir, tmp_path / "strides.svg")
    (workdir / "summary.json").write_text(json.dumps(STRIDES))
    svg, png = (write_trade_off(workdir, tmp_path / f"strides.{kind}").read_bytes() for kind in ("svg", "png"))
    assert xml.etree.ElementTree.fromstring(svg).tag.endswith("svg") and png.startswith(b"\x89PNG")


def test_the_picture_shows_every_figure_with_its_interval():
    with trade_off._drawn(stages_of(STRIDES)) as figure:
        drawn = {bars.get_label(): bars.lines for bars in figure.axes[0].containers}
    line, _, (_, nll) = drawn["k4, confident at c"]
    np.testing.assert_array_equal(line.get_xydata(), [[3.9, 1.83], [3.2, 1.75], [2.25, 1.5]])
    np.testing.assert_allclose([ends[:, 1] for ends in nll.get_segments()], [[1.705, 2.08], [1.625, 2], [1.375, 1.75]])
    np.testing.assert_array_equal(drawn["all k tokens"][0].get_xydata(), [[3.9, 1.83]])


def test_a_report_is_written_whole_or_not_at_all(workdir, monkeypatch):
    write_report(workdir)
    before = (workdir / "report.html").read_text()
    monkeypatch.setattr("kforcing_jax.evaluation.report._config_section", lambda config: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        write_report(workdir)
    assert (workdir / "report.html").read_text() == before
