"""Whole runs in the process of a test."""

from pathlib import Path

from interop.families import TEACHER, write_teacher
from micro import micro_config_dict

from kforcing_jax.config import Config, parse
from kforcing_jax.data.pipeline import Corpus
from kforcing_jax.interop.teachers import with_teacher
from kforcing_jax.sharding import make_mesh
from kforcing_jax.training import curriculum
from kforcing_jax.workdir import Workdir


def train(path: Path, config: Config) -> tuple[Workdir, Corpus]:
    """A run directory after all stages of a configuration, and its data."""
    workdir = Workdir.claim(path, config)
    corpus = workdir.corpus()
    curriculum.run(workdir, corpus, make_mesh(config.mesh))
    return workdir, corpus


def chat_run(folder: Path, template: str) -> Path:
    """A run of an imported AR model alone, on chats under a template that is not the model's; returns its directory."""
    teacher = write_teacher(folder / "teacher", TEACHER | {"max_position_embeddings": 256})
    (folder / "own.jinja").write_text(template)
    config = micro_config_dict()
    config.data.update(dict(source="chat", path=str(Path(__file__).parent / "data/chats.jsonl"), seq_len=32))
    config.data.update(dict(packing="padded", chat_template=str(folder / "own.jinja")))
    config.model.update(dict(num_layers=2, d_model=32, num_heads=4))
    config.stages = {"ar": config.stages.ar}
    config.stages.ar.checkpoint = str(teacher)
    return train(folder / "run", with_teacher(parse(config)))[0].path
