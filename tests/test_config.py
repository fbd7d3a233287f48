"""Every configuration that cannot run is refused with the field, its value and what would be right."""

import ml_collections
import pytest

from kforcing_jax.config import (
    BackboneConfig,
    Config,
    DataConfig,
    EvaluationConfig,
    LoggingConfig,
    MeshConfig,
    StageConfig,
    check_tau,
    default_config,
    default_stage,
    parse,
    stage_name,
)
from kforcing_jax.errors import ConfigError

STAGES = {"ar": {}, "k1": {"window": 1}, "k2": {"window": 2}}


def valid(**changes):
    """A plain configuration, `group__field=value` changed."""
    config = {"stages": {name: dict(fields) for name, fields in STAGES.items()}}
    for path, value in changes.items():
        *groups, field = path.split("__")
        fields = config
        for group in groups:
            fields = fields.setdefault(group, {})
        fields[field] = value
    return config


def message(config):
    with pytest.raises(ConfigError) as error:
        parse(config)
    return str(error.value)


def test_the_defaults_with_stages_added_round_trip():
    config = default_config()
    config.stages = {"ar": default_stage(steps=7), "k1": default_stage(window=1)}
    assert parse(config) == Config(stages={"ar": StageConfig(steps=7), "k1": StageConfig(window=1)})


def test_every_group_of_the_defaults_is_its_dataclass():
    config = parse(valid())
    assert config.data == DataConfig()
    assert config.model == BackboneConfig()
    assert config.mesh == MeshConfig()
    assert config.evaluation == EvaluationConfig()
    assert config.logging == LoggingConfig()


def test_changed_fields_arrive():
    config = parse(valid(seed=3, data__seq_len=128, model__num_layers=2, stages__k2__learning_rate=1))
    assert (config.seed, config.data.seq_len, config.model.num_layers) == (3, 128, 2)
    assert config.stages["k2"].learning_rate == 1.0
    assert isinstance(config.stages["k2"].learning_rate, float)


def test_the_default_config_refuses_a_misspelt_assignment():
    with pytest.raises(AttributeError):
        default_config().sede = 1
    with pytest.raises((AttributeError, KeyError)):
        default_stage(widow=2)


def test_parsing_leaves_the_given_configuration_as_it_was():
    config = valid()
    parse(config)
    assert config == valid()


def test_a_stage_from_the_ar_teacher_is_named_with_hyphens():
    config = parse(valid(stages__k2_from_ar={"window": 2, "teacher": "ar"}))
    assert list(config.stages) == ["ar", "k1", "k2", "k2-from-ar"]
    assert stage_name("k4_from_ar") == "k4-from-ar"


def test_students_are_ordered_by_window_and_previous_before_ar():
    stages = {
        "k2_from_ar": {"window": 2, "teacher": "ar"},
        "k2": {"window": 2},
        "k1": {"window": 1},
        "ar": {},
    }
    assert list(parse({"stages": stages}).students) == ["k1", "k2", "k2-from-ar"]


# What is changed, and what the message says of it: the field, the value, and what would be right.
REFUSED = [
    ({"seed": -1}, "seed = -1 is not in [0, 2^32)"),
    ({"seed": 2**32}, "seed = 4294967296 is not in [0, 2^32)"),
    (
        {"data__source": "web"},
        "data.source = 'web' is not one of news, text_files, chat, lm1b, markov, nor module:class of a source of your "
        "own",
    ),
    (
        {"data__tokenizer": "words"},
        "data.tokenizer = 'words' is not one of characters, bpe, bert-base-uncased, gpt2; "
        "a path or another name on the hub has a /",
    ),
    ({"data__packing": "framed", "data__seq_len": 2}, "data.seq_len = 2 should be at least 3"),
    (
        {"data__validation_documents": 9},
        'data.validation_documents = 9 is for data.source = "text_files"; "news" does without',
    ),
    ({"stages__k1__checkpoint": "a.ckpt"}, "stages.k1.checkpoint = 'a.ckpt': only stages.ar can be a released file"),
    ({"data__seq_len": 1}, "data.seq_len = 1 should be at least 2"),
    ({"data__vocab_size": 4}, "data.vocab_size = 4 should be at least 5"),
    ({"data__markov_states": 1}, "data.markov_states = 1 should be at least 2"),
    ({"data__markov_rows": 1}, "data.markov_rows = 1 should be at least 2"),
    ({"data__markov_concentration": 0.0}, "data.markov_concentration = 0.0 should be positive and finite"),
    ({"data__validation_fraction": 0.0}, "data.validation_fraction = 0.0 is not between 0 and 1"),
    ({"data__validation_fraction": 1.0}, "data.validation_fraction = 1.0 is not between 0 and 1"),
    ({"data__source": "text_files"}, 'data.path is empty; data.source = "text_files" needs a file, a folder or a glob'),
    ({"model__num_layers": 0}, "model.num_layers = 0 should be at least 1"),
    ({"model__d_model": 0}, "model.d_model = 0 should be at least 1"),
    ({"model__num_heads": 0}, "model.num_heads = 0 should be at least 1"),
    ({"model__num_heads": 3}, "model.d_model = 128 is not divisible by model.num_heads = 3"),
    ({"model__d_model": 12}, "model.d_model / model.num_heads = 3 is odd; rotary positions need an even head width"),
    ({"model__adapter_rank": -2}, "model.adapter_rank = -2 should be at least -1"),
    ({"model__weights_dtype": "float16"}, "model.weights_dtype = 'float16' is not one of float32, bfloat16"),
    (
        {"model__weights_dtype": "bfloat16", "model__adapter_rank": 8},
        'model.weights_dtype = "bfloat16" should be "float32": weights are trained here; only those of a '
        "stages.ar.checkpoint, or of a stages.ar.init_from with stages.ar.steps = 0, stay as they are, with gated "
        "students (model.adapter_rank)",
    ),
    ({"stages__k1__teacher": "both"}, "stages.k1.teacher = 'both' is not one of previous, ar"),
    (
        {"stages__ar__schedule": "step"},
        "stages.ar.schedule = 'step' is not one of constant, cosine, linear, wsd, nor module:attribute of a schedule "
        "of your own",
    ),
    (
        {"stages__ar__optimizer": "sgd"},
        "stages.ar.optimizer = 'sgd' is not one of adamw, muon, nor module:attribute of an optimizer of your own",
    ),
    (
        {"stages__ar__loss": "my:focal"},
        "stages.ar.loss = 'my:focal' has no effect: it is part of the objective distillation; leave it out",
    ),
    (
        {"stages__k1__loss": "my:focal", "stages__k1__objective": "my:whole"},
        "stages.k1.loss = 'my:focal' has no effect: it is part of the objective distillation; leave it out",
    ),
    (
        {"stages__ar__objective": "distillation"},
        'stages.ar.objective = "distillation" should be "language_modelling", or module:function of your own',
    ),
    (
        {"stages__k1__objective": "language_modelling"},
        'stages.k1.objective = "language_modelling" should be "distillation", or module:function of your own',
    ),
    ({"stages__k1__decay_fraction": 1.5}, "stages.k1.decay_fraction = 1.5 is not in [0, 1]"),
    ({"stages__k1__rest_rate": 0.0}, "stages.k1.rest_rate = 0.0 should be positive and finite"),
    ({"stages__k1__steps": 0}, "stages.k1.steps = 0 should be at least 1"),
    (
        {"stages__ar__checkpoint": "a.ckpt", "stages__ar__init_from": "runs/a"},
        "stages.ar.checkpoint and stages.ar.init_from are both given; give one of them",
    ),
    ({"logging__keep_newest": 0}, "logging.keep_newest = 0 should be at least 1"),
    (
        {"logging__checkpoint_seconds": -1.0},
        "logging.checkpoint_seconds = -1.0 should be zero or positive, and finite",
    ),
    ({"stages__k2__steps": 0}, "stages.k2.steps = 0 should be at least 1"),
    ({"stages__k2__batch_size": 0}, "stages.k2.batch_size = 0 should be at least 1"),
    ({"stages__k2__warmup_steps": -1}, "stages.k2.warmup_steps = -1 should be at least 0"),
    ({"stages__ar__learning_rate": 0.0}, "stages.ar.learning_rate = 0.0 should be positive and finite"),
    ({"stages__ar__learning_rate": float("nan")}, "stages.ar.learning_rate = nan should be positive and finite"),
    ({"stages__ar__epsilon": -1.0}, "stages.ar.epsilon = -1.0 should be positive and finite"),
    ({"stages__ar__clip_norm": float("inf")}, "stages.ar.clip_norm = inf should be positive and finite"),
    ({"stages__ar__beta1": 1.0}, "stages.ar.beta1 = 1.0 is not in [0, 1)"),
    ({"stages__ar__beta2": -0.1}, "stages.ar.beta2 = -0.1 is not in [0, 1)"),
    ({"stages__ar__ema_decay": 1.0}, "stages.ar.ema_decay = 1.0 is not in [0, 1)"),
    ({"stages__ar__bfloat16_fraction": 1.5}, "stages.ar.bfloat16_fraction = 1.5 is not in [0, 1]"),
    ({"stages__k1__tau_min": 0.0}, "stages.k1.tau_min = 0.0 is not in [1e-6, 1000]"),
    ({"stages__k1__tau_max": 2000.0}, "stages.k1.tau_max = 2000.0 is not in [1e-6, 1000]"),
    ({"stages__k1__tau_min": 2.0}, "stages.k1.tau_min = 2.0 is above stages.k1.tau_max = 1.0"),
    (
        {"stages__k1__tau_min": 0.5, "stages__k2__tau_min": 0.4},
        "stages.k2.tau_min, tau_max = 0.4, 1.0 should be within those of its teacher, "
        "stages.k1.tau_min, tau_max = 0.5, 1.0",
    ),
    ({"stages__k1__top_p": 0.0}, "stages.k1.top_p = 0.0 is not in (0, 1]"),
    ({"stages__k1__top_p": 1.1}, "stages.k1.top_p = 1.1 is not in (0, 1]"),
    (
        {"stages__ar__top_p": 0.9},
        "stages.ar.top_p = 0.9 has no effect: it truncates what students are taught; set it there",
    ),
    (
        {"stages__k1__top_p": 0.9},
        "stages.k2.top_p = 1 should be that of stages.k1, 0.9: students are taught and compared at one",
    ),
    ({"mesh__data": 0}, "mesh.data = 0 should be at least 1"),
    ({"mesh__fsdp": -2}, "mesh.fsdp = -2 should be at least 1"),
    ({"mesh__tensor": 0}, "mesh.tensor = 0 should be at least 1"),
    ({"evaluation__batch_size": 0}, "evaluation.batch_size = 0 should be at least 1"),
    ({"evaluation__rows": 0}, "evaluation.rows = 0 should be at least 1"),
    ({"evaluation__samples": 0}, "evaluation.samples = 0 should be at least 1"),
    ({"evaluation__prompt_length": 0}, "evaluation.prompt_length = 0 should be at least 1"),
    ({"evaluation__new_tokens": 0}, "evaluation.new_tokens = 0 should be at least 1"),
    ({"evaluation__joint_contexts": 0}, "evaluation.joint_contexts = 0 should be at least 1"),
    ({"evaluation__joint_samples": 0}, "evaluation.joint_samples = 0 should be at least 1"),
    ({"evaluation__speed_batches": (8, 0)}, "evaluation.speed_batches = 0 should be at least 1"),
    (
        {"evaluation__speed_batches": ()},
        "evaluation.speed_batches is empty; it should hold at least one number of requests",
    ),
    (
        {"evaluation__speed_batches": "1,x"},
        "evaluation.speed_batches = '1,x' should be whole numbers, such as 1,8,64",
    ),
    (
        {"evaluation__confidences": "0,often"},
        "evaluation.confidences = '0,often' should be numbers, such as 0,0.3,0.5",
    ),
    ({"evaluation__confidences": [0, True]}, "evaluation.confidences = [0, True] should be numbers, such as 0,0.3,0.5"),
    ({"evaluation__confidences": (0, 1.5)}, "evaluation.confidences = 1.5 is not in [0, 1]"),
    ({"evaluation__confidences": "-0.1,0"}, "evaluation.confidences = -0.1 is not in [0, 1]"),
    ({"evaluation__confidences": float("nan")}, "evaluation.confidences = nan is not in [0, 1]"),
    (
        {"evaluation__confidences": (0.3, 0.2)},
        "evaluation.confidences = (0.3, 0.2) should ascend, each of them once",
    ),
    ({"evaluation__confidences": (0, 0.0)}, "evaluation.confidences = (0.0, 0.0) should ascend, each of them once"),
    ({"evaluation__tau": 2000.0}, "evaluation.tau = 2000.0 is not in [1e-6, 1000]"),
    (
        {"evaluation__new_tokens": 49},
        "evaluation.prompt_length + evaluation.new_tokens = 65 exceeds data.seq_len = 64, "
        "the longest context that the model is trained on",
    ),
    ({"logging__log_every": 0}, "logging.log_every = 0 should be at least 1"),
    ({"logging__checkpoint_every": 0}, "logging.checkpoint_every = 0 should be at least 1"),
    (
        {"stages__ar__window": 1},
        "stages.ar is missing or has a window; the curriculum starts from the AR teacher, window = 0",
    ),
    (
        {"stages": {"k1": {"window": 1}}},
        "stages.ar is missing or has a window; the curriculum starts from the AR teacher, window = 0",
    ),
    (
        {"stages__k1__window": 2},
        'stages.k1 has window = 2 and teacher = "previous", so it should be called k2',
    ),
    (
        {"stages__k2__teacher": "ar"},
        'stages.k2 has window = 2 and teacher = "ar", so it should be called k2_from_ar',
    ),
    (
        {"stages__warm": {}},
        'stages.warm has window = 0 and teacher = "previous", so it should be called k0',
    ),
    (
        {"stages__k8": {"window": 8}},
        "stages.k8.window = 8 does not double the window of an earlier stage; windows go 1, 2, 4, ... "
        "(others given: [1, 2]); it builds on k4, and without that goes too: stages.k8 = none",
    ),
    (
        {"stages__k3": {"window": 3}},
        "stages.k3.window = 3 does not double the window of an earlier stage; windows go 1, 2, 4, ... "
        "(others given: [1, 2])",
    ),
    (
        {"data__seq_len": 4, "evaluation__prompt_length": 1, "evaluation__new_tokens": 1}
        | {f"stages__k{k}": {"window": k} for k in (4, 8)},
        "stages.k8.window = 8 is longer than data.seq_len = 4",
    ),
]


@pytest.mark.parametrize("changes, expected", REFUSED, ids=[expected[:50] for _, expected in REFUSED])
def test_a_bad_value_is_refused_by_name_with_what_would_be_right(changes, expected):
    assert message(valid(**changes)) == expected


@pytest.mark.parametrize(
    "changes, expected",
    [
        ({"seed": "1"}, "seed = '1' should be of type int"),
        ({"seed": True}, "seed = True should be of type int"),
        ({"model__d_model": 128.0}, "model.d_model = 128.0 should be of type int"),
        ({"data__source": 3}, "data.source = 3 should be of type str"),
        ({"stages__ar__learning_rate": "1e-4"}, "stages.ar.learning_rate = '1e-4' should be of type float"),
        ({"stages__ar__learning_rate": True}, "stages.ar.learning_rate = True should be of type float"),
        ({"stages__ar__skip_after_eos": 1}, "stages.ar.skip_after_eos = 1 should be of type bool"),
        ({"model": 3}, "model = 3 should be a group of fields"),
        ({"stages__k2": 5}, "stages.k2 = 5 should be a group of fields"),
    ],
)
def test_a_value_of_the_wrong_type_is_refused_by_name(changes, expected):
    assert message(valid(**changes)) == expected


@pytest.mark.parametrize(
    "changes, expected",
    [
        (
            {"model__num_layer": 6},
            "model.num_layer is not a field of the configuration; did you mean model.num_layers?",
        ),
        (
            {"stages__k2__learning_rat": 1.0},
            "stages.k2.learning_rat is not a field of the configuration; did you mean stages.k2.learning_rate?",
        ),
        ({"modell": {}}, "modell is not a field of the configuration; did you mean model?"),
        (
            {"mesh__qqq": 1},
            "mesh.qqq is not a field of the configuration; known fields: data, fsdp, tensor",
        ),
    ],
)
def test_an_unknown_field_is_refused_with_the_nearest_that_exists(changes, expected):
    assert message(valid(**changes)) == expected


def test_the_ar_teacher_has_logits_and_so_teaches_every_temperature():
    parse(
        valid(
            stages__k1__tau_max=3.0, stages__k2={"window": 2, "tau_min": 0.2, "tau_max": 2.0}, stages__k1__tau_min=0.1
        )
    )


@pytest.mark.parametrize("stages", [{}, None, 3, ml_collections.ConfigDict()])
def test_a_run_without_stages_is_told_what_it_needs(stages):
    assert message({"stages": stages}) == 'stages is empty; a run needs at least stages = {"ar": default_stage(...)}'
    assert message(default_config()) == message({"stages": stages})


@pytest.mark.parametrize("tau", [0.0, 9e-7, -1.0, 1000.5, float("nan"), float("inf")])
def test_a_temperature_outside_its_range_is_refused_by_name(tau):
    with pytest.raises(ConfigError, match=rf"request.tau = {tau} is not in \[1e-6, 1000\]"):
        check_tau("request.tau", tau)


@pytest.mark.parametrize("tau", [1e-6, 1.0, 1000.0])
def test_a_temperature_inside_its_range_is_accepted(tau):
    check_tau("request.tau", tau)


@pytest.mark.parametrize("given", [[1, 8], (1, 8), "1,8", "1, 8"])
def test_whole_numbers_come_from_json_a_file_or_a_flag(given):
    assert parse(valid(evaluation__speed_batches=given)).evaluation.speed_batches == (1, 8)


@pytest.mark.parametrize(
    ("given", "expected"), [([0, 0.3], (0.0, 0.3)), ("0, 0.3", (0.0, 0.3)), (0.3, (0.3,)), ("", ()), ([], ())]
)
def test_numbers_come_from_json_a_file_or_a_flag_and_there_may_be_none(given, expected):
    confidences = parse(valid(evaluation__confidences=given)).evaluation.confidences
    assert confidences == expected and all(type(confidence) is float for confidence in confidences)
