"""What the site, the workflows and the citation say of the repository is so. The strict build itself is in .ci/run."""

import ast
import dataclasses
import html
import importlib
import re
import subprocess
import tomllib

import config_page
import hooks
import pytest
import yaml
from commands import REPOSITORY

import kforcing_jax
from kforcing_jax import config

URL = "https://example.org/kforcing_jax/"
SITE = yaml.safe_load((REPOSITORY / "mkdocs.yml").read_text(encoding="utf-8"))
PROJECT = tomllib.loads((REPOSITORY / "pyproject.toml").read_text(encoding="utf-8"))["project"]
WORKFLOWS = sorted((REPOSITORY / ".github/workflows").glob("*.yml"))
API_PAGES = sorted((REPOSITORY / "docs/api").glob("*.md"))


@pytest.fixture(scope="module")
def fields_page():
    """The page of configuration fields, without what Markdown needs."""
    return html.unescape(config_page.page().replace("\\", ""))


def test_every_field_is_on_the_page_with_its_default(fields_page):
    groups = {"": config.Config} | config_page.groups_of(config.Config) | {"stages.X": config.StageConfig}
    count = 0
    for group, cls in groups.items():
        for field in dataclasses.fields(cls):
            if isinstance(field.default, int | float):
                anchor = f'id="{group}.{field.name}"'.replace('".', '"')
                assert re.search(f"{re.escape(anchor)}.*{re.escape(f'`{field.default!r}`')}", fields_page), field.name
                count += 1
    assert count > 50


def test_every_comment_of_a_field_is_on_the_page(fields_page):
    source = (REPOSITORY / "kforcing_jax/config.py").read_text(encoding="utf-8")
    said = re.findall(r"^    (\w+): [^#\n]+ = [^#\n]+  # (.+)$", source, re.MULTILINE)
    assert len(said) > 40
    for name, comment in said:
        assert re.search(rf"`{name}`.*{re.escape(comment)}", fields_page), name


@dataclasses.dataclass
class _Commented:
    alone: int = 0
    # It is long,
    # so it stands above.
    above: int = 1
    several: tuple[int, ...] = (
        1,  # the first
        2,
    )
    text: str = "# this is no comment"  # this is


def test_comments_above_and_beside_a_field_belong_to_it():
    assert config_page.comments_of(_Commented) == {
        "alone": "",
        "above": "It is long, so it stands above.",
        "several": "the first",
        "text": "this is",
    }


@pytest.mark.parametrize(
    ("path", "kind", "rule"),
    [
        ("model.d_model", int, "at least 1"),
        ("stages.k2.beta1", float, "in [0, 1)"),
        ("stages.k2.learning_rate", float, "positive and finite"),
        ("model.cdf_order", str, "one of vocabulary, shuffled"),
        ("evaluation.confidences", tuple[float, ...], "in [0, 1]"),
        ("data.path", str, ""),
    ],
)
def test_a_rule_is_what_the_configuration_answers_to_a_wrong_value(path, kind, rule):
    assert config_page.rule_of(path, kind) == rule


@pytest.mark.parametrize(
    ("target", "file", "page", "there"),
    [
        ("data.md#tokenizers", "docs/reproduce.md", "reproduce.md", "data.md#tokenizers"),
        ("../configs/tiny.py", "docs/method.md", "method.md", f"{URL}blob/main/configs/tiny.py"),
        ("docs/hooks.py", "README.md", "index.md", f"{URL}blob/main/docs/hooks.py"),
        ("../launch", "docs/cloud.md", "cloud.md", f"{URL}tree/main/launch"),
        ("../README.md#data", "docs/data.md", "data.md", "index.md#data"),
        ("../../README.md", "docs/api/models.md", "api/models.md", "../index.md"),
        ("docs/decoding.md", "README.md", "index.md", "decoding.md"),
        ("docs/images/strides.svg", "README.md", "index.md", "images/strides.svg"),
        ("launch/colab.ipynb", "README.md", "index.md", f"{URL}blob/main/launch/colab.ipynb"),
        ("CONTRIBUTING.md", "README.md", "index.md", "contributing.md"),
        ("#layout", "README.md", "index.md", "#layout"),
        ("https://arxiv.org/abs/2606.10820", "README.md", "index.md", "https://arxiv.org/abs/2606.10820"),
    ],
)
def test_a_link_that_works_on_github_works_on_the_site(target, file, page, there):
    assert hooks.link(target, file, page, URL) == there


def test_links_of_markdown_and_html_are_found_wherever_they_stand():
    text = 'a [b](docs/data.md), [![c](docs/images/window.svg)](configs) and <img alt="" src="docs/images/window.svg">'
    assert hooks.with_links(text, "README.md", "index.md", URL) == (
        f'a [b](data.md), [![c](images/window.svg)]({URL}tree/main/configs) and <img alt="" src="images/window.svg">'
    )


def test_a_link_to_nothing_is_noticed(caplog):
    assert hooks.link("../gone.py", "docs/data.md", "data.md", URL) == "../gone.py"
    assert "docs/data.md links to ../gone.py" in caplog.text


def test_every_page_is_in_the_navigation_once():
    docs = REPOSITORY / "docs"
    pages = {path.relative_to(docs).as_posix() for path in docs.rglob("*.md")}
    listed = _leaves(SITE["nav"])
    assert sorted(listed) == sorted(pages | set(hooks.PAGES.values()) | {"configuration.md", "configs.md"})


def _leaves(nav):
    if isinstance(nav, str):
        return [nav]
    return [leaf for child in (nav.values() if isinstance(nav, dict) else nav) for leaf in _leaves(child)]


def test_the_site_has_what_every_configuration_says_of_itself():
    text = hooks.configs_page()
    for path in (REPOSITORY / "configs").glob("*.py"):
        assert ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) in text


@pytest.mark.parametrize("page", API_PAGES, ids=lambda page: page.stem)
def test_every_name_of_the_reference_exists_and_has_a_docstring(page):
    for name in re.findall(r"^::: (\S+)$", page.read_text(encoding="utf-8"), re.MULTILINE):
        assert _find(name).__doc__, name


def _find(name):
    parts = name.split(".")
    for length in range(len(parts), 0, -1):
        try:
            found = importlib.import_module(".".join(parts[:length]))
        except ModuleNotFoundError:
            continue
        for part in parts[length:]:
            found = getattr(found, part)
        return found
    raise AssertionError(f"there is no {name}")


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.stem)
def test_a_workflow_calls_what_exists(path):
    for job in _jobs(path):
        for step in job["steps"]:
            for line in step.get("run", "").splitlines():
                wrong = _missing(line)
                assert not wrong, f"{line}: {wrong}"


def _missing(line):
    """What a line of a workflow names that is not there."""
    extras = PROJECT["optional-dependencies"]
    for given in re.findall(r"\.\[([\w,]+)\]", line):
        if not set(given.split(",")) <= extras.keys():
            return f"no extra {given}"
    file = re.match(r"(?:pip install -r|bash) (\S+)", line)
    if file and not (REPOSITORY / file[1]).is_file():
        return f"no file {file[1]}"
    tool, listed = line.split()[0], " ".join(extras["dev"] + extras["docs"])
    if tool in ("ruff", "mypy", "mkdocs") and tool not in listed:
        return f"no extra has {tool}"
    program = re.search(r"bin/(kforcing-\w+)", line)
    if program and program[1] not in PROJECT["scripts"]:
        return f"no program {program[1]}"
    return ""


@pytest.mark.parametrize(
    ("line", "wrong"),
    [
        ('pip install -e ".[dosc]"', "no extra dosc"),
        ("pip install -r requirement.txt", "no file requirement.txt"),
        ("bash .ci/runs", "no file .ci/runs"),
        ('"$RUNNER_TEMP/wheel/bin/kforcing-trian" --help', "no program kforcing-trian"),
    ],
)
def test_what_a_workflow_calls_in_vain_is_noticed(line, wrong):
    assert _missing(line) == wrong


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.stem)
def test_a_workflow_may_only_read_ends_by_itself_and_says_which_actions(path):
    workflow = yaml.safe_load(path.read_text(encoding="utf-8"))
    assert workflow["permissions"] == {"contents": "read"}
    assert workflow["concurrency"]["group"]
    for job in _jobs(path):
        assert job["timeout-minutes"] <= 240
        for step in job["steps"]:
            assert re.fullmatch(r"actions/[\w-]+@v\d+", step.get("uses", "actions/checkout@v1"))


def _jobs(path):
    return yaml.safe_load(path.read_text(encoding="utf-8"))["jobs"].values()


def test_the_tests_run_on_every_python_that_the_metadata_promises():
    tested = yaml.safe_load((REPOSITORY / ".github/workflows/ci.yml").read_text(encoding="utf-8"))["jobs"]["tests"]
    versions = re.findall(r"Python :: (3\.\d+)", " ".join(PROJECT["classifiers"]))
    assert tested["strategy"]["matrix"]["python-version"] == versions


def test_citation_and_changelog_know_the_version():
    citation = yaml.safe_load((REPOSITORY / "CITATION.cff").read_text(encoding="utf-8"))
    assert citation["version"] == kforcing_jax.__version__
    assert citation["license"] == PROJECT["license"]
    headings = re.findall(r"^## .*$", (REPOSITORY / "CHANGELOG.md").read_text(encoding="utf-8"), re.MULTILINE)
    assert kforcing_jax.__version__ in headings[0]


def test_what_commands_of_the_docs_write_is_ignored_and_nothing_that_is_kept():
    if not (REPOSITORY / ".git").exists():
        pytest.skip("a source distribution is no checkout")
    written = [
        "runs/tiny/config.json",
        "comparison.html",
        "site/index.html",
        "wandb/run",
        "dist/a.whl",
        ".mypy_cache/a",
    ]
    ignored = subprocess.run(
        ["git", "check-ignore", *written], cwd=REPOSITORY, capture_output=True, text=True, check=False
    )
    assert ignored.stdout.split() == written
    kept = subprocess.run(
        ["git", "ls-files", "-ci", "--exclude-standard"], cwd=REPOSITORY, capture_output=True, text=True, check=False
    )
    assert kept.stdout == ""
