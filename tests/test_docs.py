"""What the documentation says exists: files, images, and the flags and fields of every command."""

import re
import runpy
import shlex
import subprocess
import sys

import pytest
from commands import REPOSITORY, run_command

from kforcing_jax.cli.config_file import split_overrides
from kforcing_jax.cli.stage_flags import change_stages
from kforcing_jax.config import parse
from kforcing_jax.errors import ConfigError

PAGES = [
    REPOSITORY / "README.md",
    REPOSITORY / "CONTRIBUTING.md",
    *sorted((REPOSITORY / "docs").rglob("*.md")),
    *sorted((REPOSITORY / "configs").glob("*.py")),
]
# The others have flags alone.
TAKE_ARGUMENTS = ("kforcing_jax.compare",)
# In a block or inline, after a prompt, settings of the environment or another command; up to what ends a command.
_COMMAND = re.compile(r"\bpython3? (?:-m kforcing_jax\.|launch/|benchmarks/)(?:(?! #| &&| \||[`\n;]).)+")


def commands(text):
    """Every python command of a page that is of this project, on one line."""
    return _COMMAND.findall(re.sub(r"\\\n\s*", "", text))


def problems(command, flags_of):
    """What a command names that is not there."""
    words = shlex.split(command.replace("...", "DOTS"))
    program, given = (words[2], words[3:]) if words[1] == "-m" else (words[1], words[2:])
    known, found = flags_of(program), []
    if not known:
        return [f"no command {program}"]
    config = next((word.removeprefix("--config=") for word in given if word.startswith("--config=")), None)
    if config and config != "DOTS" and not _get_config(config):
        found.append(f"no {config}")
    found += _missing_fields(config, split_overrides(given)[1])
    for word in given:
        name = word.split("=")[0].removeprefix("--")
        if name.startswith("config."):
            continue
        if word.startswith("--") and name not in known and name.removeprefix("no-") not in known:
            found.append(f"no flag --{name}")
        elif not word.startswith("--") and program not in TAKE_ARGUMENTS:
            found.append(f"argument {word}")
    return found


def _missing_fields(config, overrides):
    if not overrides:
        return []
    if config in (None, "DOTS"):
        config = "configs/tiny.py"
    get_config = _get_config(config)
    if not get_config:
        return []
    fields = get_config(*config.split(":")[1:]).to_dict()
    try:
        overrides = change_stages(fields["stages"], overrides)
    except ConfigError as error:
        return [str(error)]
    return [f"no field {path}" for path in overrides if not _is_there(fields, path.split("."))]


def _get_config(config):
    """The function of a config, by its path or the name of an installed one; None where there is none."""
    file = config.split(":")[0]
    if file == "mine.py":  # which a page has its readers write
        names = {}
        page = (REPOSITORY / "docs/sweeps.md").read_text(encoding="utf-8")
        exec(re.search(r"```python\n(.*?)```", page, re.DOTALL)[1], names)
        return names["get_config"]
    paths = (REPOSITORY / file, REPOSITORY / "configs" / f"{file}.py")
    return next((runpy.run_path(str(path))["get_config"] for path in paths if path.is_file()), None)


def _is_there(node, names):
    for name in names:
        if not isinstance(node, dict) or name not in node:
            return False
        node = node[name]
    return True


def _help(program):
    if program.startswith("kforcing_jax."):
        try:
            return run_command(program.removeprefix("kforcing_jax."), "--helpfull").out
        except ImportError:
            return ""
    script = [sys.executable, program, "--helpfull"]
    return subprocess.run(script, cwd=REPOSITORY, capture_output=True, text=True, timeout=120).stdout


@pytest.fixture(scope="module")
def flags_of():
    """program -> its flags, as it lists them itself."""
    known = {}

    def ask(program):
        if program not in known:
            known[program] = set(re.findall(r"^\s+--(?:\[no\])?(\w+)", _help(program), re.MULTILINE))
        return known[program]

    return ask


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_command_names_flags_fields_and_files_that_exist(page, flags_of):
    found = {command: problems(command, flags_of) for command in commands(page.read_text(encoding="utf-8"))}
    assert not {command: wrong for command, wrong in found.items() if wrong}


def test_there_are_commands_to_check():
    assert sum(len(commands(page.read_text(encoding="utf-8"))) for page in PAGES) > 30


@pytest.mark.parametrize(
    "text",
    [
        "    python -m kforcing_jax.verify --a=b   # why",
        "`python -m kforcing_jax.verify --a=b`, and so on",
        "$ JAX_PLATFORMS=cpu python -m kforcing_jax.verify \\\n    --a=b && ls",
        "cd x && python -m kforcing_jax.verify --a=b | tee log",
    ],
)
def test_a_command_is_found_wherever_it_stands(text):
    assert [shlex.split(command) for command in commands(text)] == [["python", "-m", "kforcing_jax.verify", "--a=b"]]


@pytest.mark.parametrize(
    ("command", "wrong"),
    [
        ("python -m kforcing_jax.generate --workdir=a --promt=x", ["no flag --promt"]),
        ("python -m kforcing_jax.main --config=configs/tiny.py --config.model.layers=3", ["no field model.layers"]),
        ("python -m kforcing_jax.main --config=configs/huge.py", ["no configs/huge.py"]),
        ("python launch/compile_for_tpu.py --config=configs/owt.py stray", ["argument stray"]),
        ("python -m kforcing_jax.compare runs/a runs/b --json", []),
        ("python -m kforcing_jax.main --config=configs/lm1b.py --config.stages.k16.window=16", []),
        (
            "python -m kforcing_jax.main --config=tiny --config.stages.k16.window=16 --config.stages.k16.step=9",
            ["no field stages.k16.step"],
        ),
        ("python -m kforcing_jax.serf --workdir=a", ["no command kforcing_jax.serf"]),
        ("python launch/missing.py", ["no command launch/missing.py"]),
    ],
)
def test_a_wrong_command_is_noticed(command, wrong, flags_of):
    assert problems(command, flags_of) == wrong


def test_the_config_that_readers_write_is_one():
    assert parse(_get_config("mine.py")("deep")).model.num_layers > parse(_get_config("mine.py")()).model.num_layers


@pytest.mark.parametrize("page", [p for p in PAGES if p.suffix == ".md"], ids=lambda page: page.name)
def test_every_link_leads_somewhere(page):
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text(encoding="utf-8")):
        if "://" in target:
            continue
        file, _, anchor = target.partition("#")
        linked = (page.parent / file).resolve() if file else page
        assert linked.exists(), target
        if anchor:
            headings = re.findall(r"^#+ (.*)$", linked.read_text(encoding="utf-8"), re.MULTILINE)
            assert anchor in [re.sub(r"[^\w\- ]", "", h.lower()).replace(" ", "-") for h in headings], target
