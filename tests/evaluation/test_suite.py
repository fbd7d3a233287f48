"""The evaluation of a micro run: on one device and on a mesh, at one temperature, from word starts."""

import dataclasses
import logging

import numpy as np
import pytest
from micro import micro_config, micro_config_dict

from kforcing_jax.config import DataConfig, MeshConfig, parse
from kforcing_jax.data.tokenizers import train_tokenizer
from kforcing_jax.decoding import Generation
from kforcing_jax.errors import ConfigError
from kforcing_jax.evaluation import suite
from kforcing_jax.evaluation.samples import first_word, measure
from kforcing_jax.evaluation.suite import evaluate
from kforcing_jax.evaluation.tables import table
from kforcing_jax.evaluation.text_metrics import token_entropy
from kforcing_jax.sharding import make_mesh
from kforcing_jax.training import curriculum
from kforcing_jax.workdir import Workdir


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run, said to have trained k1 with other temperatures than k2."""
    workdir = Workdir.claim(tmp_path_factory.mktemp("run"), micro_config())
    corpus = workdir.corpus()
    curriculum.run(workdir, corpus, make_mesh(workdir.config.mesh))
    return Workdir(workdir.path, micro_config(k1=dict(tau_min=0.2, tau_max=3.0))), corpus


@pytest.fixture(scope="module")
def evaluated(trained):
    """(summary, prompts and settings of every decoding) on one device."""
    workdir, corpus = trained
    calls = []

    def recorded(*args, **settings):
        calls.append(settings | {"prompts": args[2]})
        return real(*args, **settings)

    with pytest.MonkeyPatch.context() as patch:
        real = suite.generate
        patch.setattr(suite, "generate", recorded)
        summary = evaluate(workdir, corpus, make_mesh(workdir.config.mesh), command="python -m it --config=x")
    return summary, calls


def test_a_mesh_gives_the_figures_of_one_device(trained, evaluated, monkeypatch):
    workdir, corpus = trained
    monkeypatch.setattr(suite, "finished_stages", lambda workdir: ["ar", "k2"])
    on_mesh = evaluate(workdir, corpus, make_mesh(MeshConfig(data=2, fsdp=2, tensor=2)))
    assert on_mesh["device"].startswith("8 x") and on_mesh["command"] == evaluated[0]["command"]
    for sample, expected in zip(on_mesh["samples"], evaluated[0]["samples"], strict=True):
        assert sample["continuations"].items() <= expected["continuations"].items()
    timed = {"speed", "tokens_per_second"}
    for name in ("ar", "k2"):
        figures, expected = on_mesh["stages"][name], evaluated[0]["stages"][name]
        assert figures.keys() == expected.keys() and timed <= figures.keys()
        for key in expected.keys() - timed - {"weights", "confident", "joint_g_test", "joint_g_test_null"}:
            np.testing.assert_allclose(figures[key], expected[key], rtol=1e-4, err_msg=f"{name} {key}")
        for row, expected_row in zip(figures.get("confident", []), expected.get("confident", []), strict=True):
            assert row == {key: pytest.approx(value, rel=1e-4) for key, value in expected_row.items()}


def test_all_stages_are_sampled_at_one_temperature(evaluated):
    summary, calls = evaluated
    assert {settings["tau"] for settings in calls} == {1.0} == {summary["tau"]}
    assert "tau = 1\n" in table(summary)


def test_the_largest_student_continues_the_same_prompts_under_the_same_noise_at_every_confidence(evaluated):
    _, calls = evaluated
    assert [(call["k"], call["confidence"]) for call in calls] == [(1, 0), (1, 0), (2, 0), (2, 0.5), (2, 1)]
    for call in calls:
        np.testing.assert_array_equal(call["prompts"], calls[0]["prompts"])
        np.testing.assert_array_equal(call["seeds"], calls[0]["seeds"])


def test_more_confidence_takes_more_passes_and_none_is_the_stages_own_sample(evaluated):
    stages = evaluated[0]["stages"]
    rows = stages["k2"]["confident"]
    assert [row.pop("confidence") for row in rows] == [0, 0.5, 1]
    assert rows[0] == {key: stages["k2"][key] for key in rows[0]}
    per_pass = [row["tokens_per_pass"] for row in rows]
    assert per_pass[0] == 2 and per_pass == sorted(per_pass, reverse=True) and per_pass[-1] < 1.5
    assert "confident" not in stages["k1"]


def test_every_figure_that_a_stride_is_chosen_by_has_an_interval_around_it(evaluated):
    stages = evaluated[0]["stages"]
    for row in (*stages.values(), *stages["k2"]["confident"]):
        for key in ("tokens_per_pass", "sample_nll", "sample_entropy"):
            low, high = row[f"{key}_interval"]
            assert low <= row[key] <= high and (low < high or key == "tokens_per_pass")


def test_the_ar_teacher_is_sampled_from_the_nucleus_that_students_were_taught():
    fields = {"top_p": 0.6}
    run = suite._Run(Workdir("nowhere", micro_config(k1=fields, k2=fields)), None, {}, None, None)
    assert [run.top_p(name) for name in ("ar", "k1", "k2")] == [0.6, 1, 1]
    assert suite._Run(Workdir("nowhere", micro_config()), None, {}, None, None).top_p("ar") == 1


@pytest.mark.parametrize(
    ("finished", "largest"),
    [(("ar", "k4-from-ar", "k4", "k2", "k1"), "k4"), (("ar", "k1", "k4-from-ar"), "k4-from-ar"), (("ar", "k1"), None)],
)
def test_the_largest_student_is_the_chains_own_and_has_a_stride_to_vary(finished, largest):
    config = micro_config(k4=dict(window=4), k4_from_ar=dict(window=4, teacher="ar"))
    run = suite._Run(Workdir("nowhere", config), None, dict.fromkeys(finished), None, None)
    assert run.largest == largest


@pytest.mark.parametrize(
    ("stage", "given", "tau"),
    [((0.2, 3.0), 0.0, 1.0), ((0.2, 0.5), 0.0, 0.5), ((2.0, 3.0), 0.0, 2.0), ((0.2, 3), 2, 2)],
)
def test_the_temperature_is_1_or_the_nearest_that_students_know_or_as_given(stage, given, tau):
    fields = dict(zip(("tau_min", "tau_max"), map(float, stage), strict=True))
    raw = micro_config_dict(k1=fields, k2=fields)
    raw.evaluation.tau = float(given)
    assert parse(raw).evaluation_tau == tau


def test_a_temperature_that_a_stage_does_not_know_is_refused():
    raw = micro_config_dict(k1=dict(tau_min=0.5))
    raw.evaluation.tau = 0.7
    with pytest.raises(ConfigError, match=r"evaluation\.tau = 0\.7 is not one that stages\.k2 .* = 1, 1;"):
        parse(raw)


def test_the_summary_says_where_its_figures_come_from(trained, evaluated):
    workdir, _ = trained
    summary, _ = evaluated
    assert summary["command"] == "python -m it --config=x" and summary["seed"] == 0 and summary["revision"]
    assert "markov" in summary["data"] and summary["evaluation_seconds"] > 0
    assert all(stage["parameters"] > 100 for stage in summary["stages"].values())
    page = (workdir.path / "report.html").read_text()
    for fact in ("arXiv 2606.10820", "python -m it --config=x", summary["revision"], "tau = 1"):
        assert fact in page


def test_every_student_is_timed_against_the_teacher_in_turns(evaluated):
    stages = evaluated[0]["stages"]
    assert "vs_ar" not in stages["ar"]["speed"]["4"]
    for name, passes in (("k1", 1), ("k2", 2)):
        ratio = stages[name]["speed"]["4"]["vs_ar"]
        assert 0 < ratio["low"] <= ratio["median"] <= ratio["high"]
        assert stages[name]["tokens_per_pass"] == passes


def test_several_different_prompts_are_shown(evaluated):
    prompts = [sample["prompt"] for sample in evaluated[0]["samples"]]
    assert len(prompts) == len(set(prompts)) == 3
    assert all(sample["continuations"].keys() == {"ar", "k1", "k2"} for sample in evaluated[0]["samples"])


@pytest.mark.parametrize("kind", ["characters", "bpe"])
def test_prompts_begin_with_a_word(kind):
    text = "another day in town\n"
    tokenizer = train_tokenizer(DataConfig(tokenizer=kind, vocab_size=300), [text * 5])
    tokens = np.array(tokenizer.encode(text)[1:] if kind == "characters" else tokenizer.encode("n" + text))
    first = first_word(tokenizer, tokens, 0, len(tokens) - 1)
    assert tokenizer.decode(tokens[first:]).lstrip().startswith("day")
    assert first_word(tokenizer, tokens, 0, 1) == 0, "where no word begins, where the text does"
    eos = np.array([tokens[0], tokenizer.eos_id, *tokens])
    assert first_word(tokenizer, eos, 0, len(tokens)) == 2


def test_token_entropy_is_that_of_the_text_without_its_eos(causal_lm):
    tokens = np.array([[1, 2, 5, 5, 3, 3], [1, 2, 5, 6, 7, 7]])
    generation = Generation(tokens, np.array([5, 6]), student_passes=np.array([3, 3]), teacher_passes=np.array([0, 1]))
    figures = measure(*causal_lm, generation, 2, 3)
    assert figures["token_entropy"] == token_entropy([[5, 5], [5, 6, 7, 7]])
    assert figures["tokens_per_pass"] == 1


def test_an_evaluation_that_cannot_be_kept_is_still_given(trained, monkeypatch, caplog):
    workdir, corpus = trained
    monkeypatch.setattr(suite, "write_report", lambda path: (_ for _ in ()).throw(OSError("full")))
    with caplog.at_level(logging.WARNING, "kforcing_jax"):
        stage = evaluate(_without_confidences(workdir), corpus, make_mesh(workdir.config.mesh))["stages"]["k2"]
    assert stage["agreement"] and "not kept: full" in caplog.text


def test_without_confidences_there_are_no_figures_of_strides_nor_older_ones(trained, evaluated):
    workdir, corpus = trained
    assert "Which stride to take" in (workdir.path / "report.html").read_text()
    summary = evaluate(_without_confidences(workdir), corpus, make_mesh(workdir.config.mesh))
    assert "confident" not in summary["stages"]["k2"] and "c=0.5" not in table(summary)
    assert "Which stride to take" not in (workdir.path / "report.html").read_text()


def _without_confidences(workdir):
    settings = dataclasses.replace(workdir.config.evaluation, speed_rounds=1, confidences=())
    return Workdir(workdir.path, dataclasses.replace(workdir.config, evaluation=settings))
