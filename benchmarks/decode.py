"""Decoding: AR, whole windows, the confident stride and exact decoding, by one engine in one process.

python benchmarks/decode.py --workdir=runs/tiny --contexts=128 --batches=1,4,16 --plot=speed.svg
python benchmarks/decode.py --shape=12,768,12,30522 --batches=1,8 --rounds=5
python benchmarks/decode.py --shape=12,768,12,30522 --rank=32 --batches=1,8 --rounds=5

The programs take turns. Timed are the passes after the prompt, which fills the context up to the new tokens. A trained
run decodes with its own stages; random weights (`--shape`: layers, width, heads, vocabulary) say nothing of how
much of a window is confident or exact: how long a pass takes is all that they tell. Beside every time stand the bytes
that a pass has to read (weights and live cache) and its FLOPs, over what this device does in a matrix product and in
reading a large array. No text ends early, so all tokens are useful ones. Exact decoding is compared with AR token by
token before any ratio is printed.

Of gated students (`--rank`, or a run that has them) exact decoding comes in all its forms: `exact`, a pass that
verifies and drafts with a window at every draft; `exact-w` with w windows; `exact-0`, which drafts and verifies in
turns; and `exact-apart`, the same by two models with weights and caches of their own. What is called a pass of the
latter two is one of either kind.
"""

import dataclasses
import datetime
import hashlib
import json
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
from absl import app, flags, logging
from device import device_text

from kforcing_jax.decoding import Engine, Request
from kforcing_jax.decoding.costs import Cost, pass_cost
from kforcing_jax.errors import RunError
from kforcing_jax.evaluation.plots import PALETTE, new_figure
from kforcing_jax.evaluation.timing import Times
from kforcing_jax.models import CausalLM, ModelConfig, PushForwardLM, init_params

_WORKDIR = flags.DEFINE_string("workdir", None, "A trained run with stage ar and students of two tokens or more.")
_SHAPE = flags.DEFINE_list("shape", None, "Random weights instead: layers, width, heads, vocabulary.")
_RANK = flags.DEFINE_integer("rank", 0, "Of the deltas of a gated student, with --shape; -1: full.", lower_bound=-1)
_WIDEST = flags.DEFINE_integer("widest", 4, "The largest window that takes part.", lower_bound=2)
_BATCHES = flags.DEFINE_list("batches", ["1", "4", "16", "64", "128", "256"], "Requests at a time.")
_CONTEXTS = flags.DEFINE_list("contexts", ["128", "1024"], "Tokens of the longest text.")
_NEW_TOKENS = flags.DEFINE_integer("new_tokens", 64, "That are timed, a multiple of 4.", lower_bound=4)
_CONFIDENCE = flags.DEFINE_float("confidence", 0.3, "Of the confident stride.")
_ROUNDS = flags.DEFINE_integer("rounds", 7, "Timed runs of each program.", lower_bound=1)
_DTYPE = flags.DEFINE_enum("dtype", "float32", ["float32", "bfloat16"], "Compute dtype of the blocks.")
_PLOT = flags.DEFINE_string("plot", None, "Where to draw speed-up against batch (.svg or .png).")
_JSON = flags.DEFINE_bool("json", False, "End with one JSON object on one line.")


@dataclasses.dataclass(frozen=True)
class Program:
    """A way to decode: models for an engine, and what its requests ask for."""

    name: str
    models: dict
    k: int
    settings: dict


def programs() -> list[Program]:
    """What takes turns."""
    ar, students = _trained() if _WORKDIR.value else _random()
    widest = max(students)
    pair = students[widest]
    found = [Program("ar", {"teacher": ar}, 1, {"mode": "ar"})]
    found += [Program(f"k{k}", {"student": pair}, k, {}) for k, pair in students.items()]
    if _WORKDIR.value:
        found.append(Program("confident", {"student": pair}, widest, {"confidence": _CONFIDENCE.value}))
    if pair[0].cfg.is_gated:
        found += _exact_forms(pair, ar, widest)
    elif _WORKDIR.value:
        found.append(Program("exact", {"student": pair, "teacher": ar}, widest, {"mode": "exact"}))
    return [dataclasses.replace(program, settings=program.settings | _drawn(program)) for program in found]


def _drawn(program) -> dict:
    """Temperature and top-p that a run's students were trained with, which are compared with its AR teacher."""
    if not _WORKDIR.value:
        return {}
    from kforcing_jax.workdir import Workdir

    config = Workdir.open(_WORKDIR.value).config
    return {"tau": config.evaluation_tau} | ({"top_p": config.top_p} if "mode" in program.settings else {})


def _exact_forms(pair, ar, k) -> list[Program]:
    """Of a gated student: by how many windows there are in a pass, and by two models."""
    exact = {"mode": "exact"}
    forms = [Program("exact", {"student": pair}, k, exact)]
    for windows in sorted({k // 2, 1, 0} - {k}, reverse=True):
        forms.append(Program(f"exact-{windows}", {"student": pair, "exact_windows": windows}, k, exact))
    apart = ar[0], jax.tree.map(jnp.copy, ar[1])
    return [*forms, Program("exact-apart", {"student": pair, "teacher": apart}, k, exact)]


def _trained():
    """The AR teacher, and the first student of every window that takes part, in order."""
    from kforcing_jax.training.checkpoints import finished_stages, load_stage
    from kforcing_jax.workdir import Workdir

    logging.set_verbosity(logging.FATAL)  # orbax reports every file
    workdir = Workdir.open(_WORKDIR.value)
    tokenizer, students = workdir.tokenizer(), {}
    for name in finished_stages(workdir):
        window = workdir.config.stages[name].window
        if 1 < window <= _WIDEST.value and window not in students:
            students[window] = load_stage(workdir, name, tokenizer)
    if not students:
        raise SystemExit(f"{_WORKDIR.value} has no finished student of 2 to {_WIDEST.value} tokens")
    model, params = students[max(students)]
    ar = (model.text_model, params) if model.cfg.is_gated else load_stage(workdir, "ar", tokenizer)
    return ar, dict(sorted(students.items()))


def _random():
    layers, width, heads, vocabulary = map(int, _SHAPE.value)
    cfg = ModelConfig(vocab_size=vocabulary, mask_id=vocabulary - 1, num_layers=layers, d_model=width, num_heads=heads)
    teacher, student = CausalLM(cfg), PushForwardLM(dataclasses.replace(cfg, adapter_rank=_RANK.value))
    student = student, init_params(student, jax.random.key(0))
    ar = teacher, student[1] if _RANK.value else init_params(teacher, jax.random.key(0))
    return ar, {k: student for k in (2, 4) if k <= _WIDEST.value}


def prompts(program: Program, batch: int, length: int) -> np.ndarray:
    """Beginnings of the run's validation text, some again when there are too few; random ids without a run."""
    if _WORKDIR.value:
        from kforcing_jax.evaluation.samples import prompts as beginnings
        from kforcing_jax.workdir import Workdir

        found = beginnings(Workdir.open(_WORKDIR.value).prepared(), batch, length)
        if found.shape[1] < length:
            raise SystemExit(f"a prompt of {length} tokens is longer than the texts of the run ({found.shape[1]})")
        return found[np.arange(batch) % len(found)]
    model, _ = program.models.get("student") or program.models["teacher"]
    return np.random.default_rng(0).integers(0, model.cfg.vocab_size - 1, (batch, length))


class Decoding:
    """One program at one size: an engine that stays, its requests, what they gave, in how many passes at most."""

    def __init__(self, program: Program, batch: int, context: int):
        self.engine = Engine(**program.models, slots=batch, max_length=context, k=program.k, dtype=_DTYPE.value)
        prompts_BxP = prompts(program, batch, context - _NEW_TOKENS.value)
        self.requests = [
            Request(prompt_P, _NEW_TOKENS.value, seed=row, **program.settings)
            for row, prompt_P in enumerate(prompts_BxP)
        ]
        self.tokens, self.passes, self.passes_of_all = [], 0, 0

    def run(self) -> float:
        """Seconds of the passes after the prompts."""
        slots = [self.engine.insert(request) for request in self.requests]
        self.engine.step(passes=0)
        start = time.perf_counter()
        updates = {update.slot: update for update in self.engine.step()}
        seconds = time.perf_counter() - start
        self.tokens = [updates[slot].tokens for slot in slots]
        passes = [updates[slot].kept[0] for slot in slots]  # each of which kept a token
        self.passes, self.passes_of_all = max(passes), sum(passes)
        return seconds


def measure(found: list[Program], batch: int, context: int, peak: Cost) -> dict:
    """Figures of all programs at one size, by name."""
    decodings = {program.name: Decoding(program, batch, context) for program in found}
    seconds = {name: [] for name in decodings}
    for index in range(_ROUNDS.value + 1):
        for name, decoding in decodings.items():
            taken = decoding.run()
            if index:  # the first one compiled
                seconds[name].append(taken)
    _check_exact(decodings)
    times = Times({name: np.array(each) for name, each in seconds.items()})
    figures = {name: _figures(name, decoding, times, context, peak) for name, decoding in decodings.items()}
    for name, each in figures.items():
        more = decodings["ar"].passes / decodings[name].passes
        each["pass_over_ar"] = {
            "time": {part: value * more for part, value in times.ratio(name, "ar").items()},
            "flops": each["flops_a_pass"] / figures["ar"]["flops_a_pass"],
            "bytes": each["bytes_a_pass"] / figures["ar"]["bytes_a_pass"],
        }
    return figures


def _check_exact(decodings):
    """Raises SystemExit when exact decoding, in any form, does not give AR's tokens."""
    ar = np.array(decodings["ar"].tokens)
    for name in [name for name in decodings if name.startswith("exact")]:
        differs = np.array(decodings[name].tokens) != ar
        if differs.any():
            parted = f"{name} decoding and AR part in {differs.any(axis=1).sum()} of {len(ar)} texts"
            if _DTYPE.value == "float32":
                raise SystemExit(parted)
            print(f"{parted}: {_DTYPE.value} rounds them differently", file=sys.stderr)


def _figures(name, decoding, times, context, peak):
    seconds, tokens = times.median(name), sum(map(len, decoding.tokens))
    a_pass = seconds / decoding.passes
    cost = pass_cost(decoding.engine.models, decoding.requests[0].mode, decoding.engine.slots, context)
    low, high = np.percentile(times.seconds[name], [25, 75])
    hashed = hashlib.sha256(np.concatenate(decoding.tokens).astype("<i4").tobytes()).hexdigest()[:16]
    return {
        "tokens_per_second": tokens / seconds,
        "tokens_per_pass": tokens / decoding.passes_of_all,
        "passes": decoding.passes,
        "milliseconds_a_pass": {
            "median": 1e3 * a_pass,
            "low": 1e3 * low / decoding.passes,
            "high": 1e3 * high / decoding.passes,
        },
        "speed_up": times.ratio("ar", name),
        "flops_a_pass": cost.flops,
        "bytes_a_pass": cost.bytes,
        "share_of_peak_flops": cost.flops / a_pass / peak.flops,
        "share_of_peak_bytes": cost.bytes / a_pass / peak.bytes,
        "tokens_sha256": hashed,
    }


def peak_of_device() -> Cost:
    """FLOP/s of a matrix product and bytes/s of a sum over a large array, measured: the better of some runs."""
    size = 1024 if jax.default_backend() == "cpu" else 8192
    square, long = jnp.ones((size, size), _DTYPE.value), jnp.ones(2**25)
    product = jax.jit(lambda x: jnp.dot(x, x, precision="highest"))
    return Cost(2 * size**3 / _fastest(product, square), long.nbytes / _fastest(jax.jit(jnp.sum), long))


def _fastest(function, argument):
    def once():
        start = time.perf_counter()
        jax.block_until_ready(function(argument))
        return time.perf_counter() - start

    return min(once() for _ in range(10))


def main(_):
    if bool(_WORKDIR.value) == bool(_SHAPE.value):
        raise app.UsageError("give one of --workdir and --shape")
    if _WORKDIR.value and _RANK.value:
        raise app.UsageError("--rank has no effect with --workdir")
    out = sys.stderr if _JSON.value else sys.stdout
    found, peak, results = programs(), peak_of_device(), []
    print(f"{device_text()}; {peak.flops / 1e9:,.0f} GFLOP/s, {peak.bytes / 1e9:.1f} GB/s", file=out)
    for context in map(int, _CONTEXTS.value):
        for batch in map(int, _BATCHES.value):
            try:
                results.append({"batch": batch, "context": context, "programs": measure(found, batch, context, peak)})
                print(_block(results[-1]), file=out, flush=True)
            except RunError as error:
                print(f"batch {batch}, context {context}: {error}", file=out, flush=True)
        print(_crossing([each for each in results if each["context"] == context], context), file=out)
    if _PLOT.value:
        _draw(results)
    if _JSON.value:
        general = {"device": device_text(), "date": datetime.date.today().isoformat(), "command": " ".join(sys.argv)}
        print(json.dumps(general | {"peak": dataclasses.asdict(peak), "results": results}))


def _block(result) -> str:
    lines = [f"batch {result['batch']}, context {result['context']}"]
    for name, figures in result["programs"].items():
        ratio, ms = figures["speed_up"], figures["milliseconds_a_pass"]
        lines.append(
            f"  {name:<12} {figures['tokens_per_second']:>10,.0f} tokens/s  {figures['tokens_per_pass']:.2f} a pass  "
            f"{ms['median']:>8.2f} ms [{ms['low']:.2f}, {ms['high']:.2f}]  "
            f"{ratio['median']:.2f}x AR [{ratio['low']:.2f}, {ratio['high']:.2f}]  a pass {_over_ar(figures)}  "
            f"{figures['share_of_peak_flops']:.0%} of FLOP/s  {figures['share_of_peak_bytes']:.0%} of bytes/s"
        )
    return "\n".join(lines)


def _over_ar(figures) -> str:
    """What a pass costs over one of AR: also the tokens that it has to give to be worth it."""
    over = figures["pass_over_ar"]
    time = over["time"]
    spread = f"[{time['low']:.2f}, {time['high']:.2f}]"
    return f"{time['median']:.2f} {spread} of AR's time, {over['flops']:.1f} FLOPs, {over['bytes']:.2f} bytes"


def _crossing(results, context) -> str:
    """From which batch on the widest window is no faster than AR."""
    widest = max((name for each in results for name in each["programs"] if name[1:].isdecimal()), default="k4")
    slower = [each["batch"] for each in results if each["programs"][widest]["speed_up"]["median"] <= 1]
    where = f"from a batch of {min(slower)} on" if slower else "at none of these batches"
    return f"context {context}: k = {widest[1:]} stops paying {where}"


def _draw(results):
    with new_figure(5.2, 3.2) as figure:
        axes = figure.subplots()
        contexts = sorted({each["context"] for each in results})
        for context, dashes in zip(contexts, ("-", "--", ":"), strict=False):
            rows = [each for each in results if each["context"] == context]
            for name, colour in zip(rows[0]["programs"], ("#555555", *PALETTE), strict=False):
                points = [(row["batch"], row["programs"][name]["speed_up"]["median"]) for row in rows]
                label = name if len(contexts) == 1 else f"{name}, {context}"
                axes.plot(*zip(*points, strict=True), dashes, color=colour, marker="o", markersize=4, label=label)
        axes.set_xscale("log", base=2)
        axes.set_xticks([row["batch"] for row in rows], [str(row["batch"]) for row in rows])
        axes.set_xlabel("requests at a time")
        axes.set_title("tokens per second over AR's", loc="left", fontsize="medium")
        axes.legend(loc="center left", bbox_to_anchor=(1, 0.5))
        figure.savefig(_PLOT.value)


if __name__ == "__main__":
    app.run(main)
