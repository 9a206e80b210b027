#!/usr/bin/env python
"""Kill runs at random moments, give the same command again, and compare every byte with a run that nobody killed.

    python scripts/kill_campaign.py                        50 moments of a language run, of a graph run, of a search
    python scripts/kill_campaign.py --runs graph --seed 7  one of the three, other moments
    python scripts/kill_campaign.py --at files             kill between two changes of the file system instead
    python scripts/kill_campaign.py --at end --count 9     before each of the last nine changes
    python scripts/kill_campaign.py --over --at place      while the output of another run is replaced
    python scripts/kill_campaign.py --only graph:files:7:3 one moment again, with what effcli said

Every run is a process group of its own that gets SIGKILL. The first kill of a moment is uniform over the duration of a
whole run, or over its changes of the file system; some moments kill the resumed run as well. Then the same command runs
until it ends by itself. Of its output everything counts except times and memory: `seconds` and `peak_memory` of the
stages and the `phases` in report.json, their figures in README.md and report.html, and the `seconds` of a search. Exit
1 where a run was refused, where its output was different, where anything else was left beside it, or where a kill left
neither the former output nor the new one.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import importlib
import io
import json
import os
import random
import re
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["HF_HUB_OFFLINE"] = "1"
# The checkout's own folders `passes` and `kernels` must not be found as packages.
sys.path[:] = [entry for entry in sys.path if Path(entry or ".").resolve() != Path(__file__).resolve().parents[1]]

OUT = "out"
COUNTS = ("refused", "different", "left over", "lost", "resumed", "anew", "done before")
BAD = COUNTS[:4]
GOING_ON = "going on from the last written block"
# Of a resumed run, how many are killed too, and how many kills there are at most.
_AGAIN = 0.4
_KILLS = 4
# Every call that changes a name or begins to write a file, as CPython tells it to audit hooks.
_CHANGES = {"os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.truncate", "os.link", "os.symlink"}


def make_bases(folder: Path, runs: list[str]) -> None:
    """A tiny language model and a tiny graph in `folder`, with random weights, and data for both."""
    import numpy as np
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from effcli.files import locate as samples

    folder.mkdir(parents=True)
    torch.manual_seed(0)
    if {"language", "search"} & set(runs):
        config = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 3, "num_attention_heads": 2}
        config |= {"num_key_value_heads": 2, "max_position_embeddings": 128, "vocab_size": 1024, "bos_token_id": 0}
        LlamaForCausalLM(LlamaConfig(**config, eos_token_id=0)).save_pretrained(folder / "lm")
        for file in samples.resolve("sample:lm").glob("tokenizer*"):
            shutil.copy(file, folder / "lm")
        text = samples.EVALUATION_TEXT.read_text(encoding="utf-8")[:3000]
        (folder / "text.txt").write_text(text, encoding="utf-8")
        question = json.dumps({"query": "the king is", "choices": [" good", " bad"], "gold": 0})
        (folder / "q.jsonl").write_text(f"{question}\n" * 3, encoding="utf-8")
    if "graph" in runs:
        network = torch.nn.Sequential(
            torch.nn.Conv2d(3, 4, 3, padding=1),
            torch.nn.BatchNorm2d(4),
            torch.nn.ReLU(),
            torch.nn.Conv2d(4, 8, 3, padding=1),
            torch.nn.ReLU(),
            torch.nn.AdaptiveAvgPool2d(1),
            torch.nn.Flatten(),
            torch.nn.Linear(8, 4),
        ).eval()
        batch = torch.export.Dim("batch")
        exported = torch.export.export(network, (torch.zeros(2, 3, 8, 8),), dynamic_shapes=({0: batch},))
        torch.export.save(exported, folder / "net.pt2")
        images = np.random.default_rng(0).standard_normal((32, 3, 8, 8)).astype(np.float32)
        np.savez(folder / "data.npz", images=images, labels=network(torch.from_numpy(images)).argmax(1).numpy())


def words_of(run: str, bases: Path) -> list[str]:
    """The command: several passes, evaluation, and exports for which the packages are there."""
    from importlib.util import find_spec

    exports: list[str] = []
    if run == "search":
        steps = ["linear:bits=8", "auto:using=gptq,bits=[2,3,4],average_bits=3,by=fisher,measured=2"]
        data = [f"--eval={bases / 'text.txt'}", "--set=calibration.length=32", "--set=calibration.samples=8"]
        data += ["--set=evaluate.length=32", "--set=evaluate.samples=8"]
        model = bases / "lm"
    elif run == "language":
        steps = ["awq:bits=4,ignore=['*.down_proj']", "gptq:bits=3", "linear:bits=8"]
        data = [f"--eval={bases / 'text.txt'}", f"--eval={bases / 'q.jsonl'}", "--set=calibration.length=32"]
        data += ["--set=calibration.samples=16", "--set=evaluate.length=32", "--set=evaluate.samples=8"]
        model = bases / "lm"
        # Not to onnx: nine tenths of the time would be spent in torch's own exporter.
        exports = ["--export=safetensors:dequantize=true"]
    else:
        steps, model = ["fold", "adaround:bits=4,iterations=60", "int8"], bases / "net.pt2"
        data = [f"--calib={bases / 'data.npz'}", f"--eval={bases / 'data.npz'}"]
        exports = ["--export=c"]
        if find_spec("onnx") and find_spec("onnxruntime"):
            exports.append("--export=onnx")
    passes = [f"--pass={step}" for step in steps]
    end = ["--set=evaluate.latency=false", "--threads=1", "-o", OUT]
    return ["compress", str(model), *passes, *data, *exports, *end]


@dataclasses.dataclass(frozen=True)
class Ended:
    """How a process ended. seconds: how long it ran; code: its exit code, None where it was killed."""

    seconds: float
    code: int | None
    said: str
    counted: dict[str, Any]


def run(
    words: list[str], folder: Path, *, seconds: float | None = None, change: int | None = None, count: bool = False
) -> Ended:
    """Run effcli in `folder` as a process group of its own, killed after `seconds` or before its n-th `change`.

    count: count the changes of the file system, for which a run that is killed by time must not be slowed down, and
    name the modules that it imports.
    """
    log, counted = folder.parent / "said.txt", folder.parent / "changes.txt"
    counted.unlink(missing_ok=True)
    sys.stdout.flush()
    began = time.monotonic()
    child = os.fork()
    if child == 0:
        try:
            _carry_out(words, folder, log, counted if count else None, change)
        finally:
            os._exit(99)
    with contextlib.suppress(OSError):
        os.setpgid(child, child)
    status = None
    while status is None:
        left = None if seconds is None else began + seconds - time.monotonic()
        if left is not None and left <= 0:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(child, signal.SIGKILL)
            _, status = os.waitpid(child, 0)
            break
        found, ended = os.waitpid(child, os.WNOHANG)
        if found:
            status = ended
        else:
            time.sleep(0.002 if left is None else min(left, 0.002))
    with contextlib.suppress(ProcessLookupError):
        os.killpg(child, signal.SIGKILL)  # what it started
    code = os.waitstatus_to_exitcode(status)
    return Ended(
        time.monotonic() - began,
        None if code == -signal.SIGKILL else code,
        log.read_text(encoding="utf-8", errors="replace") if log.exists() else "",
        json.loads(counted.read_text()) if counted.exists() else {},
    )


def _carry_out(words: list[str], folder: Path, log: Path, counted: Path | None, change: int | None) -> None:
    """What the child does; it does not return."""
    os.setpgid(0, 0)
    os.chdir(folder)
    written = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o666)
    os.dup2(written, 1)
    os.dup2(written, 2)
    done = place = 0

    def look(event: str, arguments: tuple[Any, ...]) -> None:
        nonlocal done, place
        writes = event == "open" and isinstance(arguments[2], int) and arguments[2] & (os.O_WRONLY | os.O_RDWR)
        # Files elsewhere are of no use to the run that comes after.
        if (event in _CHANGES or writes) and _inside(arguments[0], folder):
            done += 1
            if event == "os.rename" and str(arguments[1]).endswith("/replaced"):
                place = done
            if done == change:
                os.killpg(0, signal.SIGKILL)

    if counted is not None or change is not None:
        sys.addaudithook(look)
    from effcli.cli import main

    code = main(words)
    sys.stdout.flush()
    sys.stderr.flush()
    total, modules = done, sorted(sys.modules)
    if counted is not None:
        counted.write_text(json.dumps({"changes": total, "place": place, "modules": modules}))
    os._exit(code)


def _inside(path: Any, folder: Path) -> bool:
    try:
        text = os.fsdecode(path)
    except TypeError:
        return False  # a descriptor
    # Removing a tree names what is in it without its folder.
    return not os.path.isabs(text) or text.startswith(str(folder))


# The table of `phases` in report.html.
_PHASES = re.compile(r"<details[^>]*><summary>Time of each phase.*?</details>", re.S)


def contents(out: Path) -> dict[str, bytes]:
    """Every file of an output by its name, times and memory taken out; folders as well."""
    found: dict[str, bytes] = {}
    for path in sorted(out.rglob("*")):
        found[str(path.relative_to(out))] = b"" if path.is_dir() else path.read_bytes()
    report = json.loads(found["report.json"])
    shown = dict(_shown(report))
    report["phases"] = None
    for stage in report["stages"]:
        stage["seconds"] = stage["peak_memory"] = None
        if stage["search"] is not None:
            stage["search"]["sensitivity"]["seconds"] = None
    found["report.json"] = json.dumps(report).encode()
    if "search.json" in found:
        search = json.loads(found["search.json"])
        search["sensitivity"]["seconds"] = None
        found["search.json"] = json.dumps(search).encode()
    for name in ("README.md", "report.html"):
        text = _PHASES.sub("", found[name].decode())
        # The longest first: one figure may be the beginning of another.
        for figure in sorted(shown, key=len, reverse=True):
            text = text.replace(figure, shown[figure])
        found[name] = text.encode()
    return found


def _shown(report: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """The figures of times and memory as a page shows them, and what stands for them."""
    from effcli.reports import units

    for number, stage in enumerate(report["stages"]):
        if stage["seconds"] is not None:
            yield units.duration(stage["seconds"]), "<time>"
            yield repr(stage["seconds"]), f"<seconds of {number}>"
        if stage["peak_memory"] is not None:
            yield units.size(stage["peak_memory"]), "<memory>"
            yield str(stage["peak_memory"]), f"<bytes of {number}>"


@dataclasses.dataclass(frozen=True)
class Whole:
    """A run that nobody killed. place: the change that moves the former output away, 0 without one."""

    words: list[str]
    seconds: float
    changes: int
    place: int
    contents: dict[str, bytes]
    former: Former | None


@dataclasses.dataclass(frozen=True)
class Former:
    """An output that stands there before, in `folder`."""

    folder: Path
    contents: dict[str, bytes]

    def put(self, here: Path) -> None:
        shutil.copytree(self.folder / OUT, here / OUT)


def former_of(name: str, bases: Path, folder: Path) -> Former:
    """The output of the same command with another seed."""
    folder.mkdir(parents=True)
    ended = run([*words_of(name, bases), "--set=seed=1"], folder)
    if ended.code:
        raise SystemExit(f"the run of the former output ends with {ended.code}: {ended.said}")
    return Former(folder, contents(folder / OUT))


def whole(name: str, bases: Path, folder: Path, over: bool = False) -> Whole:
    former = former_of(name, bases, bases / f"former-{name}" / "work") if over else None
    words = [*words_of(name, bases), *(["--overwrite"] if over else [])]
    here = folder / "work"
    found: list[dict[str, bytes]] = []
    counted: dict[str, Any] = {}
    for number in range(3):
        here.mkdir(parents=True)
        if former is not None:
            former.put(here)
        ended = run(words, here, count=number == 0)
        if ended.code:
            raise SystemExit(f"the run ends with {ended.code} when nobody kills it: {ended.said}")
        found.append(contents(here / OUT))
        shutil.rmtree(folder)
        if number == 0:
            counted = ended.counted
            preload(counted["modules"])
    differing = differences(found[1], found[2])
    if differing:
        raise SystemExit(f"two runs that nobody killed differ in {', '.join(differing)}")
    return Whole(words, ended.seconds, counted["changes"], counted["place"], found[2], former)


def preload(modules: list[str]) -> None:
    """Import here what the children import, once for all of them, so that their time is that of the work."""
    for module in modules:
        with contextlib.suppress(Exception), contextlib.redirect_stderr(io.StringIO()):
            importlib.import_module(module)


def differences(one: dict[str, bytes], other: dict[str, bytes]) -> list[str]:
    """The files that differ; of JSON also the first place that does, with both values."""
    names = sorted(name for name in one.keys() | other.keys() if one.get(name) != other.get(name))
    return [f"{name}{_place(one[name], other[name])}" if name in one.keys() & other.keys() else name for name in names]


def _place(one: bytes, other: bytes) -> str:
    """The first place where two JSON files differ; empty for other files."""
    try:
        here, there = json.loads(one), json.loads(other)
    except ValueError:
        return ""
    place = ""
    while type(here) is type(there) and isinstance(here, dict | list) and len(here) == len(there):
        keys = list(here) if isinstance(here, dict) else range(len(here))
        key = next(
            (key for key in keys if not isinstance(there, dict) or key in there if here[key] != there[key]), None
        )
        if key is None:
            break
        place, here, there = f"{place}/{key}", here[key], there[key]
    return f" at {place or '/'}: {str(here)[:200]} and {str(there)[:200]}"


def attempt(seed: str, number: int, at: str, wanted: Whole, folder: Path) -> tuple[str, list[Ended], str]:
    """Kill a run, let it end, and compare; one of COUNTS, what each process did, and what is wrong.

    "anew": the kill came before anything was written that could be continued, or when all but cleaning was done.
    """
    rng = random.Random(f"{seed}/{number}")
    here = folder / "work"
    here.mkdir(parents=True)
    if wanted.former is not None:
        wanted.former.put(here)
    ends: list[Ended] = []
    while not ends or (ends[-1].code is None and not _finished(here, wanted)):
        if ends and not _kept(here, wanted):
            return "lost", ends, "neither the former output nor the new one is whole"
        again = len(ends) < _KILLS and rng.random() < _AGAIN
        if ends and not again:
            ends.append(run(wanted.words, here))
        elif at == "end" and not ends:
            ends.append(run(wanted.words, here, change=max(wanted.changes - number, 1)))
        elif at == "place" and not ends:
            ends.append(run(wanted.words, here, change=wanted.place + number))
        elif at != "time":
            ends.append(run(wanted.words, here, change=rng.randint(1, wanted.changes)))
        else:
            ends.append(run(wanted.words, here, seconds=rng.uniform(0, wanted.seconds)))
    if len(ends) == 1:
        verdict = "done before"
    else:
        verdict = "resumed" if any(GOING_ON in end.said for end in ends[1:]) else "anew"
    if ends[-1].code:
        return "refused", ends, ends[-1].said.strip()
    differing = differences(contents(here / OUT), wanted.contents)
    if differing:
        return "different", ends, ", ".join(differing)
    beside = sorted(path.name for path in here.iterdir() if path.name != OUT)
    if beside:
        return "left over", ends, ", ".join(beside)
    return verdict, ends, ""


def _finished(here: Path, wanted: Whole) -> bool:
    """Whether a run was killed behind the last thing that it had to do: the command would find its output there."""
    if [path.name for path in here.iterdir()] != [OUT]:
        return False
    return wanted.former is None or contents(here / OUT) == wanted.contents


def _kept(here: Path, wanted: Whole) -> bool:
    """Whether a killed run has left the former output, if there was one, or has put the new one in its place."""
    if wanted.former is None:
        return True
    places = (here / OUT, here / f".{OUT}.effcli" / "replaced")
    found = [contents(path) for path in places if (path / "report.json").is_file()]
    return wanted.former.contents in found or wanted.contents in found


def main() -> int:
    """Kill as asked; 1 where a run did not end as one that nobody killed."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--count", type=int, default=50, help="moments of each run")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--runs", default="language,graph,search", help="separated by commas")
    parser.add_argument(
        "--at",
        choices=("time", "files", "end", "place"),
        default="time",
        help="what a moment is uniform over; the last changes of files; those that replace an output",
    )
    parser.add_argument("--only", metavar="RUN:AT:SEED:NUMBER", help="one moment, with what effcli says")
    parser.add_argument("--over", action="store_true", help="overwrite the output of another run")
    asked = parser.parse_args()
    if asked.at == "place" and not asked.over:
        parser.error("--at place needs --over")
    numbers = list(range(asked.count))
    if asked.only:
        asked.runs, asked.at, asked.seed, number = asked.only.split(":")
        numbers = [int(number)]
    runs = asked.runs.split(",")
    if set(runs) - {"language", "graph", "search"}:
        parser.error(f"--runs is language, graph, search or several of them, not {asked.runs}")
    # Once for all children, so that the moments fall into the work and not into imports.
    import torch

    import effcli.cli
    import effcli.exporters.c
    import effcli.graphs.network
    import effcli.language.model
    import effcli.run.pipeline  # noqa: F401

    torch.set_num_threads(1)
    table: list[tuple[str, Whole, Counter[str], int]] = []
    wrong: list[str] = []
    with tempfile.TemporaryDirectory(prefix="kill-") as temporary:
        bases = Path(temporary).resolve() / "bases"
        # In a child: torch that has computed in a process does not stand its fork.
        maker = os.fork()
        if maker == 0:
            make_bases(bases, runs)
            os._exit(0)
        if os.waitpid(maker, 0)[1]:
            raise SystemExit("the tiny networks could not be made")
        for name in runs:
            wanted = whole(name, bases, bases.parent / name, asked.over)
            counts: Counter[str] = Counter()
            kills = 0
            for number in numbers:
                folder = bases.parent / f"{name}-{number}"
                verdict, ends, why = attempt(f"{name}/{asked.seed}", number, asked.at, wanted, folder)
                counts[verdict] += 1
                kills += sum(end.code is None for end in ends)
                if verdict in BAD:
                    wrong.append(f"{name}:{asked.at}:{asked.seed}:{number}  {verdict}: {why}")
                if asked.only:
                    print("\n".join(f"{end.seconds:.2f} s, exit {end.code}\n{end.said}" for end in ends))
                shutil.rmtree(folder, ignore_errors=True)
            table.append((name, wanted, counts, kills))
    print(f"{'run':8}  seconds  changes  moments  kills  {'  '.join(COUNTS)}")
    for name, wanted, counts, kills in table:
        figures = "  ".join(f"{counts[word]:{len(word)}}" for word in COUNTS)
        print(f"{name:8}  {wanted.seconds:7.1f}  {wanted.changes:7}  {sum(counts.values()):7}  {kills:5}  {figures}")
    print("\n".join(wrong), end="\n" if wrong else "")
    return 1 if wrong else 0


if __name__ == "__main__":
    raise SystemExit(main())
