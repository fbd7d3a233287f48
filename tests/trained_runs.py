"""Whole runs in the process of a test."""

from pathlib import Path

from kforcing_jax.config import Config
from kforcing_jax.data.pipeline import Corpus
from kforcing_jax.sharding import make_mesh
from kforcing_jax.training import curriculum
from kforcing_jax.workdir import Workdir


def train(path: Path, config: Config) -> tuple[Workdir, Corpus]:
    """A run directory after all stages of a configuration, and its data."""
    workdir = Workdir.claim(path, config)
    corpus = workdir.corpus()
    curriculum.run(workdir, corpus, make_mesh(config.mesh))
    return workdir, corpus
