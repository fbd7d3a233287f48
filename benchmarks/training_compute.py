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
_PASSES = (3.5, 4.0, 5.0)
# Of markers, by the dashes of the line; None is its colour.
_FACES = {"-": None, "--": "white", ":": "lightgrey"}
_STYLES = tuple(zip(PALETTE, "os^Dv<", strict=False))


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
    """Two panels; lines join runs of one vocabulary, whose tokens are the same."""
    with new_figure(8.6, 3.4) as figure:
        left, right = figure.subplots(1, 2)
        for vocab_size, dashes in zip(sorted({run["vocab_size"] for run in runs}), ("-", "--", ":"), strict=False):
            alike = [run for run in runs if run["vocab_size"] == vocab_size]
            for name, (colour, marker) in zip(_students(alike), _STYLES, strict=False):
                style = dict(color=colour, marker=marker, linestyle=dashes, markerfacecolor=_FACES[dashes] or colour)
                style["label"] = f"{name}, V = {vocab_size:,}"
                points = [run["students"][name] for run in alike if name in run["students"]]
                left.plot(*_points(points, lambda student: student["block_agreement"]), **style)
            for passes, (colour, marker) in zip(_PASSES, _STYLES, strict=False):
                style = dict(color=colour, marker=marker, linestyle=dashes, markerfacecolor=_FACES[dashes] or colour)
                style["label"] = f"{passes:g}, V = {vocab_size:,}"
                points = [run["students"][name] for run in alike for name in run["students"]]
                right.plot(*_points(points, lambda student, p=f"{passes:g}": _above(student, p)), **style)
        left.set_title("block agreement with AR", loc="left", fontsize="medium")
        right.set_title("NLL above AR's, at so many tokens per pass", loc="left", fontsize="medium")
        right.axhline(0, color="#888888", linewidth=0.8)
        left.set_ylim(0)
        for axes in (left, right):
            axes.set_xscale("log")
            axes.xaxis.set_major_formatter(lambda flops, _: f"{flops:.0e}")
            axes.xaxis.set_minor_formatter(lambda flops, _: "")
            axes.set_xlabel("training compute, FLOPs")
            axes.legend(fontsize="x-small", loc="center left", bbox_to_anchor=(1, 0.5))
            axes.set_xlim(*_around(runs))
            _name_runs(axes, runs)
        figure.savefig(path, metadata={"Date": None} if path.endswith(".svg") else None)


def _around(runs) -> tuple[float, float]:
    flops = [student["flops"] for run in runs for student in run["students"].values()]
    return min(flops) / 1.6, max(flops) * 1.6


def _students(runs) -> list[str]:
    return list(dict.fromkeys(name for run in runs for name in run["students"]))


def _above(student, passes) -> float | None:
    return student.get("nll_above_ar_at_passes", {}).get(passes)


def _points(students, value) -> tuple[list[float], list[float]]:
    """(FLOPs, values) of the students that have one, by rising compute."""
    found = sorted((student["flops"], value(student)) for student in students if value(student) is not None)
    return [flops for flops, _ in found], [y for _, y in found]


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
