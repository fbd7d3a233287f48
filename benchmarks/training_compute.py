"""What more training buys: block agreement, and NLL at fixed tokens per pass, against training compute.

    python benchmarks/training_compute.py --workdirs=runs/tiny,runs/tiny-x4,runs/news --plot=compute.svg

Compute is that of a student's whole ancestry: the FLOPs of every step of the teacher, of its predecessors and of its
own (training/flops.py). NLL is told as what it is above that of the run's own AR samples, since runs with other
vocabularies have other tokens; at so many tokens per pass it is interpolated along the confident strides of the
largest student.
"""

import json

import numpy as np
from absl import app, flags

from kforcing_jax.config import Config, predecessors
from kforcing_jax.evaluation.plots import PALETTE, new_figure
from kforcing_jax.training.flops import step_flops
from kforcing_jax.workdir import Workdir

_WORKDIRS = flags.DEFINE_list("workdirs", None, "Evaluated runs.", required=True)
_PLOT = flags.DEFINE_string("plot", None, "Where to draw it (.svg or .png).")
_OUTPUT = flags.DEFINE_string("output", None, "Where the figures go, as JSON; they are printed in any case.")

# Tokens per pass at which NLL is compared.
_PASSES = (2.0, 2.5, 3.0)


def training_flops(config: Config, name: str, vocab_size: int) -> float:
    """FLOPs of a stage and of all that it was made from."""
    stages, waiting = set(), [name]
    while waiting:
        stage = waiting.pop()
        stages.add(stage)
        waiting.extend({parent for parent in predecessors(config, stage) if parent} - stages)
    return sum(config.stages[stage].steps * step_flops(config, stage, vocab_size) for stage in stages)


def at_passes(strides: list[dict], tokens_per_pass: float) -> float | None:
    """NLL at so many tokens per pass, between the two measured strides around it; None beyond them."""
    points = sorted((stride["tokens_per_pass"], stride["sample_nll"]) for stride in strides)
    passes, nll = zip(*points, strict=True)
    return float(np.interp(tokens_per_pass, passes, nll)) if passes[0] <= tokens_per_pass <= passes[-1] else None


def figures(path: str) -> dict:
    """What the plot shows of one run."""
    workdir = Workdir(path)
    stages, vocab_size = workdir.summary()["stages"], workdir.tokenizer().vocab_size
    students = [name for name in workdir.config.students if "block_agreement" in stages.get(name, {})]
    found = {
        name: {
            "flops": training_flops(workdir.config, name, vocab_size),
            "block_agreement": stages[name]["block_agreement"],
            "nll_above_ar": stages[name]["sample_nll"] - stages["ar"]["sample_nll"],
            "entropy_above_ar": stages[name]["sample_entropy"] - stages["ar"]["sample_entropy"],
        }
        for name in students
    }
    for name in students:
        if strides := stages[name].get("confident"):
            at = {passes: at_passes(strides, passes) for passes in _PASSES}
            above = {f"{p:g}": nll and nll - stages["ar"]["sample_nll"] for p, nll in at.items()}
            found[name]["nll_above_ar_at_passes"] = above
    return {"run": workdir.path.name, "vocab_size": vocab_size, "students": found}


def draw(path: str, runs: list[dict]):
    """Two panels, a line per window or number of tokens per pass, a point per run."""
    with new_figure(8.6, 3.2) as figure:
        left, right = figure.subplots(1, 2)
        windows = dict.fromkeys(name for run in runs for name in run["students"])
        for (name, colour), marker in zip(zip(windows, PALETTE, strict=False), "os^Dv<", strict=False):
            points = [
                (run["students"][name]["flops"], run["students"][name]["block_agreement"]) for run in _with(runs, name)
            ]
            left.plot(*zip(*points, strict=True), marker=marker, color=colour, label=name)
        for passes, colour, marker in zip(_PASSES, PALETTE, "os^", strict=False):
            points = _at(runs, f"{passes:g}")
            if points:
                right.plot(*zip(*points, strict=True), marker=marker, color=colour, label=f"{passes:g} tokens per pass")
        left.set_title("block agreement with AR", loc="left", fontsize="medium")
        right.set_title("NLL of samples above AR's, nats per token", loc="left", fontsize="medium")
        right.axhline(0, color="#888888", linewidth=0.8)
        left.set_ylim(0)
        for axes in (left, right):
            axes.set_xscale("log")
            axes.set_xlabel("training compute, FLOPs")
            axes.legend()
            _name_runs(axes, runs)
        figure.savefig(path, metadata={"Date": None} if path.endswith(".svg") else None)


def _with(runs, name):
    return [run for run in runs if name in run["students"]]


def _at(runs, passes) -> list[tuple[float, float]]:
    """(FLOPs, NLL) of the largest student of every run that has it."""
    found = []
    for run in runs:
        for student in run["students"].values():
            if (nll := student.get("nll_above_ar_at_passes", {}).get(passes)) is not None:
                found.append((student["flops"], nll))
    return found


def _name_runs(axes, runs):
    """At the top, where the compute of each run's largest student is."""
    above = axes.secondary_xaxis("top")
    above.set_xscale("log")
    ticks = [max(student["flops"] for student in run["students"].values()) for run in runs]
    above.set_xticks(ticks, [run["run"] for run in runs], fontsize="small")
    above.minorticks_off()


def main(_):
    runs = [figures(path) for path in _WORKDIRS.value]
    for run in runs:
        for name, student in run["students"].items():
            at = student.get("nll_above_ar_at_passes", {})
            shown = "  ".join(f"{passes}: {nll:+.3f}" for passes, nll in at.items() if nll is not None)
            print(
                f"{run['run']:<12} {name:<4} {student['flops']:.2e} FLOPs  block {student['block_agreement']:.3f}  "
                f"NLL {student['nll_above_ar']:+.3f}  entropy {student['entropy_above_ar']:+.3f}  {shown}"
            )
    if _OUTPUT.value:
        with open(_OUTPUT.value, "w", encoding="utf-8") as file:
            json.dump(runs, file, indent=1)
    if _PLOT.value:
        draw(_PLOT.value, runs)


if __name__ == "__main__":
    app.run(main)
