"""Do values chosen per layer beat one everywhere, at equal size? Perplexity and KL of both, really carried out.

    python benchmarks/mixed_bits.py CHECKPOINT --calibration FILE --evaluation FILE [--using linear gptq]
                                    [--values 2 3 4 8] [--average 3 4] [--threads N]

Values are bits of a pass that quantizes, and sparsities of one that removes weights. For each pass of --using, the
costs of all --values in every layer are measured once, as `auto` measures them. For each average, values are chosen
that take no more bytes than the uniform one (between two that were priced, no more than the interpolated bytes); both
checkpoints are written to a scratch folder and evaluated on the same windows. `predicted` is the sum
of the costs, to be compared with the measured KL. On a CPU without bfloat16 arithmetic give a checkpoint in float32.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections import Counter
from pathlib import Path

from _common import machine, megabytes, table

FIGURES = ("weight files", "perplexity", "KL, nats", "predicted")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("checkpoint")
    parser.add_argument("--calibration", required=True, help="a text file")
    parser.add_argument("--evaluation", required=True, help="a text file")
    parser.add_argument("--using", nargs="+", default=["linear", "gptq"], help="passes")
    parser.add_argument("--values", type=float, nargs="+", help="to choose from; default: as auto")
    parser.add_argument("--average", type=float, nargs="+", default=[3, 4], help="within those to choose from")
    parser.add_argument("--threads", type=int, help="CPU threads; default: torch's own choice")
    options = parser.parse_args()

    import torch

    from effcli.reports.sensitivity import Value, Varied, valued
    from effcli.run import pipeline
    from effcli.run.overrides import parse_pass
    from effcli.run.recipe import PassStep, Recipe, from_arguments
    from effcli.search.inspect import inspect
    from effcli.search.space import SPACES, option_of
    from effcli.search.stage import with_values
    from effcli.search.values import Assignments

    if options.threads is not None:
        torch.set_num_threads(options.threads)
    rows: list[list[str]] = []

    def recipe(using: str, option: Varied, value: Value) -> Recipe:
        ((name, own),) = parse_pass(using).items()
        step = {name: {**own, option: value}}
        return from_arguments(options.checkpoint, passes=[step], calib=options.calibration, evals=[options.evaluation])

    def carried_out(base: Recipe, step: PassStep, title: list[str], predicted: str) -> None:
        with tempfile.TemporaryDirectory(prefix="effcli-mixed-") as scratch:
            run = base.model_copy(update={"passes": (step,), "output": str(Path(scratch) / "out")})
            stage = pipeline.run(run).stages[-1]
            quality = stage.quality
            assert quality is not None and quality.perplexity is not None and quality.kl is not None
            figures = [megabytes(stage.nbytes), f"{quality.perplexity:.2f}", f"{quality.kl:.4f}", predicted]
        rows.append([*title, *figures])
        print(table(["pass", "average", "layers", *FIGURES], rows), flush=True)

    for using in options.using:
        option = option_of(next(iter(parse_pass(using))), PassStep.registry)
        values = sorted(options.values or SPACES[option].defaults)
        recipes = {value: recipe(using, option, int(value) if option == "bits" else value) for value in values}
        base = recipes[min(recipes)]
        started = time.perf_counter()
        found = inspect(list(recipes.values()), option)
        print(f"{using}: costs by {found.way} in {time.perf_counter() - started:.0f} s", flush=True)
        assignments = Assignments(found)
        uniform = assignments.uniform
        for average in options.average:
            if not min(recipes) <= average <= max(recipes):
                raise SystemExit(f"--average {average:g}: outside of {min(recipes)} to {max(recipes)}")
            chosen = assignments.frontier.at(assignments.nbytes(average))
            taken = assignments.values(chosen)
            counts = ", ".join(f"{count} of {value:g}" for value, count in sorted(Counter(taken.values()).items()))
            step = with_values(base.passes[0], option, taken)
            carried_out(base, step, [using, f"{average:g}", f"auto: {counts}"], f"{chosen.cost:.4f}")
            if average in uniform:
                alike, cost = recipes[average].passes[0], f"{uniform[average].cost:.4f}"
                carried_out(base, alike, [using, f"{average:g}", f"{valued(option, average)} everywhere"], cost)
    print(machine(options.threads))


if __name__ == "__main__":
    main()
