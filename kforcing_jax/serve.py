"""Serves a trained run or a released checkpoint over HTTP, to any OpenAI client.

python -m kforcing_jax.serve --workdir=runs/tiny
curl localhost:8000/v1/completions -H 'Content-Type: application/json' -d '{"prompt": "The president said", "seed": 3}'
"""

import importlib.util
import logging
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from absl import flags

from kforcing_jax import cli
from kforcing_jax.cli.checkpoints import BASE, CHECKPOINT, TOKENIZER, WEIGHTS, K, check_one_model
from kforcing_jax.cli.stages import choose_stage
from kforcing_jax.data.places import expanded
from kforcing_jax.errors import ConfigError, RunError

if TYPE_CHECKING:
    from kforcing_jax.architecture import Architecture
    from kforcing_jax.data.tokenizers import Tokenizer

for _name in ("checkpoint", "tokenizer", "weights", "base", "k"):
    flags.declare_key_flag(_name)
_WORKDIR = flags.DEFINE_string("workdir", None, "The run directory.")
_STAGE = flags.DEFINE_string("stage", None, "The student that drafts and decodes, not that of the largest window.")
_TEACHER = flags.DEFINE_string("teacher", None, "The AR .ckpt beside a student --checkpoint, for modes ar and exact.")
_HOST = flags.DEFINE_string("host", "127.0.0.1", "Address to listen at; 0.0.0.0 for all of this machine.")
_PORT = flags.DEFINE_integer("port", 8000, "Port; 0 takes a free one.", lower_bound=0, upper_bound=65535)
_SLOTS = flags.DEFINE_integer("slots", None, "Texts at a time; by default what fits, 64 at most.", lower_bound=1)
_MAX_LENGTH = flags.DEFINE_integer(
    "max_length", None, "Tokens of a text, its prompt included; by default those of training.", lower_bound=2
)
_DTYPE = flags.DEFINE_enum("dtype", "float32", ["float32", "bfloat16"], "Of the blocks and their caches.")
_EXACT_WINDOWS = flags.DEFINE_integer(
    "exact_windows",
    None,
    "Mode exact of a gated student: windows that a pass drafts beside what it verifies, by default k; 0: two passes.",
    lower_bound=0,
)
_MODE = flags.DEFINE_enum(
    "mode", None, ["student", "ar", "exact"], "Of requests that do not say; the student's if there is one."
)
_CONFIDENCE = flags.DEFINE_float(
    "confidence", 0.0, "Of requests that do not say, in mode student; 0 keeps whole windows."
)
_TENSOR = flags.DEFINE_integer("tensor", 1, "Devices of this host that share heads and columns.", lower_bound=1)
_QUEUE = flags.DEFINE_integer("queue", 1024, "Texts that may wait for a slot; more are answered 429.", lower_bound=1)
_REQUEST_TIMEOUT = flags.DEFINE_float("request_timeout", 600, "Seconds that a request may take.", lower_bound=0.001)
_DRAIN_SECONDS = flags.DEFINE_float("drain_seconds", 30, "After SIGTERM, for what has begun.", lower_bound=0)
_NAME = flags.DEFINE_string("name", None, "Of the model, for clients; by default that of the directory or file.")
_CHAT_TEMPLATE = flags.DEFINE_string(
    "chat_template", None, "A .jinja, or a folder that has one; by default that of training, or the tokenizer's."
)
_API_KEY = flags.DEFINE_string("api_key", None, "That clients have to have; KFORCING_API_KEY says it unseen.")

# No request may ask for more texts than its share of the queue, were there so many.
_CALLERS = 4
_PACKAGES = ("fastapi", "jinja2", "prometheus_client", "uvicorn")
_LOG = logging.getLogger("kforcing_jax")
# Of files of models, which are no part of their names; versions (3.2) are.
_ENDINGS = (".ckpt", ".gguf", ".pt", ".safetensors")
# Programs are compiled for so many texts at a time, unless memory or --slots says otherwise.
_MOST_SLOTS, _MOST_SLOTS_ON_A_CPU = 64, 16


class Loaded(NamedTuple):
    """Models, and what has to be known of them; None where nothing says it."""

    name: str
    student: tuple | None
    teacher: tuple | None
    tokenizer: "Tokenizer | None"
    tokenizer_folder: Path | None
    eos_id: int | None
    k: int
    seq_len: int | None
    tau_range: tuple[float, float] | None
    tau: float  # of requests that do not say
    top_p: float  # of the nucleus that students' tokens are from


def main(_: Sequence[str]) -> None:
    """Loads what the flags name, compiles, and serves until a signal ends it."""
    _check_flags()
    from kforcing_jax.serving.server import bind, serve

    bound = bind(_HOST.value, _PORT.value)  # a port that is taken is said before minutes of loading
    loaded = _loaded()
    template, mode = _template(loaded), _mode(loaded)
    engine = _engine(loaded)
    loaded = loaded._replace(student=None, teacher=None)  # slots get what the stacked weights took
    app = _app(loaded, _with_slots(engine), template, mode)
    host, port = bound.getsockname()[:2]
    address = f"http://{f'[{host}]' if ':' in host else host}:{port}"
    name = app.state.service.served.name
    said = f"serving {name} at {address}: /v1, /health, /metrics, and a page at /"
    serve(app, bound, _DRAIN_SECONDS.value, lambda: _LOG.info(said))


def _check_flags():
    missing = [name for name in _PACKAGES if not importlib.util.find_spec(name)]
    if missing:
        raise ConfigError(f"not installed: {', '.join(missing)}; pip install 'kforcing-jax[serve]'")
    check_one_model(_WORKDIR.value)
    unused = ["prefix_file", "prefix_length", "batch_size", "num_samples", "max_new_tokens"]
    cli.refuse_flags(unused, "here: requests say what they want")
    if _WORKDIR.value:
        cli.refuse_flags(["tokenizer", "weights", "teacher", "base"], "without --checkpoint")
    else:
        cli.refuse_flags(["stage"], "without --workdir")
    if not 0 <= _CONFIDENCE.value <= 1:
        raise ConfigError(f"--confidence={_CONFIDENCE.value} is not in [0, 1]")
    _api_key()


def _api_key() -> str | None:
    """None lets everyone in, so an empty one is a mistake. Secrets out of files end with a line break."""
    key = os.environ.get("KFORCING_API_KEY") if _API_KEY.value is None else _API_KEY.value
    if key is not None and (not key.strip() or not key.isascii()):
        raise ConfigError("--api_key, or KFORCING_API_KEY, should be ASCII, as headers of HTTP are, and not empty")
    return key and key.strip()


def _loaded() -> Loaded:
    if _WORKDIR.value:
        return _from_run(_WORKDIR.value)
    assert CHECKPOINT.value is not None  # `check_one_model`
    return _from_checkpoint(CHECKPOINT.value)


def _from_run(path: str) -> Loaded:
    from kforcing_jax.training.checkpoints import begun_stages, finished_stages, load_stage, unfinished_stages
    from kforcing_jax.workdir import Workdir

    workdir = Workdir.open(path)
    tokenizer, config, begun = workdir.tokenizer(), workdir.config, begun_stages(workdir)
    if not begun:
        raise RunError(f"{workdir.path} has no stage with a checkpoint; run kforcing_jax.main on it again")
    name = _NAME.value or workdir.path.absolute().name
    mesh = _mesh(config.model)
    student, k, tau_range = None, 1, None
    if _STAGE.value != "ar" and (_STAGE.value or begun != ["ar"]):
        finished, unfinished = finished_stages(workdir), unfinished_stages(workdir)
        stage, k = choose_stage(config, finished, "student", K.value, _STAGE.value, unfinished)
        student = load_stage(workdir, stage, tokenizer, mesh)
        tau_range = config.stages[stage].tau_min, config.stages[stage].tau_max
    has_own = student is not None and student[0].cfg.is_gated
    teacher = load_stage(workdir, "ar", tokenizer, mesh) if "ar" in begun and not has_own else None
    known = tokenizer, workdir.data_path, tokenizer.eos_id, k, config.data.seq_len
    return Loaded(name, student, teacher, *known, tau_range, config.evaluation_tau, config.top_p)


def _from_checkpoint(path: str) -> Loaded:
    from kforcing_jax.interop.released import open_released, open_teacher
    from kforcing_jax.models import CausalLM

    where: dict[str, Any] = {"dtype": _DTYPE.value, "mesh": _mesh()}
    released = open_released(path, TOKENIZER.value, WEIGHTS.value, needs_tokenizer=False, base=BASE.value, **where)
    student: tuple | None = None
    teacher: tuple | None = None
    if isinstance(released.model, CausalLM):
        cli.refuse_flags(["k", "teacher"], f"with {path}, an AR model")
        teacher = released.model, released.params
    else:
        if released.model.cfg.is_gated:
            cli.refuse_flags(["teacher"], f"with {path}, a student that has its teacher")
        student = released.model, released.params
        teacher = open_teacher(_TEACHER.value, released, **where)[:2] if _TEACHER.value else None
    if released.tokenizer is None:
        _LOG.info("no tokenizer is here: prompts are ids, and so are answers")
    folder = expanded(TOKENIZER.value) if TOKENIZER.value and expanded(TOKENIZER.value).is_dir() else None
    return Loaded(
        _NAME.value or _name_of(path),
        student,
        teacher,
        released.tokenizer,
        folder,
        released.eos_id,
        released.tokens_per_pass(K.value),
        released.seq_len,
        released.tau_range,
        released.usual_tau,
        released.top_p,
    )


def _name_of(path: str) -> str:
    """Of a folder as it is called, also where that is `.`; of a file without its ending."""
    place = Path(os.path.abspath(expanded(path)))
    return place.stem if place.suffix.lower() in _ENDINGS and not place.is_dir() else place.name


def _mesh(*models: "Architecture"):
    """None without --tensor. What is not known yet of a model is looked at once it is."""
    if _TENSOR.value == 1:
        return None
    from kforcing_jax.config import MeshConfig
    from kforcing_jax.sharding import make_mesh

    for model in models:
        _check_shares(model)
    return make_mesh(MeshConfig(data=1, fsdp=1, tensor=_TENSOR.value))


def _check_shares(model):
    """Raises ConfigError where --tensor does not divide what it splits; query heads are multiples of the others."""
    for what, size in (
        ("key/value heads", model.kv_heads),
        ("columns of the MLP", model.mlp_width),
        ("channels", model.d_model),
    ):
        if size % _TENSOR.value:
            raise ConfigError(f"--tensor={_TENSOR.value} does not divide the {size} {what} of the model")


def _app(loaded: Loaded, engine, template, mode):
    """The application on an engine that has compiled all that it will need."""
    from kforcing_jax.serving.app import Service, create_app
    from kforcing_jax.serving.metrics import Metrics
    from kforcing_jax.serving.plan import Served
    from kforcing_jax.serving.scheduler import Scheduler
    from kforcing_jax.serving.worker import Worker

    served = Served(
        name=loaded.name,
        engine=engine,
        tokenizer=loaded.tokenizer,
        eos_id=loaded.eos_id,
        mode=mode,
        confidence=_CONFIDENCE.value,
        tau_range=loaded.tau_range,
        tau=loaded.tau,
        top_p=loaded.top_p,
        most_texts=max(_QUEUE.value // _CALLERS, 1),
        chat_template=template,
    )
    _warm_up(engine)
    scheduler = Scheduler(engine, most_waiting=_QUEUE.value)
    metrics = Metrics(loaded.name, exact_in_one_pass=engine.models.is_one_pass)
    positions = engine.slots * engine.max_length
    metrics.watch(
        lambda: scheduler.running, lambda: scheduler.waiting, lambda: scheduler.cached / positions, engine.slots
    )
    return create_app(Service(served, scheduler, Worker(scheduler), metrics, _REQUEST_TIMEOUT.value, _api_key()))


def _mode(loaded) -> str:
    """Of requests that do not say."""
    from kforcing_jax.decoding.passes import Models

    student, teacher = (pair and pair[0] for pair in (loaded.student, loaded.teacher))
    possible = Models(student, teacher, loaded.k).modes
    if _MODE.value not in (None, *possible):
        raise ConfigError(f"--mode={_MODE.value} is not possible with what is loaded: {', '.join(possible)}")
    if "student" not in possible:
        cli.refuse_flags(["k", "confidence"], "without a student")
    return _MODE.value or possible[0]


def _template(loaded):
    from kforcing_jax.data.chat_template import ChatTemplate

    if _CHAT_TEMPLATE.value:
        if loaded.tokenizer is None:
            raise ConfigError("--chat_template has no effect without a tokenizer; give --tokenizer")
        return ChatTemplate.load(expanded(_CHAT_TEMPLATE.value)).of(loaded.tokenizer)
    of_model = loaded.tokenizer.of_model if loaded.tokenizer else None
    # Beside the data of a run it is the one of training, which need not be that of the model.
    found = ChatTemplate.find(loaded.tokenizer_folder) if loaded.tokenizer_folder else None
    if found is None and of_model and of_model.chat_template:
        found = ChatTemplate(of_model.chat_template)
    return found.of(loaded.tokenizer) if found and of_model else found


def _engine(loaded: Loaded):
    """One with weights of its own, for texts as long as they may be."""
    from kforcing_jax.decoding import Engine

    length = _MAX_LENGTH.value or loaded.seq_len
    if length is None:
        raise ConfigError("--max_length is missing: nothing says how long the texts of this checkpoint are")
    if loaded.seq_len and length > loaded.seq_len:
        raise ConfigError(f"--max_length={length} exceeds the {loaded.seq_len} tokens of the texts of training")
    mesh = _mesh(*(pair[0].cfg for pair in (loaded.student, loaded.teacher) if pair is not None))
    settings: dict[str, Any] = {"student": loaded.student, "teacher": loaded.teacher, "max_length": length}
    settings |= {"k": loaded.k, "dtype": _DTYPE.value, "mesh": mesh, "exact_windows": _EXACT_WINDOWS.value}
    return Engine(**settings)


def _with_slots(engine):
    """The engine with those of --slots, or as many as fit."""
    import jax

    from kforcing_jax.decoding.memory import slots_that_fit

    if _SLOTS.value:
        return engine.with_slots(_SLOTS.value)
    _LOG.info("compiling for as many slots as fit")
    most = _MOST_SLOTS_ON_A_CPU if jax.default_backend() == "cpu" else _MOST_SLOTS
    return engine.with_slots(slots_that_fit(engine.with_slots, most))


def _warm_up(engine):
    """Compiles all programs, and says what they took and what is left."""

    def told(key, seconds):
        words = ["scored" if part is True else str(part) for part in key]
        _LOG.info(f"compiled {' '.join(words):<30} {seconds:6.1f} s")

    engine.warm_up(told=told)
    memory = engine.memory
    left = "" if memory.left is None else f", {_mb(memory.left)} left"
    _LOG.info(
        f"memory of a device: weights {_mb(memory.weights)}, slots and their caches {_mb(memory.caches)}, "
        f"programs {_mb(memory.programs)}{left}"
    )
    window = f", windows of up to {engine.models.k}" if "student" in engine.modes else ""
    _LOG.info(f"{engine.slots} slots of {engine.max_length} tokens, modes {', '.join(engine.modes)}{window}")


def _mb(count: int) -> str:
    return f"{count / 1e6:,.0f} MB"


if __name__ == "__main__":
    cli.run(main)
