"""Writes a finished stage of a run for others to load: as a released checkpoint, or as a folder of the Llama family.

python -m kforcing_jax.export --workdir=runs/tiny --stage=k4 --output=tiny_k4.safetensors
python -m kforcing_jax.export --workdir=runs/llama --stage=k2 --output=llama_k2

The second form is the layout of the Hugging Face hub. Of a gated student, of any backbone, it has what noise rows
add, and not the teacher: who reads it gives that as --base.
"""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from absl import flags

from kforcing_jax import cli
from kforcing_jax.config import Config
from kforcing_jax.errors import ConfigError

if TYPE_CHECKING:
    from kforcing_jax.data.tokenizers import Tokenizer

FORMATS = ("released", "huggingface")
_WORKDIR = flags.DEFINE_string("workdir", None, "The run directory.")
_STAGE = flags.DEFINE_string("stage", None, "The stage (ar, k4, ...); the last finished one by default.")
_OUTPUT = flags.DEFINE_string(
    "output", None, "A .safetensors, or .ckpt with torch, one that is there is replaced; or a new folder."
)
_FORMAT = flags.DEFINE_enum(
    "format", None, list(FORMATS), "Of the output: by default released for a name with an ending, otherwise a folder."
)


def main(_: Sequence[str]) -> None:
    """Writes the stage, and prints what was written. Raises ConfigError for flags that cannot be followed."""
    if _WORKDIR.value is None:
        raise ConfigError("--workdir is missing, for example --workdir=runs/tiny")
    is_folder = _is_folder(_OUTPUT.value, _FORMAT.value)
    output = (check_folder if is_folder else check_output)(_OUTPUT.value)

    import jax

    from kforcing_jax.data.beside_tokenizers import template_in
    from kforcing_jax.interop import huggingface, official
    from kforcing_jax.training.checkpoints import finished_stages, load_stage
    from kforcing_jax.workdir import Workdir

    workdir = Workdir.open(_WORKDIR.value)
    stage = choose_stage(finished_stages(workdir), _STAGE.value)
    tokenizer = workdir.tokenizer()
    model, params = load_stage(workdir, stage, tokenizer)
    note = note_of(workdir.config, stage, tokenizer)
    if is_folder:
        note["base"] = base_of(workdir.config) if model.cfg.is_gated else None
        huggingface.save(output, model, params, tokenizer, chat_template=template_in(workdir.data_path), **note)
    else:
        official.save(output, model, params, **note)
    size, vocab_size = sum(leaf.size for leaf in jax.tree.leaves(params)), model.cfg.vocab_size
    print(f"{output}: {type(model).__name__} of stage {stage}, {size:,} parameters, vocabulary of {vocab_size:,}")


def note_of(config: Config, stage: str, tokenizer: "Tokenizer") -> dict:
    """What the file says beside the weights, see `official.NOTES`."""
    from kforcing_jax.data.pretrained import digest

    note: dict[str, int | float | str | None] = {
        "eos_id": tokenizer.eos_id,
        "vocabulary": digest(tokenizer.backend),
        "seq_len": config.data.seq_len,
        "prefix_length": config.evaluation.prompt_length,
    }
    settings = config.stages[stage]
    if settings.window:
        note |= {"window": settings.window, "tau_min": float(settings.tau_min), "tau_max": float(settings.tau_max)}
        note["top_p"] = float(settings.top_p)
    return note


def base_of(config: Config) -> str | None:
    """Where the teacher of a run's gated students came from; None where it was trained here."""
    from kforcing_jax.data.places import expanded

    path = config.stages["ar"].checkpoint
    return str(expanded(path).absolute()) if path and expanded(path).exists() else path or None


def _is_folder(output, form) -> bool:
    return form == "huggingface" or (form is None and bool(output) and not Path(output).suffix)


def check_folder(output: str | None) -> Path:
    """The folder to write. Raises ConfigError when it is already clear that nothing can be written there."""
    from kforcing_jax.interop.model_folders import check_new_folder

    if not output:
        raise ConfigError("--output is missing, for example --output=model")
    try:
        return check_new_folder(output)
    except ConfigError as error:
        raise ConfigError(f"--output={error}") from None


def check_output(output: str | None) -> Path:
    """The path to write. Raises ConfigError when it is already clear that nothing can be written there."""
    from kforcing_jax.data.places import expanded
    from kforcing_jax.interop.tensor_files import check_writable_format

    if not output:
        raise ConfigError("--output is missing, for example --output=model.safetensors")
    path = expanded(output)
    folder = path.parent
    if path.is_dir() or output.endswith(os.sep):
        raise ConfigError(f"--output={output} is a directory; name a file in it")
    if path.exists() and not path.is_file():
        raise ConfigError(f"--output={output} is there, and is not a file")
    if not folder.is_dir():
        raise ConfigError(f"--output={output}: there is no directory {folder}")
    if not os.access(folder, os.W_OK):
        raise ConfigError(f"--output={output}: the directory {folder} is not writable")
    check_writable_format(path)
    return path


def choose_stage(finished: list[str], stage: str | None) -> str:
    """The stage to write, by default the last of the finished ones. Raises ConfigError when it is not one of them."""
    if not finished:
        raise ConfigError("this run has no finished stage; run kforcing_jax.main on it again")
    if stage is not None and stage not in finished:
        raise ConfigError(f"--stage={stage} is not a finished stage of this run; finished: {', '.join(finished)}")
    return stage or finished[-1]


if __name__ == "__main__":
    cli.run(main)
