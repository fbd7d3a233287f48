"""Installing beside the JAX of a runtime: what pip is told."""

import glob
import importlib.metadata
import shutil
import subprocess
import types
from pathlib import Path

import install
import pytest
from commands import REPOSITORY

FITS = {"jax": "0.10.2", "jaxlib": "0.10.2", "jax-cuda12-plugin": "0.10.2", "libtpu": "0.0.30"}


@pytest.fixture
def told(monkeypatch):
    """(the package that pip is to install, lines of the constraints), as they are given; pip itself does not run."""
    told = []

    def run(command, **settings):
        if command[0] == "nvidia-smi":
            return types.SimpleNamespace(stdout="| Driver Version: 1 CUDA Version: 12.4 |")
        constraints = next(word.partition("=")[2] for word in command if word.startswith("--constraint="))
        told.append((command[-1], Path(constraints).read_text().splitlines()))
        return types.SimpleNamespace(returncode=0)

    monkeypatch.setattr(subprocess, "run", run)
    monkeypatch.setattr(shutil, "which", lambda name: name)
    return told


def runtime(monkeypatch, versions, device=""):
    """What is installed, and which device file there is."""
    versions = {"numpy": "2.1"} | versions
    packages = [types.SimpleNamespace(metadata={"Name": name}, version=v) for name, v in versions.items()]
    monkeypatch.setattr(importlib.metadata, "distributions", lambda: packages)
    monkeypatch.setattr(glob, "glob", lambda pattern: [f"{device}0"] if device and pattern.startswith(device) else [])


@pytest.mark.parametrize("device", ["", "/dev/accel", "/dev/nvidia"])
def test_a_jax_that_fits_is_kept_with_all_its_parts(told, monkeypatch, capsys, device):
    runtime(monkeypatch, FITS, device)
    install.main()
    assert told == [(str(REPOSITORY), [f"{name}=={version}" for name, version in FITS.items()])]
    assert capsys.readouterr().out.startswith("keeps jax==0.10.2")


@pytest.mark.parametrize(
    ("device", "extra"), [("", ""), ("/dev/accel", "[tpu]"), ("/dev/vfio/", "[tpu]"), ("/dev/nvidia", "[cuda12]")]
)
@pytest.mark.parametrize("versions", [{}, {"jax": "0.7.2", "jaxlib": "0.7.2"}])
def test_a_jax_that_does_not_fit_gives_way_to_one_for_the_device(told, monkeypatch, capsys, device, extra, versions):
    runtime(monkeypatch, versions, device)
    install.main()
    assert told == [(f"{REPOSITORY}{extra}", [])]
    assert versions.get("jax", "none") in capsys.readouterr().out


def test_what_pip_says_is_shown_when_it_fails(monkeypatch):
    runtime(monkeypatch, FITS)
    failed = types.SimpleNamespace(returncode=1, stderr="ERROR: no such package")
    monkeypatch.setattr(subprocess, "run", lambda command, **settings: failed)
    with pytest.raises(SystemExit, match="no such package"):
        install.main()
