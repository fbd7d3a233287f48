"""The table, the aligned samples and the self-contained page."""

import json
import re

import pytest

from kforcing_jax.evaluation.report import write_report
from kforcing_jax.evaluation.tables import samples_text, table

AR = {"steps": 5, "seconds": 61.8, "validation_loss": 1.7, "sample_nll": 1.83, "sample_entropy": 1.85}
AR |= {"token_entropy": 2.7, "distinct_2": 0.17, "repetition_4": 0.01, "tokens_per_second": 10_000.0}
K4 = AR | {"agreement": [0.66, 0.54, 0.45, 0.36], "chance": [0.34, 0.33, 0.32, 0.3], "block_agreement": 0.1}
K4 |= {"tokens_per_second": 16_000.0}
JOINT = {
    "joint_tv": 0.081,
    "joint_tv_null": 0.068,
    "joint_g_test": {"p_value": 0.0},
    "joint_g_test_null": {"p_value": 0.4},
}
SAMPLE = {"prompt": "<b>&", "seed": 7, "continuations": {"ar": "one\ntwo", "k1": "one two", "k4": "\x1b[31mx"}}
SUMMARY = {
    "stages": {"k4-from-ar": K4, "k4": K4, "k10": {"steps": 3}, "ar": AR},
    "samples": [SAMPLE],
    "device": "1 x cpu",
    "date": "2026-11-23",
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


def test_the_table_lists_stages_by_window_with_the_teacher_first():
    names = [line.split()[0] for line in table(SUMMARY).splitlines() if re.match(r"ar|k\d", line)]
    assert names == ["ar", "k4", "k4-from-ar", "k10"]


def test_the_table_shows_every_offset_next_to_chance_and_the_speed_up():
    row = next(line for line in table(SUMMARY).splitlines() if line.startswith("k4 "))
    assert ".66 .54 .45 .36" in row and ".34 .33 .32 .30" in row and "1.60x" in row


def test_what_is_not_measured_yet_is_a_dash():
    row = next(line for line in table(SUMMARY).splitlines() if line.startswith("k10"))
    assert set(row.split()[1:]) == {"-"}
    assert "ar" not in table({"stages": {}}).split()


def test_joint_columns_appear_only_when_there_is_a_joint():
    assert "AR null" not in table(SUMMARY)
    with_joint = table({"stages": {"ar": AR, "k4": K4 | JOINT}})
    assert "AR null" in with_joint and "0.081" in with_joint and "0.068" in with_joint


def test_the_table_fits_120_columns():
    wide = {"stages": {"ar": AR, "k4-from-ar": K4 | JOINT}}
    assert max(map(len, table(wide).splitlines())) <= 120


def test_samples_are_aligned_character_under_character():
    lines = [line for line in samples_text(SUMMARY).splitlines() if line.startswith(("ar", "k"))]
    assert [line.split()[0] for line in lines] == ["ar", "k1", "k4"]
    assert lines[0].index("one⏎two") == lines[1].index("one two")
    assert "\x1b" not in samples_text(SUMMARY)


def test_the_page_needs_nothing_but_itself(workdir):
    page = write_report(workdir).read_text()
    assert not re.search(r"<script|<link|<img|@import|url\(\s*['\"]?http|(src|href)=['\"](?!#)", page)
    assert page.count("<svg") >= 5


def test_everything_that_comes_from_the_run_is_escaped(workdir):
    page = write_report(workdir).read_text()
    assert "&lt;script&gt;" in page and "&lt;b&gt;&amp;" in page and "<b>&" not in page


def test_ids_are_unique_across_the_plots(workdir):
    ids = re.findall(r'\bid="([^"]+)"', write_report(workdir).read_text())
    assert len(ids) == len(set(ids)) > 0


def test_a_page_without_any_result_is_still_a_page(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    assert "No stage has ended yet" in write_report(tmp_path).read_text()


def test_a_report_is_written_whole_or_not_at_all(workdir, monkeypatch):
    write_report(workdir)
    before = (workdir / "report.html").read_text()
    monkeypatch.setattr("kforcing_jax.evaluation.report._config_section", lambda config: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        write_report(workdir)
    assert (workdir / "report.html").read_text() == before
