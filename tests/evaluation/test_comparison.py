"""Runs side by side: what differs, what may be compared, how it is drawn; the command as a user meets it."""

import base64
import dataclasses
import itertools
import json
import re
import xml.etree.ElementTree

import numpy as np
import pytest
from browser import CHROMIUM, Browser
from commands import refused, run_command
from micro import micro_config

from kforcing_jax.errors import ConfigError, RunError
from kforcing_jax.evaluation import comparison_curves
from kforcing_jax.evaluation.comparison import (
    as_json,
    differing_settings,
    distinct_names,
    open_runs,
    progress,
    remarks,
    stages_of_some,
    verdicts,
)
from kforcing_jax.evaluation.comparison_curves import Look, stride_panels, training_panels
from kforcing_jax.evaluation.comparison_page import write_comparison
from kforcing_jax.evaluation.comparison_tables import comparison_text
from kforcing_jax.evaluation.history import over, read_history
from kforcing_jax.evaluation.plots import new_figure


def with_interval(key, low, high):
    return {key: (low + high) / 2, f"{key}_interval": [low, high]}


def figures(block=(0.4, 0.5), nll=(1.8, 1.9), teacher="a" * 64):
    """What summary.json holds of a run whose three stages have ended."""
    common = {"steps": 5, "seconds": 9.0, "validation_loss": 1.5, "distinct_2": 0.5, "repetition_4": 0.1}
    common |= {"token_entropy": 1.0, "tokens_per_second": 9.0, "weights": "b" * 64}
    common |= with_interval("sample_nll", *nll) | with_interval("sample_entropy", 1.8, 1.9)
    student = common | with_interval("block_agreement", *block) | {"chance": [0.3, 0.3], "agreement": [0.7, 0.6]}
    confident = common | with_interval("tokens_per_pass", 1.5, 1.7) | {"confidence": 0.3}
    return {
        "device": "1 x cpu",
        "date": "2026-11-30",
        "tau": 1.0,
        "stages": {
            "ar": common | with_interval("tokens_per_pass", 1.0, 1.0) | {"weights": teacher},
            "k1": student | with_interval("tokens_per_pass", 1.0, 1.0) | {"agreement": [0.7], "chance": [0.3]},
            "k2": student | with_interval("tokens_per_pass", 2.0, 2.0) | {"confident": [confident]},
        },
    }


def record(stage, step, **metrics):
    student = {} if stage == "ar" else {"agreement_1": 0.5, "block_agreement": 0.5}
    record = {"stage": stage, "step": step, "loss": 3.0 - step / 10, "seconds": 2.0 * step, "learning_rate": 0.01}
    return json.dumps(record | student | metrics)


HISTORY = [record(stage, step) for stage in ("ar", "k1", "k2") for step in range(1, 6)]


def write_run(path, summary=None, history=HISTORY, config=None, made_from=None):
    path.mkdir(parents=True)
    (path / "config.json").write_text(json.dumps(dataclasses.asdict(config or micro_config())))
    (path / "metrics.jsonl").write_text("".join(f"{line}\n" for line in history))
    if summary:
        (path / "summary.json").write_text(json.dumps(summary))
    if made_from:
        checkpoint = path / "stages/ar/checkpoints/5/progress"
        checkpoint.mkdir(parents=True)
        (checkpoint / "metadata").write_text(json.dumps({"seconds": 9.0, "made_from": made_from}))
    return path


@pytest.fixture
def pair(tmp_path):
    """Two runs that have ended; the second has a wider block interval, higher up, and other samples."""
    return [
        write_run(tmp_path / "a", figures()),
        write_run(tmp_path / "b", figures(block=(0.6, 0.7), nll=(1.85, 2.0)), config=micro_config(k2={"steps": 8})),
    ]


def test_runs_of_one_name_are_told_apart_by_their_parents(tmp_path):
    paths = [tmp_path / name for name in ("x/runs/a", "y/runs/a", "y/b", "y/runs/../runs/c")]
    assert distinct_names(paths) == ["x/runs/a", "y/runs/a", "b", "c"]


def test_only_settings_that_differ_are_shown_by_the_names_of_their_flags(tmp_path):
    a = write_run(tmp_path / "a", config=micro_config(k2={"learning_rate": 0.5}))
    b = write_run(tmp_path / "b", config=micro_config(k2_from_ar={"window": 2, "teacher": "ar"}))
    runs = open_runs([a, b])
    assert differing_settings(runs) == {"stages.k2.learning_rate": [0.5, 0.01]}
    assert stages_of_some(runs) == {"k2-from-ar": ["b"]}


def test_a_field_of_a_stage_that_one_run_lacks_differs_between_the_others(tmp_path):
    extra = [micro_config(k2_from_ar={"window": 2, "teacher": "ar", "steps": steps}) for steps in (7, 9)]
    runs = open_runs([write_run(tmp_path / name, config=c) for name, c in zip("abc", [*extra, None], strict=True)])
    assert differing_settings(runs) == {"stages.k2_from_ar.steps": [7, 9, None]}


def test_a_field_that_was_not_there_yet_has_its_default(pair):
    config = json.loads((pair[0] / "config.json").read_text())
    del config["logging"]["validate_every"], config["model"]["cdf_order"]
    (pair[0] / "config.json").write_text(json.dumps(config))
    assert set(differing_settings(open_runs(pair))) == {"stages.k2.steps"}


def test_intervals_are_held_against_those_of_the_first_run(pair):
    assert verdicts(open_runs(pair), "k2") == {
        "b": {"block_agreement": "above", "sample_nll": "overlaps", "sample_entropy": "overlaps"}
    }
    assert verdicts(open_runs(pair[::-1]), "k2")["a"]["block_agreement"] == "below"


def test_what_different_teachers_say_is_not_compared_and_a_warning_comes_first(tmp_path, pair):
    other = write_run(tmp_path / "other", figures(block=(0.6, 0.7), nll=(1.0, 1.1), teacher="c" * 64))
    runs = open_runs([pair[0], other])
    assert verdicts(runs, "k2") == {"other": {"block_agreement": "above"}}
    first = remarks(runs)[0]
    assert first.is_warning and "AR teachers differ (a: aaaaaaaa; other: cccccccc)" in first.text
    assert "NLL and entropy" in first.text and "not comparable" in first.text


def test_the_same_teacher_is_said_and_nothing_is_warned_of(pair):
    said = remarks(open_runs(pair))
    assert ["same AR teacher (weights aaaaaaaa)" in remark.text for remark in said] == [True]
    assert not any(remark.is_warning for remark in said)


def test_a_teacher_that_nobody_knows_is_neither_the_same_nor_another(tmp_path, pair):
    unknown = figures(nll=(1.0, 1.1))
    unknown["stages"]["ar"]["weights"] = None
    runs = open_runs([pair[0], write_run(tmp_path / "other", unknown)])
    assert verdicts(runs, "k2") == {"other": {"block_agreement": "overlaps"}}
    assert [r for r in remarks(runs) if r.is_warning] == [] and "not known whether other" in remarks(runs)[0].text


@pytest.mark.parametrize(
    ("changed", "says"),
    [("vocabulary", "The vocabularies differ"), ("data", "The data differs (a: 11111111; b: 22222222)")],
)
def test_other_inputs_are_warned_of(tmp_path, changed, says):
    before = {"vocabulary": "1" * 64, "data": "1" * 64}
    a = write_run(tmp_path / "a", figures(), made_from=before)
    b = write_run(tmp_path / "b", figures(), made_from=before | {changed: "2" * 64})
    runs = open_runs([a, b])
    assert [remark.text.startswith(says) for remark in remarks(runs) if remark.is_warning] == [True]
    assert (verdicts(runs, "k2") == {}) == (changed == "vocabulary")


def test_other_kinds_of_loss_are_warned_of(tmp_path, pair):
    other = write_run(tmp_path / "other", figures(), config=micro_config(k2={"loss": "builtins:abs"}))
    said = [remark.text for remark in remarks(open_runs([pair[0], other])) if remark.is_warning]
    assert len(said) == 1 and "(stages.k2.loss differ)" in said[0]


def test_other_ways_of_measuring_are_warned_of(tmp_path, pair):
    config = micro_config()
    config = dataclasses.replace(config, evaluation=dataclasses.replace(config.evaluation, samples=7))
    other = write_run(tmp_path / "other", figures() | {"tau": 0.5, "device": "8 x tpu"}, config=config)
    said = "\n".join(remark.text for remark in remarks(open_runs([pair[0], other])) if remark.is_warning)
    assert (
        "a at tau = 1; other at tau = 0.5" in said
        and "evaluation.samples differ" in said
        and "different devices" in said
    )


def test_a_run_that_trains_is_shown_as_far_as_it_goes(tmp_path, pair):
    early = write_run(tmp_path / "early", history=[*HISTORY[:7], '{"stage": "k1", "st'])
    runs = open_runs([*pair, early])
    assert progress(runs[2]) == {"ar": "5", "k1": "2 of 5", "k2": "-"}
    assert "early has not ended: ar at step 5; k1 at step 2 of 5; k2 not begun." in [r.text for r in remarks(runs)]
    drawn = training_panels(runs)
    assert {stage: names for stage, (names, _) in drawn.items()} == {
        "ar": ["a", "b", "early"],
        "k1": ["a", "b", "early"],
        "k2": ["a", "b"],
    }


def test_runs_that_have_only_begun_make_a_page(tmp_path):
    runs = open_runs([write_run(tmp_path / name, history=[]) for name in "ab"])
    assert "No stage of any run has ended yet" in write_comparison(runs, tmp_path / "page.html").read_text()
    assert "No settings differ." in comparison_text(runs)


def test_records_of_one_step_are_one_and_those_after_a_resume_replace_what_was_later(tmp_path):
    lines = [record("ar", 2), record("ar", 4), record("ar", 6), record("ar", 4, loss=9.0)]
    lines += ['{"stage": "ar", "step": 4, "validation_loss": 1.25}', "[]", '{"stage": "ar"}', "\x00", record("k1", 1)]
    (tmp_path / "metrics.jsonl").write_text("\n".join(lines))
    history = read_history(tmp_path / "metrics.jsonl")
    assert [r["step"] for r in history["ar"]] == [2, 4] and list(history) == ["ar", "k1"]
    assert (history["ar"][1]["loss"], history["ar"][1]["validation_loss"]) == (9.0, 1.25)


def test_points_are_those_that_have_both_numbers_and_long_histories_are_averaged():
    records = [{"step": step, "loss": float(step)} for step in range(1000)]
    points = over([*records, {"step": 1000, "loss": None}, {"step": 1001}], "step", "loss")
    assert points[0] == (1.5, 1.5) and points[-1] == (997.5, 997.5) and len(points) == 250


def test_every_measure_is_drawn_over_steps_and_over_time(tmp_path):
    validation = {"validation_loss": 2.0, "validation_agreement_1": 0.5, "validation_block_agreement": 0.4}
    lines = [record(stage, step, **(validation if stage == "k2" else {})) for stage in ("ar", "k2") for step in (5, 10)]
    runs = open_runs([write_run(tmp_path / name, history=lines) for name in "ab"])
    titles = {
        stage: re.findall(r'alt="([^"]*)"', "".join(panels)) for stage, (_, panels) in training_panels(runs).items()
    }
    assert titles["ar"] == [
        "ar: training loss: nats per token, over steps",
        "ar: training loss: nats per token, over seconds of this stage",
    ]
    assert len(titles["k2"]) == 8
    assert sum("validation" in title for title in titles["k2"]) == 4


def test_strides_are_drawn_of_the_runs_that_have_measured_them(tmp_path, pair):
    names, panels = stride_panels(open_runs([*pair, write_run(tmp_path / "early")]))
    assert names == ["a", "b"] and len(panels) == 2
    assert stride_panels(open_runs([tmp_path / "early", write_run(tmp_path / "late")])) == ([], [])


def test_every_point_of_a_run_is_drawn_with_its_interval(pair):
    with new_figure(4, 2) as figure:
        axes = figure.subplots()
        comparison_curves._draw_strides(axes, open_runs(pair)[1], "sample_nll", Look.of(0))
    whole, confident = axes.containers
    np.testing.assert_allclose(whole.lines[0].get_xydata(), [[1, 1.925], [1, 1.925], [2, 1.925]])
    np.testing.assert_allclose(confident.lines[0].get_xydata(), [[1.6, 1.925]])
    np.testing.assert_allclose(confident.lines[2][1].get_segments()[0][:, 1], [1.85, 2.0])


def test_the_unit_of_time_suits_the_longest_run():
    labels = []
    for longest in (100, 300, 30_000, 1_000_000):
        with new_figure(4, 2) as figure:
            axes = figure.subplots()
            axes.set_xlim(0, longest)
            labels.append(comparison_curves._scale_time(axes, longest).split()[0])
            assert 3 <= len(axes.get_xticks()) <= 7
    assert labels == ["seconds", "minutes", "hours", "days"]


def test_what_a_stage_begins_with_does_not_set_the_scale_of_its_loss():
    low, high = comparison_curves._without_beginning({0: [(1, 50.0), (50, 2.0), (100, 1.0)]})
    assert 0.9 < low < 1 and 2 < high < 2.1


def test_runs_are_told_apart_without_colour():
    looks = [Look.of(index) for index in range(35)]
    assert len({(look.dashes, look.marker) for look in looks}) == 35
    assert all(a.colour != b.colour for a, b in itertools.pairwise(looks))


def test_the_tables_mark_what_lies_apart_and_fit_a_terminal(pair):
    text = comparison_text(open_runs(pair))
    assert re.search(r"b +5 +\.70 \.60 +0.650 \[0.600, 0.700\] ▲ +1.93 \[1.85, 2.00\] ≈", text)
    assert re.search(r"stages.k2.steps +5 +8\n", text) and "b: k2 c=0.3" in text
    longest = max((line for line in text.splitlines() if str(pair[0].parent) not in line), key=len)
    assert len(longest) <= 120, longest


def test_settings_of_many_runs_are_listed_by_value(tmp_path):
    steps = [5, 8, 5, 8]
    paths = [tmp_path / f"a-run-with-a-name-of-some-length-{index}" for index in range(4)]
    runs = [write_run(p, config=micro_config(k2={"steps": n})) for p, n in zip(paths, steps, strict=True)]
    text = comparison_text(open_runs(runs))
    assert f"stages.k2.steps\n  5: {paths[0].name}, {paths[2].name}\n  8: {paths[1].name}, {paths[3].name}" in text


def test_the_object_holds_what_the_tables_show(pair):
    found = json.loads(json.dumps(as_json(open_runs(pair))))
    assert [run["name"] for run in found["runs"]] == ["a", "b"]
    assert found["settings"] == {"stages.k2.steps": {"a": 5, "b": 8}}
    assert found["beside_first"]["k2"]["b"]["block_agreement"] == "above"
    assert found["figures"]["k2"]["b"]["sample_nll_interval"] == [1.85, 2.0]


def test_what_comes_from_runs_is_escaped_and_the_page_needs_nothing_else(tmp_path):
    name = 'a<script>&"$x'
    summary = figures() | {"device": "<b>"}
    config = micro_config()
    config = dataclasses.replace(config, data=dataclasses.replace(config.data, path="<i>"))
    runs = open_runs([write_run(tmp_path / name, summary), write_run(tmp_path / "b", figures(), config=config)])
    page = write_comparison(runs, tmp_path / "page.html").read_text()
    assert not re.search(r"<script|<b>&|<i>|<link|@import|src=['\"](?!data:)", page)
    assert "a&lt;script&gt;&amp;&quot;$x" in page and "&lt;i&gt;" in page
    images = re.findall(r'src="data:image/svg\+xml;base64,([^"]+)"', page)
    assert len(images) > 10
    for image in images:
        xml.etree.ElementTree.fromstring(base64.b64decode(image))


@pytest.mark.parametrize(
    ("spoil", "says"),
    [
        (lambda a, b: [a], ["two run directories or more", "only"]),
        (lambda a, b: [], ["two run directories or more", "none"]),
        (lambda a, b: [a, b, a / "../a"], ["../a is the same run directory as", "give each run once"]),
        (lambda a, b: [a, a.parent], ["is not a run directory (no config.json)"]),
        (lambda a, b: [a, "gs://bucket/run"], ["gs://bucket/run is a URL"]),
    ],
)
def test_what_is_no_comparison_is_refused(pair, spoil, says):
    with pytest.raises((ConfigError, RunError)) as error:
        open_runs(spoil(*pair))
    for words in says:
        assert words in str(error.value)


@pytest.mark.parametrize(
    ("file", "content", "says"),
    [
        ("config.json", "{", "config.json is damaged"),
        ("config.json", '{"stages": {}}', "config.json: stages is empty"),
        ("summary.json", "{", "summary.json is damaged"),
        ("summary.json", '{"stages": {"ar": 3}}', "summary.json is damaged (its stages are no objects)"),
        ("summary.json", "[]", "summary.json is damaged (it has no stages)"),
    ],
)
def test_a_damaged_file_is_named(pair, file, content, says):
    (pair[1] / file).write_text(content)
    with pytest.raises(RunError) as error:
        open_runs(pair)
    assert f"{pair[1]}/{says}" in str(error.value)


def test_the_command_takes_directories_between_flags_and_writes_a_page(pair, tmp_path):
    done = run_command("compare", pair[0], "--json", pair[1], cwd=tmp_path)
    assert (done.status, done.err) == (0, "")
    assert json.loads(done.out)["settings"] and (tmp_path / "comparison.html").exists()
    begun = [write_run(tmp_path / name, history=[]) for name in ("c", "d")]
    done = run_command("compare", *begun, f"--output={tmp_path / 'other.html'}", cwd=tmp_path)
    assert done.out.endswith(f"Page: {tmp_path / 'other.html'}\n")
    assert "not begun" in (tmp_path / "other.html").read_text()


@pytest.mark.parametrize(
    ("output", "says"),
    [
        ("nowhere/page.html", "there is no folder nowhere"),
        ("config.json", "should be the name of a page"),
        (".", "should be the name of a page"),
    ],
)
def test_a_page_that_cannot_be_is_refused_before_runs_are_read(tmp_path, output, says):
    refused(run_command("compare", "a", "b", f"--output={output}", cwd=tmp_path), f"--output={output}", says)


def test_the_commands_refusals_are_one_line(pair, tmp_path):
    refused(run_command("compare", pair[0], cwd=tmp_path), "two run directories or more")
    refused(run_command("compare", *pair, "--workdir=x", cwd=tmp_path), "unknown flag --workdir")
    refused(run_command("compare", pair[0], tmp_path / "none", cwd=tmp_path), "none is not a run directory")
    assert not (tmp_path / "comparison.html").exists()


@pytest.mark.skipif(CHROMIUM is None, reason="no chromium, chromium-browser or google-chrome here")
def test_the_page_fits_its_window_and_follows_the_readers_scheme(pair, tmp_path):
    write_comparison(open_runs(pair), tmp_path / "page.html")
    browser = Browser(tmp_path / "chromium")
    grounds = {}
    try:
        for width, scheme in itertools.product((400, 1300), ("light", "dark")):
            browser.send(
                "Emulation.setDeviceMetricsOverride", width=width, height=900, deviceScaleFactor=1, mobile=False
            )
            browser.send("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": scheme}])
            browser.open((tmp_path / "page.html").as_uri())
            assert browser.run("document.documentElement.scrollWidth <= innerWidth")
            assert browser.run("[...document.images].every(image => image.complete && image.naturalWidth > 0)")
            grounds[scheme] = browser.run("getComputedStyle(document.body).backgroundColor")
    finally:
        browser.close()
    assert grounds == {"light": "rgb(255, 255, 255)", "dark": "rgb(20, 20, 22)"}
