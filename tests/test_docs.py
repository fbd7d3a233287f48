"""What the documentation says exists: files, images, and the flags and fields of every command."""

import re
import runpy
import shlex
import subprocess
import sys

import pytest
from commands import REPOSITORY, run_command

PAGES = [
    REPOSITORY / "README.md",
    *sorted((REPOSITORY / "docs").glob("*.md")),
    *sorted((REPOSITORY / "configs").glob("*.py")),
]
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
    if config and config != "DOTS" and not (REPOSITORY / config.split(":")[0]).is_file():
        found.append(f"no {config}")
    for word in given:
        name = word.split("=")[0].removeprefix("--")
        if name.startswith("config."):
            found += _missing_field(config, name.removeprefix("config."))
        elif word.startswith("--") and name not in known and name.removeprefix("no-") not in known:
            found.append(f"no flag --{name}")
        elif not word.startswith("--"):
            found.append(f"argument {word}")
    return found


def _missing_field(config, path):
    if config in (None, "DOTS"):
        config = "configs/tiny.py"
    file, *variant = config.split(":")
    node = runpy.run_path(str(REPOSITORY / file))["get_config"](*variant)
    for name in path.split("."):
        if name not in node:
            return [f"no field {path}"]
        node = node[name]
    return []


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
        ("python -m kforcing_jax.serf --workdir=a", ["no command kforcing_jax.serf"]),
        ("python launch/missing.py", ["no command launch/missing.py"]),
    ],
)
def test_a_wrong_command_is_noticed(command, wrong, flags_of):
    assert problems(command, flags_of) == wrong


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
