"""What is installed: programs, configurations, dependencies; the wheel in an empty folder, the source distribution."""

import ast
import importlib.metadata
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import tomllib
from pathlib import Path

import pytest
from commands import REPOSITORY, Result, refused
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from kforcing_jax import __main__ as listing
from kforcing_jax.cli.config_file import read_config
from kforcing_jax.errors import ConfigError
from kforcing_jax.installed import CONFIGS, config_names

PROJECT = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]
EXTRAS = PROJECT["optional-dependencies"]
PACKAGE = REPOSITORY / "kforcing_jax"
PYTHONS = [line.rpartition(" ")[2] for line in PROJECT["classifiers"] if re.search(r":: 3\.\d+$", line)]
# What machines of the cloud install from the lock, besides what everybody does.
CLOUD = ("chat", "cuda12", "cuda13", "gcs", "lm1b", "parquet", "serve", "tensorboard", "tpu", "wandb")


def python(*given, cwd) -> Result:
    """A new Python, which finds the package of this repository and nothing else of it."""
    environment = os.environ | {"PYTHONPATH": str(REPOSITORY)}
    done = subprocess.run(
        [sys.executable, *given], cwd=cwd, env=environment, capture_output=True, text=True, timeout=120
    )
    return Result(done.returncode, done.stdout, done.stderr)


# Programs and the package


def test_every_program_is_a_command_and_every_command_a_program():
    assert set(PROJECT["scripts"]) == set(listing.COMMANDS)
    for program, entry in PROJECT["scripts"].items():
        module, _, function = entry.partition(":")
        assert module == listing.__name__ and getattr(listing, function).args == (program,)
    commands = [
        path.stem for path in PACKAGE.glob("*.py") if 'if __name__ == "__main__":\n    cli.run(' in path.read_text()
    ]
    assert sorted(listing.COMMANDS.values()) == sorted(commands)


def test_the_list_of_commands_says_what_each_does_without_jax(tmp_path):
    said = "from kforcing_jax.__main__ import main; main([]); import sys; print('jax' in sys.modules)"
    done = python("-c", said, cwd=tmp_path)
    assert done.status == 0, done.err
    lines = done.out.splitlines()
    for program, module in listing.COMMANDS.items():
        docstring = ast.get_docstring(ast.parse((PACKAGE / f"{module}.py").read_text()))
        assert f"  {program:<17}  {docstring.splitlines()[0]}" in lines
    assert lines[-1] == "False" and ", ".join(config_names()) in done.out


def test_the_list_takes_no_arguments(tmp_path):
    refused(python("-m", "kforcing_jax", "train", cwd=tmp_path), "'train'", "kforcing-train")


def test_the_package_is_imported_in_no_time_and_without_jax(tmp_path):
    """Seconds of the processor: other work on the machine does not count. The best of a few."""
    timed = "import time; start = time.process_time(); import kforcing_jax, sys; print(time.process_time() - start)"
    timed += "; print('jax' in sys.modules)"
    runs = [python("-c", timed, cwd=tmp_path).out.split() for _ in range(3)]
    assert min(float(seconds) for seconds, _ in runs) < 0.05
    assert {jax for _, jax in runs} == {"False"}


def test_type_checkers_are_told_that_there_are_types():
    assert (PACKAGE / "py.typed").exists() and "Typing :: Typed" in PROJECT["classifiers"]


# Configurations by name


def test_the_installed_configs_are_those_of_the_repository():
    there = {path.name: path.read_text() for path in (REPOSITORY / "configs").glob("*.py")}
    assert {path.name: path.read_text() for path in CONFIGS.glob("*.py")} == there
    assert config_names() == sorted(name.removesuffix(".py") for name in there)


def test_a_name_finds_an_installed_config_from_any_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert read_config("tiny", {}) == read_config(str(REPOSITORY / "configs/tiny.py"), {})
    assert read_config("lm1b:smoke", {"seed": "3"}).data.seq_len < read_config("lm1b", {}).data.seq_len


def test_a_file_of_that_name_comes_first(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    changed = (
        (REPOSITORY / "configs/tiny.py").read_text().replace("config.data.seq_len = 64", "config.data.seq_len = 96")
    )
    Path("tiny").write_text(changed)
    assert read_config("tiny", {}).data.seq_len == 96


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("tinny", "--config=tinny: no such file; installed are "),
        ("tinny:smoke", "--config=tinny: no such file; installed are "),
        ("configs/tiny.py", "--config=configs/tiny.py: no such file; the installed one is --config=tiny"),
        ("mine/lm1b.py:smoke", "--config=mine/lm1b.py: no such file; the installed one is --config=lm1b"),
    ],
)
def test_what_is_neither_is_told_what_is_installed(tmp_path, monkeypatch, name, says):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match=re.escape(says)):
        read_config(name, {})


# Dependencies


def requirements(*extras):
    """Those of the base installation and of some extras, which may name others of this project."""
    for text in [*PROJECT["dependencies"], *(text for extra in extras for text in EXTRAS[extra])]:
        requirement = Requirement(text)
        if requirement.name == PROJECT["name"]:
            yield from requirements(*requirement.extras)
        else:
            yield requirement


def imported_packages():
    """(file, package, whether at the top) of every import of another project's module in the package."""
    distributions = importlib.metadata.packages_distributions()
    for path in sorted(PACKAGE.rglob("*.py")):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        for node in ast.walk(tree):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom) and not node.level:
                names = [node.module]
            for module in {name.partition(".")[0] for name in names} - sys.stdlib_module_names - {"kforcing_jax"}:
                for package in distributions.get(module, [module])[:1]:
                    yield path.relative_to(PACKAGE), canonicalize_name(package), node in tree.body


def test_what_is_imported_is_a_dependency_and_what_is_always_imported_no_extra():
    base = {canonicalize_name(requirement.name) for requirement in requirements()}
    known = {canonicalize_name(requirement.name) for requirement in requirements(*EXTRAS)}
    known |= {"ipython", "pydantic", "starlette"}  # what notebooks have, and what fastapi is made of
    for path, package, is_at_the_top in imported_packages():
        assert package in known, f"{path} imports {package}"
        behind_an_extra = {"serving", "trackers", "notebook.py"} & set(path.parts)
        assert package in base or not is_at_the_top or behind_an_extra, f"{path} imports {package}, of an extra"


def test_every_dependency_of_all_is_imported():
    # orbax brings nothing under its own name, and jax is what the others are for.
    imported = {package for _, package, _ in imported_packages()} | {"orbax-checkpoint"}
    assert {canonicalize_name(requirement.name) for requirement in requirements()} <= imported


def test_errors_name_extras_that_exist():
    named = [
        extra
        for path in PACKAGE.rglob("*.py")
        for extras in re.findall(r"kforcing-jax\[([\w,]+)\]", path.read_text(encoding="utf-8"))
        for extra in extras.split(",")
    ]
    assert named and set(named) <= set(EXTRAS)


# The lock


def locked(python_version):
    """Versions by name, for a Python on Linux."""
    environment = {"python_version": python_version, "python_full_version": f"{python_version}.0"}
    lines = (REPOSITORY / "requirements.lock").read_text().splitlines()
    pins = [Requirement(line) for line in lines if line and not line.startswith("#")]
    return {pin.name: pin for pin in pins if pin.marker is None or pin.marker.evaluate(environment)}


@pytest.mark.parametrize("python_version", PYTHONS)
def test_the_lock_has_every_dependency_of_a_machine_of_the_cloud_within_its_range(python_version):
    pins = locked(python_version)
    for requirement in requirements(*CLOUD):
        pin = pins[canonicalize_name(requirement.name)]
        (version,) = [specifier.version for specifier in pin.specifier]
        assert requirement.specifier.contains(version), f"{pin} is not {requirement}; renew the lock (CONTRIBUTING.md)"
        assert not pin.extras  # pip takes no extras in constraints


def test_the_cloud_installs_nothing_that_is_not_locked():
    for name in ("launch/gke/Dockerfile", "launch/tpu_vm.sh"):
        text = (REPOSITORY / name).read_text()
        for extras in re.findall(r"install.*?-e [^\s]*\[([^\]]+)\]", text.replace("\n", " ")):
            assert set(extras.split(",")) - {"${EXTRA}"} <= set(CLOUD), name


def test_the_lock_names_no_index_and_the_command_that_wrote_it():
    text = (REPOSITORY / "requirements.lock").read_text()
    assert "://" not in text and "--index" not in text.replace("--no-emit-index-url", "")
    command = text.splitlines()[1]
    assert all(f"--extra={extra} " in command for extra in CLOUD) and "uv pip compile --universal" in command


# Wheel and source distribution


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """(source distribution, wheel), the second one made of the first."""
    source, out = tmp_path_factory.mktemp("source") / "tree", tmp_path_factory.mktemp("dist")
    if (REPOSITORY / ".git").exists():
        for name in tracked():
            (source / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(REPOSITORY / name, source / name, follow_symlinks=False)
    else:
        shutil.copytree(REPOSITORY, source, symlinks=True)
    command = [sys.executable, "-m", "build", "--outdir", out, source]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "is absent from the `packages` configuration" not in done.stdout + done.stderr
    return next(out.glob("*.tar.gz")), next(out.glob("*.whl"))


def tracked() -> list[str]:
    """Files of the repository as git knows them, less those that were deleted since."""
    command = ["git", "-C", str(REPOSITORY), "ls-files", "-z"]
    names = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split("\0")
    return [name for name in names if name and (REPOSITORY / name).exists()]


@pytest.fixture(scope="module")
def unpacked(built, tmp_path_factory):
    """The folder of the source distribution."""
    folder = tmp_path_factory.mktemp("unpacked")
    with tarfile.open(built[0]) as archive:
        archive.extractall(folder, filter="data")
    return next(folder.iterdir())


@pytest.fixture(scope="module")
def installed(built, tmp_path_factory):
    """bin/ of an environment that has the wheel; dependencies are those of this one."""
    environment = tmp_path_factory.mktemp("installed")
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", environment], check=True, timeout=120)
    pip = [sys.executable, "-m", "pip", "--python", environment / "bin/python", "install", "--quiet", "--no-deps"]
    subprocess.run([*pip, "--no-index", built[1]], check=True, timeout=120)
    # Only now: before, pip would find this one's installation, and leave it at that. Its .pth files do not count there.
    (packages,) = environment.glob("lib/python*/site-packages")
    (packages / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return environment / "bin"


def program(installed, name, *given, cwd) -> Result:
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    command = [installed / name, *map(str, given)]
    done = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=300)
    return Result(done.returncode, done.stdout, done.stderr)


@pytest.mark.smoke
def test_every_program_answers_for_help_with_its_own_flags(installed, tmp_path):
    found = {path.name for path in installed.glob("kforcing-*")}
    assert found == set(listing.COMMANDS)
    for name, module in listing.COMMANDS.items():
        done = program(installed, name, "--help", cwd=tmp_path)
        assert done.status == 0, done
        assert f"kforcing_jax/{module}.py:\n" in done.out and "\n  --" in done.out, done
        assert str(REPOSITORY) not in done.out


@pytest.mark.smoke
def test_a_program_finds_installed_configs_from_an_empty_folder(installed, tmp_path):
    train = [installed, "kforcing-train", "--workdir=run"]
    refused(program(*train, "--config=tiny", "--config.model.num_heads=5", cwd=tmp_path), "model.num_heads = 5")
    refused(program(*train, "--config=tinny", cwd=tmp_path), "installed are", *config_names())
    assert list(tmp_path.iterdir()) == []


OWN_SOURCE = """
from kforcing_jax.data.units import GivenDocuments, Reader

class Part(GivenDocuments):
    pass  # what is sent to another process, which has to find this file

class Counting(Reader):
    def documents(self):
        return [f"{number} and {number + 1} are neighbours" for number in range(400)]

    def units(self):
        documents = tuple(self.documents())
        return {"train": [Part(documents[:200]), Part(documents[200:300])], "validation": [Part(documents[300:])]}
"""


@pytest.mark.smoke
def test_a_program_and_its_processes_find_modules_of_the_current_folder(installed, tmp_path):
    (tmp_path / "own_source.py").write_text(OWN_SOURCE)
    flags = ["--config=tiny", "--config.data.source=own_source:Counting", "--workdir=run", "--workers=2"]
    done = program(installed, "kforcing-prepare", *flags, cwd=tmp_path)
    assert done.status == 0, done.err
    assert (tmp_path / "run/data/manifest.json").exists()


@pytest.mark.smoke
@pytest.mark.skipif(
    not (REPOSITORY / ".git").exists(), reason="not a git checkout: nothing says which files are its own"
)
def test_the_source_distribution_has_what_the_repository_has(unpacked):
    missing = [name for name in tracked() if not (unpacked / name).exists()]
    assert not missing


@pytest.mark.smoke
def test_tests_run_from_the_source_distribution(unpacked):
    def run(*given):
        command = [sys.executable, "-m", "pytest", "-q", "-n", "0", *given]
        return subprocess.run(command, cwd=unpacked, capture_output=True, text=True, timeout=600)

    collected = run("--collect-only", "-m", "")
    assert collected.returncode == 0, collected.stdout[-2000:]
    done = run("tests/test_config.py", "tests/test_configs.py")
    assert done.returncode == 0 and " passed" in done.stdout, done.stdout[-2000:]


@pytest.mark.smoke
def test_the_wheel_has_configs_pages_and_the_mark_of_types(installed):
    (package,) = installed.parent.glob("lib/python*/site-packages/kforcing_jax")
    assert (package / "py.typed").exists()
    assert sorted(path.stem for path in (package / "_configs").glob("*.py")) == config_names()
    pages = {path.relative_to(PACKAGE) for path in PACKAGE.rglob("*.html")}
    assert pages and all((package / page).exists() for page in pages)
