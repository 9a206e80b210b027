#!/usr/bin/env python
"""Damage valid inputs of every kind and look at how effcli ends: done, or refused with a cause, within time and memory.

    python scripts/fuzz.py --count 100                 100 inputs of every kind
    python scripts/fuzz.py --kinds yaml,onnx --seed 7  two kinds, other inputs
    python scripts/fuzz.py --only onnx:7:42            one input again, with what effcli prints

Every input depends on its kind, the seed and its number alone. Commands run in a child process, one after the other,
through `effcli.cli.main`; what ends the child or hangs in it is counted, and the next child goes on. Exit 1 where an
input gave an internal error, a crash, a hang, took too much memory, or was accepted although the format's own library
refuses it: safetensors, onnxruntime, torch, transformers, pyarrow, numpy without pickles, Pillow, json, YAML's parser.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import io
import json
import os
import random
import re
import resource
import shutil
import signal
import struct
import sys
import tempfile
import time
import zipfile
from collections import Counter
from collections.abc import Callable
from multiprocessing import get_context
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["HF_HUB_OFFLINE"] = "1"
# The checkout's own folders `passes` and `kernels` must not be found as packages.
sys.path[:] = [entry for entry in sys.path if Path(entry or ".").resolve() != Path(__file__).resolve().parents[1]]

Words = list[str]
EVALUATION = ["--length", "32", "--samples", "2"]
SHORT = ["--set=calibration.samples=2", "--set=calibration.length=32", "--no-eval", "--quiet"]
VERDICTS = ("internal error", "crash", "hang", "memory", "wrongly accepted")


def hostile(rng: random.Random) -> Any:
    """A value that is wrong almost everywhere."""
    values: list[Any] = [None, True, False, -1, 0, 1, 2, 3, 7, 1.5, -0.0, 1e308, float("nan"), float("inf"), 2**31]
    values += [2**40, 2**63, 10**29, -(2**63), "", "x", "../x", "/", "\x00", "\u202e", "\ud800", "é" * 9, "x" * 5000]
    values += [[], {}, [[]], [{}], {"": 0}, [0], [1, 2, 3], ["a"], {"a": {"b": []}}, [None, 1, "a"], [-1] * 4]
    return rng.choice(values)


def change_json(value: Any, rng: random.Random) -> Any:
    """The JSON value with one to three places replaced, removed, renamed, repeated, or exchanged with another place."""
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        places: list[tuple[Any, Any]] = []
        stack = [value]
        while stack:
            here = stack.pop()
            inside = list(here.items() if isinstance(here, dict) else enumerate(here))
            places += [(here, key) for key, _ in inside]
            stack += [below for _, below in inside if isinstance(below, dict | list) and below]
        if not places:
            return hostile(rng)
        here, key = rng.choice(places)
        way = rng.randrange(8)
        if way < 4:
            here[key] = hostile(rng)
        elif way == 4:
            del here[key]
        elif way == 5:
            there, other = rng.choice(places)
            with contextlib.suppress(KeyError, IndexError):
                here[key] = json.loads(json.dumps(there[other]))
        elif way == 6 and isinstance(here, dict):
            here[str(hostile(rng))] = here.pop(key)
        elif isinstance(here, list):
            here.extend([here[key]] * rng.choice((1, 3)))
        elif isinstance(here[key], int | float):
            here[key] = rng.choice((-here[key], here[key] + 1, here[key] * 2, here[key] / 2, here[key] * 10**9))
        else:
            here[key] = [here[key]]
    return value


def json_text(data: bytes, rng: random.Random) -> bytes:
    """A JSON file with its values changed, or now and then its text."""
    if rng.random() < 0.12:
        return change_text(data, rng)
    if rng.random() < 0.03:
        return rng.choice((b"[" * 5000 + b"]" * 5000, b'{"a":' * 300 + b"1" + b"}" * 300, b"", b"null", b"3", b"[]"))
    return json.dumps(change_json(json.loads(data), rng)).encode()


def change_bytes(data: bytes, rng: random.Random) -> bytes:
    """Bytes with one to four places damaged."""
    made = bytearray(data)
    for _ in range(rng.choice((1, 1, 2, 4))):
        if not made:
            return rng.randbytes(9)
        # Headers stand at the beginning and the end.
        at = min(int(len(made) * rng.random() ** rng.choice((1, 4))), len(made) - 1)
        at = rng.choice((at, len(made) - 1 - at))
        span = rng.choice((1, 1, 2, 4, 8, 64))
        way = rng.randrange(7)
        if way == 0:
            made[at] ^= 1 << rng.randrange(8)
        elif way == 1:
            made[at : at + span] = rng.randbytes(span)
        elif way == 2:
            made[at : at + span] = rng.choice((b"\x00", b"\xff", b"\x80", b"\x7f")) * span
        elif way == 3:
            del made[at : at + span]
        elif way == 4:
            made[at:at] = rng.randbytes(span)
        elif way == 5:
            del made[at:]
        else:
            made[at:at] = made[at : at + 16 * span]
    return bytes(made)


def change_text(data: bytes, rng: random.Random) -> bytes:
    """Text with words put in, doubled, taken out, or its bytes damaged."""
    if rng.random() < 0.2:
        return change_bytes(data, rng)
    words = re.split(rb"(\W+)", data)
    at = rng.randrange(len(words))
    odd = [b"", b"-1", b"1e999", b"!!timestamp x", b"!!bool maybe", b"!!python/object:x", b"&a [*a]", b"*b", b"[" * 99]
    odd += [b"1" * 4400, b"\xff", b"\x00", b"null", b"{", b"]", b'"', b": ", b"\n- ", b"~", b"2001-13-41", b"0x", b"<<"]
    way = rng.randrange(4)
    if way == 0:
        words[at] = rng.choice(odd)
    elif way == 1:
        words[at:at] = [rng.choice(odd)]
    elif way == 2:
        words[at] = words[rng.randrange(len(words))]
    else:
        del words[at : at + rng.choice((1, 2, 9))]
    return b"".join(words)


def edit(file: Path, change: Callable[[bytes, random.Random], bytes], rng: random.Random) -> None:
    file.write_bytes(change(file.read_bytes(), rng))


def damage(file: Path, change: Callable[[bytes, random.Random], bytes], rng: random.Random) -> None:
    """Change a file's content, or now and then what kind of file stands there."""
    if rng.random() > 0.04:
        edit(file, change, rng)
        return
    file.unlink()
    way = rng.randrange(5)
    if way == 0:
        os.mkfifo(file)
    elif way == 1:
        file.mkdir()
    elif way == 2:
        file.touch()
    else:
        file.symlink_to(file if way == 3 else file.with_name("nothing"))


def safetensors_bytes(data: bytes, rng: random.Random) -> bytes:
    """A safetensors file with its header changed, or any of its bytes."""
    if rng.random() < 0.25:
        return change_bytes(data, rng)
    (length,) = struct.unpack("<Q", data[:8])
    header, rest = json.loads(data[8 : 8 + length]), data[8 + length :]
    names = [name for name in header if name != "__metadata__"]
    entry = header[rng.choice(names)]
    way = rng.randrange(7)
    if way == 0:
        entry["dtype"] = rng.choice(("F64", "I64", "BOOL", "I16", "F8_E4M3", "U8", "f32", "", [], None, 3))
    elif way == 1:
        shape = entry["shape"]
        entry["shape"] = rng.choice(([], [0], [-1, 4], [2**40, 2**40], "x", None, [1.5], shape[::-1], [1, 2, 3]))
    elif way == 2:
        start, end = entry["data_offsets"]
        entry["data_offsets"] = rng.choice(
            ([end, start], [start + 1, end + 1], [0, 2**63], [-4, 0], [start], "x", None)
        )
    elif way == 3:
        header["extra"] = dict(entry)
    elif way == 4:
        rest = rng.choice((rest + b"\0" * 8, rest[:-1], rest * 2, b""))
    else:
        header = change_json(header, rng)
    text = json.dumps(header).encode()
    if way == 5 and rng.random() < 0.2:
        text = text[:-1] + b"," + text[1:]
    return struct.pack("<Q", len(text)) + text + rest


def zip_bytes(data: bytes, rng: random.Random) -> bytes:
    """A zip archive with one member changed, removed, renamed or repeated, or any of its bytes."""
    if rng.random() < 0.2:
        return change_bytes(data, rng)
    made = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(data)) as old, zipfile.ZipFile(made, "w") as new:
        names = old.namelist()
        chosen, way = rng.choice(names), rng.randrange(9)
        for name in names:
            content = old.read(name)
            if name != chosen:
                new.writestr(name, content)
            elif way < 6:
                new.writestr(name, (json_text if name.endswith(".json") else change_bytes)(content, rng))
            elif way == 6:
                new.writestr(rng.choice(("../x", "x", "/x", name + "x")), content)
            elif way == 7:
                new.writestr(name, b"")
    return made.getvalue()


def npz_bytes(data: bytes, rng: random.Random) -> bytes:
    """An npz with other arrays in it, or its archive damaged."""
    if rng.random() < 0.6:
        return zip_bytes(data, rng)
    import numpy as np

    with np.load(io.BytesIO(data)) as archive:
        arrays: dict[str, Any] = {"images": archive["images"], "labels": archive["labels"]}
    images, labels, names = arrays["images"], arrays["labels"], np.array(["a", "b", "\x1b[1m", "d"])
    odd: list[Any] = [images.astype(kind) for kind in ("f2", ">f4", "f8", "c8", "u1", "i8", "?", "U3", "S3", "g")]
    odd += [
        np.asfortranarray(images),
        images[:0],
        images[..., None],
        images * np.nan,
        images * np.float32(1e30),
        np.float32(1),
    ]
    odd += [labels.astype(kind) for kind in (">i2", "u8", "f4", "O", "U3", "?", "M8[s]")] + [
        labels[:, None],
        labels[1:],
    ]
    odd += [labels + 4, labels - 9, labels * 0 - 1, labels.astype("u8") - 99, np.zeros(3, [("a", "i4"), ("b", "f4")])]
    name = rng.choice(
        ("images", "labels", "labels", "names", "class_names", "x", "y", "\x1b", "", "../x", "images.npy")
    )
    arrays[name] = rng.choice(odd) if "names" not in name else rng.choice((names, names[:3], names.astype("O"), images))
    made = io.BytesIO()
    # Not by name: the function has a parameter `file`, and names may hold anything.
    with zipfile.ZipFile(made, "w", rng.choice((zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED, zipfile.ZIP_LZMA))) as new:
        for key, array in arrays.items():
            content = io.BytesIO()
            np.lib.format.write_array(content, np.asanyarray(array), rng.choice((None, (1, 0), (2, 0), (3, 0))))
            new.writestr(f"{key}.npy", content.getvalue())
    return made.getvalue()


def onnx_bytes(data: bytes, rng: random.Random) -> bytes:
    """An ONNX file with fields of its messages changed, removed or repeated, or any of its bytes."""
    if rng.random() < 0.2:
        return change_bytes(data, rng)
    import onnx

    model = onnx.load_from_string(data)
    for _ in range(rng.choice((1, 1, 2))):
        message: Any = model
        while True:
            field, value = rng.choice([pair for pair in message.ListFields()] or [(None, None)])
            if field is None:
                break
            many = hasattr(value, "append") or hasattr(value, "add")
            if field.message_type is not None and rng.random() < 0.85:
                message = rng.choice(list(value)) if many else value
                continue
            with contextlib.suppress(TypeError, ValueError):
                change_field(message, field, value, many, rng)
            break
    return bytes(model.SerializeToString())


def change_field(message: Any, field: Any, value: Any, many: bool, rng: random.Random) -> None:
    """One field of a protobuf message removed, repeated, or given another value."""
    way = rng.randrange(4)
    if way == 0:
        message.ClearField(field.name)
    elif many:
        at = rng.randrange(len(value))
        if way == 1:
            del value[at]
        elif way == 2:
            value.extend([value[at]])
        elif field.message_type is None:
            value[at] = other_scalar(value[at], rng)
    elif field.message_type is None:
        setattr(message, field.name, other_scalar(value, rng))


def other_scalar(value: Any, rng: random.Random) -> Any:
    if isinstance(value, bytes):
        return change_bytes(value, rng)
    if isinstance(value, str):
        return rng.choice(("", "x", "../x", "\x1b]0;x\x07", value + "0", "x" * 999))
    if isinstance(value, float):
        return rng.choice((0.0, -1.0, float("nan"), float("inf"), 1e38))
    return rng.choice((0, 1, -1, 2, 3, 16, 3000, 2**31 - 1, -(2**31), 2**40, 2**63 - 1, value + 1))


def parquet_bytes(data: bytes, rng: random.Random) -> bytes:
    """A parquet file with other columns, other metadata, or any of its bytes damaged."""
    if rng.random() < 0.6:
        return change_bytes(data, rng)
    import pyarrow as pa
    import pyarrow.parquet as pq

    table = pq.read_table(io.BytesIO(data))
    way = rng.randrange(6)
    if way == 0:
        names = [["a", "b", "c", "d"], ["a"], ["\x1b", "", "c", "d"], [1, 2, 3, 4], "abcd", {"a": 1}, None][
            rng.randrange(7)
        ]
        note = json.dumps({"info": {"features": {"label": {"names": names, "_type": "ClassLabel"}}}}).encode()
        metadata = (
            note if rng.random() < 0.5 else json_text(note, rng) if rng.random() < 0.7 else change_bytes(note, rng)
        )
        table = table.replace_schema_metadata({b"huggingface": metadata})
    elif way == 1:
        table = table.drop_columns([rng.choice(table.column_names)])
    elif way == 2:
        name = rng.choice(("label", "image", "y", "x", "", "\x1b[1m", "class", "images"))
        table = table.append_column(name, table.column(rng.randrange(2)))
    elif way == 3:
        table = rng.choice((table.slice(0, 0), table.slice(1), pa.concat_tables([table] * 40), table.select([])))
    else:
        index = rng.randrange(len(table.column_names))
        odd = [[None], [hostile_cell(rng)], [b""], [b"x"], ["x"], [-1], [2**40], [1.5], [[1]], [{"bytes": None}]]
        odd += [
            [{"bytes": data[:9], "path": None}],
            [{"bytes": None, "path": "/dev/zero"}],
            [{"bytes": None, "path": ""}],
        ]
        odd += [[{"path": "0.png"}], [{"bytes": [1]}], [{"bytes": {"bytes": b"x"}}], [{}], [3], [0], [-1], [2**63 - 1]]
        values = rng.choice(odd) * len(table)
        if rng.random() < 0.2:
            values[rng.randrange(len(values))] = None
        with contextlib.suppress(pa.ArrowException):
            column = pa.array(values)
            types = [
                column.type,
                column.type,
                pa.uint64(),
                pa.int8(),
                pa.float16(),
                pa.timestamp("s"),
                pa.large_binary(),
            ]
            column = column.cast(rng.choice(types))
            column = column.dictionary_encode() if rng.random() < 0.2 else column
            table = table.set_column(index, table.column_names[index], column)
    made = io.BytesIO()
    options: dict[str, Any] = {"compression": rng.choice(("none", "snappy", "gzip", "zstd", "brotli"))}
    options |= {"row_group_size": rng.choice((None, 1, 3)), "use_dictionary": rng.random() < 0.5}
    options |= {"write_page_checksum": rng.random() < 0.3, "data_page_version": rng.choice(("1.0", "2.0"))}
    try:
        pq.write_table(table, made, **options)
    except pa.ArrowException:
        # A time, say, that parquet has no place for.
        return change_bytes(data, rng)
    return made.getvalue() if rng.random() < 0.8 else change_bytes(made.getvalue(), rng)


def hostile_cell(rng: random.Random) -> Any:
    value = hostile(rng)
    return value if isinstance(value, bool | float) or value is None else repr(value)


def change_spec(rng: random.Random, name: str, keys: list[str]) -> str:
    """`NAME:KEY=VALUE,...` with options as `--pass` takes them, most of them wrong."""
    odd = ["", "-1", "0", "1e9", "!!timestamp x", "9" * 5000, "[1", "{a: 1}", "null", "true", "2001-02-30", "&a [*a]"]
    odd += ["\x00", "é", "x", "4", "[2,3]", "{'': 3}", "nan", ".inf", "0x1g", "!!binary x", "\udcff", "[" * 300]
    odd += [
        "4",
        "2",
        "8",
        "3",
        "false",
        "channel",
        "tensor",
        "group",
        "['*']",
        "{'*': {bits: 3}}",
        "linear",
        "0.5",
        "9" * 39,
    ]
    parts = [f"{rng.choice(keys)}={rng.choice(odd)}" for _ in range(rng.choice((1, 1, 2, 3)))]
    spec = f"{name}:{','.join(parts)}" if rng.random() < 0.9 else name
    if rng.random() < 0.8:
        return spec
    return change_text(spec.encode("utf-8", "surrogateescape"), rng).decode("utf-8", "surrogateescape")


# Numbers at the borders of what options, and the libraries behind them, take.
NUMBERS = (
    0,
    1,
    2,
    3,
    4,
    5,
    7,
    8,
    9,
    16,
    32,
    33,
    64,
    100,
    -1,
    127,
    128,
    255,
    256,
    1000,
    0.0,
    0.5,
    1.0,
    1.5,
    1e-9,
    1e-45,
)
NUMBERS += (1e-320, 1e38, 1e39, 1e308, -0.5, 2**31 - 1, 2**31, 2**32, 2**53, 2**63 - 1, 2**63, 2**64, 10**38, 10**39)
TEXTS = (
    "auto",
    "cpu",
    "cuda",
    "cuda:0",
    "int8",
    "float16",
    "channel",
    "group",
    "mse",
    "gram",
    "loss",
    "linear",
    "*",
    "[!a]",
    "",
)


def likely(annotation: Any, rng: random.Random) -> Any:
    """A value for an option of this type that may well be taken: it then reaches what stands behind the check."""
    text = str(annotation)
    words = re.findall(r"'([^']+)'", text) if "Literal" in text else []
    numbers = [1, 2, 3, 4, 8, 32] if "int" in text and rng.random() < 0.4 else list(NUMBERS)
    if words and rng.random() < 0.8:
        return rng.choice(words)
    if "bool" in text:
        return rng.random() < 0.5
    if "dict" in text:
        options = {rng.choice(("bits", "group_size", "symmetric", "range", "ignore")): rng.choice(NUMBERS)}
        return {rng.choice((*TEXTS, "0", "8", "4", "?")): options}
    if "tuple" in text and ("int" in text or "float" in text or "_Length" in text):
        return [rng.choice(numbers) for _ in range(rng.choice((1, 2, 3)))]
    if "int" in text or "float" in text:
        return rng.choice(numbers)
    return rng.choice((rng.choice(TEXTS), [rng.choice(TEXTS)], rng.choice(NUMBERS), hostile(rng)))


def change_recipe(data: dict[str, Any], rng: random.Random) -> dict[str, Any]:
    """A recipe with one to three options set to values that may be taken."""
    from effcli import exporters, passes
    from effcli.inputs.preprocess import Preprocess
    from effcli.run.recipe import Calibration, Evaluate, Recipe

    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        part = rng.choice(("", "calibration", "evaluate", "preprocess", "passes", "passes", "passes", "export"))
        if part == "passes":
            steps = data["passes"]
            if rng.random() < 0.3:
                steps.append({rng.choice(list(passes.PASSES)): {}})
            ((name, options),) = rng.choice(steps).items()
            fields = passes.load(name).model_fields
        elif part == "export":
            name = rng.choice(("onnx", "c", "pt2", "safetensors"))
            data["export"] = [{name: {}}]
            options, fields = data["export"][0][name], exporters.load(name).model_fields
        elif part:
            kinds: dict[str, Any] = {"calibration": Calibration, "evaluate": Evaluate, "preprocess": Preprocess}
            options, fields = data.setdefault(part, {}), kinds[part].model_fields
        else:
            options, fields = data, {key: field for key, field in Recipe.model_fields.items() if key != "passes"}
        if fields and isinstance(options, dict):
            key = rng.choice(list(fields))
            options[key] = likely(fields[key].annotation, rng) if rng.random() < 0.9 else hostile(rng)
    return data


def make_bases(folder: Path) -> None:
    """Valid inputs of every kind in `folder`: tiny networks with random weights, data for them, and results of runs."""
    import numpy as np
    import torch
    from PIL import Image
    from transformers import LlamaConfig, LlamaForCausalLM

    from effcli.files import locate as samples

    folder.mkdir()
    torch.manual_seed(0)
    random = np.random.default_rng(0)
    config = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    config |= {"num_key_value_heads": 2, "max_position_embeddings": 128, "vocab_size": 1024, "bos_token_id": 0}
    language = LlamaForCausalLM(LlamaConfig(**config, eos_token_id=0))
    language.save_pretrained(folder / "lm")
    language.save_pretrained(folder / "shards", max_shard_size="60KB")
    for file in samples.resolve("sample:lm").glob("tokenizer*"):
        shutil.copy(file, folder / "lm")
        shutil.copy(file, folder / "shards")
    text = samples.EVALUATION_TEXT.read_text(encoding="utf-8")[:3000]
    (folder / "text.txt").write_text(text, encoding="utf-8")
    questions = [
        {"query": "the king is", "choices": [" good", " bad"], "gold": 0},
        {"context": "To be", "continuation": "be"},
    ]
    partial = {"contexts": ["the king", "the queen"], "continuation": " is good", "gold": 1}
    chat = {"messages": [{"role": "user", "content": text}, {"role": "assistant", "content": text}]}
    pair = {"prompt": text, "completion": text}
    file = folder / "lm" / "tokenizer_config.json"
    template = {"chat_template": "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}{% endfor %}"}
    file.write_text(json.dumps(json.loads(file.read_text(encoding="utf-8")) | template), encoding="utf-8")
    (folder / "partial.jsonl").write_text("".join(json.dumps(partial) + "\n" for _ in range(3)), encoding="utf-8")
    (folder / "q.jsonl").write_text("".join(json.dumps(questions[0]) + "\n" for _ in range(3)), encoding="utf-8")
    (folder / "words.jsonl").write_text("".join(json.dumps(questions[1]) + "\n" for _ in range(3)), encoding="utf-8")
    (folder / "prose.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for _ in range(4)), encoding="utf-8")
    network = torch.nn.Sequential(
        torch.nn.Conv2d(3, 4, 3, padding=1),
        torch.nn.BatchNorm2d(4),
        torch.nn.ReLU(),
        torch.nn.MaxPool2d(2),
        torch.nn.Conv2d(4, 8, 3, padding=1),
        torch.nn.ReLU(),
        torch.nn.AdaptiveAvgPool2d(1),
        torch.nn.Flatten(),
        torch.nn.Linear(8, 4),
    ).eval()
    batch = torch.export.Dim("batch")
    exported = torch.export.export(network, (torch.zeros(2, 3, 8, 8),), dynamic_shapes=({0: batch},))
    torch.export.save(exported, folder / "net.pt2")
    attention = attention_class()().eval()
    exported = torch.export.export(attention, (torch.zeros(2, 6, 8),), dynamic_shapes=({0: batch},))
    torch.export.save(exported, folder / "att.pt2")
    rows = random.standard_normal((32, 6, 8)).astype(np.float32)
    np.savez(folder / "rows.npz", images=rows, labels=attention(torch.from_numpy(rows)).argmax(1).numpy())
    images = random.standard_normal((32, 3, 8, 8)).astype(np.float32)
    labels = network(torch.from_numpy(images)).argmax(1).numpy()
    np.savez(folder / "data.npz", images=images, labels=labels)
    (folder / "chat.jsonl").write_text(json.dumps(chat) + "\n" + json.dumps(pair) + "\n", encoding="utf-8")
    (folder / "imgs").mkdir()
    for label in range(4):
        (folder / "imgs" / f"c{label}").mkdir()
        for number in range(2):
            pixels = random.integers(0, 256, (8, 8, 3)).astype(np.uint8)
            Image.fromarray(pixels).save(folder / "imgs" / f"c{label}" / f"{number}.png")
    write_formats(folder / "formats", Image.fromarray(pixels))
    write_onnx(folder / "net.onnx", random)
    write_wide_onnx(folder / "wide.onnx", random)
    write_parquet(folder / "d.parquet", folder / "imgs" / "c0" / "0.png")
    data = ["--calib", str(folder / "data.npz"), "--eval", str(folder / "data.npz"), "--set=evaluate.latency=false"]
    for name, steps in {"g_km": ["kmeans:huffman=true"], "g_lin": ["linear"], "g_int": ["fold", "int8"]}.items():
        command(["compress", str(folder / "net.pt2"), *passes_of(steps), *data, "-o", str(folder / name)])
    data = [word.replace("data.npz", "rows.npz") for word in data]
    for name, steps in {"t_lin": ["linear"], "t_int": ["int8"]}.items():
        command(["compress", str(folder / "att.pt2"), *passes_of(steps), *data, "-o", str(folder / name)])
    for name, steps in {"lm_km": ["kmeans:bits=4"], "lm_lin": ["linear:group_size=32"]}.items():
        command(["compress", str(folder / "lm"), *passes_of(steps), *SHORT, "-o", str(folder / name)])
    recipe = {"model": str(folder / "net.pt2"), "passes": [{"linear": {"bits": 4}}, "fold"], "seed": 1, "output": "x"}
    (folder / "r.yaml").write_text(json.dumps(recipe, indent=1), encoding="utf-8")
    shutil.copy(folder / "lm_km" / "recipe.yaml", folder / "r2.yaml")


def attention_class() -> Any:
    """A small network of attention, with what integers have steps for: (n, 6, 8) -> (n, 5)."""
    import torch
    from torch import nn
    from torch.nn import functional

    class Attention(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = nn.LayerNorm(8)
            self.mixed, self.out, self.head = nn.Linear(8, 24), nn.Linear(8, 8), nn.Linear(12, 5)
            self.place = nn.Parameter(torch.randn(6, 8))

        def forward(self, x: Any) -> Any:
            batch, length, width = x.shape
            x = self.norm(x + self.place)
            q, k, v = self.mixed(x).view(batch, length, 3, 2, width // 2).permute(2, 0, 3, 1, 4)
            weights = torch.softmax(q @ k.transpose(-2, -1) * 0.5, -1)
            x = x + self.out((weights @ v).transpose(1, 2).reshape(batch, length, width))
            x = functional.gelu(torch.cat([x[:, ::2], x[:, 1::2] * 2], 2))
            return self.head(functional.pad(torch.sigmoid(x[..., 2:-2]).mean(1), (0, 0)))

    return Attention


def passes_of(steps: list[str]) -> Words:
    return [word for step in steps for word in ("--pass", step)]


def command(words: Words) -> None:
    """Carry out a command that must succeed."""
    from effcli.cli import main

    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = main(words)
    if code:
        raise SystemExit(f"the valid inputs could not be made: {' '.join(words)}\n{err.getvalue()}")


def write_formats(folder: Path, image: Any) -> None:
    """The image in several formats and modes, one class each, under names of images."""
    from PIL import Image

    exif = Image.Exif()
    exif[0x0112] = 6
    ways: list[tuple[str, dict[str, Any]]] = [
        ("PNG", {"exif": exif}),
        ("JPEG", {"exif": exif}),
        ("BMP", {}),
        ("WEBP", {}),
    ]
    ways += [("GIF", {}), ("TIFF", {"compression": "tiff_lzw"}), ("PPM", {}), ("JPEG2000", {}), ("PNG", {"bits": 4})]
    modes = ["RGBA", "CMYK", "P", "RGB", "P", "RGB", "L", "RGB", "P"]
    for number, ((name, options), mode) in enumerate(zip(ways, modes, strict=True)):
        (folder / f"c{number % 4}").mkdir(parents=True, exist_ok=True)
        suffix = {"JPEG": ".jpg", "BMP": ".bmp", "WEBP": ".webp"}.get(name, ".png")
        file = folder / f"c{number % 4}" / f"{number}{suffix}"
        image.convert(mode).save(file, name, **options)
    sequence = [image, image.rotate(90), image.rotate(180)]
    for number, name in enumerate(("PNG", "WEBP", "GIF")):
        file = folder / f"c{number}" / f"moving.{'webp' if name == 'WEBP' else 'png'}"
        sequence[0].save(file, name, save_all=True, append_images=sequence[1:])


def write_onnx(file: Path, random: Any) -> None:
    try:
        import onnx
    except ImportError:
        return
    from onnx import helper, numpy_helper

    def tensor(name: str, *shape: int) -> Any:
        return numpy_helper.from_array(random.standard_normal(shape).astype("f4"), name)

    nodes = [
        helper.make_node("Conv", ["x", "c.weight"], ["a"], name="conv", pads=[1, 1, 1, 1]),
        helper.make_node("Relu", ["a"], ["b"]),
        helper.make_node("MaxPool", ["b"], ["p"], kernel_shape=[2, 2], strides=[2, 2]),
        helper.make_node("GlobalAveragePool", ["p"], ["g"]),
        helper.make_node("Flatten", ["g"], ["d"]),
        helper.make_node("Gemm", ["d", "f.weight"], ["y"], transB=1, name="head"),
    ]
    inputs = [helper.make_tensor_value_info("x", 1, ["N", 3, 8, 8])]
    outputs = [helper.make_tensor_value_info("y", 1, ["N", 4])]
    weights = [tensor("c.weight", 4, 3, 3, 3), tensor("f.weight", 4, 4)]
    graph = helper.make_graph(nodes, "g", inputs, outputs, weights)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)
    onnx.save(model, str(file))


def write_wide_onnx(file: Path, random: Any) -> None:
    """An ONNX file with shape arithmetic, a function, weights beside it, and most kinds of operators."""
    try:
        import onnx
    except ImportError:
        return
    import numpy as np
    from onnx import helper, numpy_helper

    def node(kind: str, inputs: str, outputs: str, **attributes: Any) -> Any:
        return helper.make_node(kind, inputs.split(), outputs.split(), name=f"{kind}_{outputs}", **attributes)

    arrays = {"k": random.standard_normal((4, 3, 3, 1)), "w": random.standard_normal((16, 8)), "s": np.ones(16)}
    tensors = [numpy_helper.from_array(np.asarray(value, "f4"), name) for name, value in arrays.items()]
    lists = {"one": [1], "zero": [0], "tail": [-1], "pads": [0, 0, 1, 0, 0, 0, 1, 0], "halves": [2, 2], "two": [2]}
    tensors += [numpy_helper.from_array(np.array(value, "i8"), name) for name, value in lists.items()]
    inputs = [helper.make_tensor_value_info("x", 1, ["N", 3, 8, 8])]
    outputs = [helper.make_tensor_value_info("y", 1, None)]
    nodes = [
        node("Pad", "x pads", "p"),
        node("Conv", "p k", "c", strides=[2, 2], auto_pad="SAME_UPPER"),
        node("Constant", "", "half", value_float=0.5),
        node("Mul", "c half", "m"),
        helper.make_node("Swish", ["m"], ["sw"], domain="own"),
        node("Split", "sw halves", "a b", axis=1),
        node("Concat", "b a", "j", axis=1),
        node("AveragePool", "j", "v", kernel_shape=[2, 2], strides=[2, 2], ceil_mode=1),
        node("Shape", "v", "shape"),
        node("Gather", "shape zero", "batch"),
        node("Concat", "batch tail", "wanted", axis=0),
        node("Reshape", "v wanted", "flat"),
        node("Slice", "flat zero eight one", "cut"),
        node("Transpose", "w", "wt", perm=[1, 0]),
        node("MatMul", "cut wt", "h"),
        node("LayerNormalization", "h s", "ln", axis=-1),
        node("Unsqueeze", "ln two", "u"),
        node("ReduceMean", "u", "r", axes=[2], keepdims=0),
        node("Softmax", "r", "y", axis=-1),
    ]
    tensors.append(numpy_helper.from_array(np.array([8], "i8"), "eight"))
    body = [helper.make_node("Sigmoid", ["i"], ["g"]), helper.make_node("Mul", ["i", "g"], ["o"])]
    swish = helper.make_function("own", "Swish", ["i"], ["o"], body, [helper.make_opsetid("", 17)])
    graph = helper.make_graph(nodes, "g", inputs, outputs, tensors)
    opsets = [helper.make_opsetid("", 17), helper.make_opsetid("own", 1)]
    onnx.save(helper.make_model(graph, opset_imports=opsets, functions=[swish], ir_version=9), str(file))


def write_parquet(file: Path, image: Path) -> None:
    try:
        import pyarrow as pa
        import pyarrow.parquet as pq
    except ImportError:
        return
    content = {"bytes": image.read_bytes(), "path": "0.png"}
    pq.write_table(pa.table({"image": [content] * 4, "label": [0, 1, 2, 3]}), file)


class Case:
    """One input: a folder of its own, its valid inputs, and its own source of random numbers."""

    def __init__(self, bases: Path, folder: Path, rng: random.Random) -> None:
        self.bases, self.folder, self.rng = bases, folder, rng
        self.checked: Path | None = None

    def copy(self, name: str) -> Path:
        """A copy of a valid input that may be damaged."""
        source, target = self.bases / name, self.folder / name
        if source.is_dir():
            shutil.copytree(source, target)
        else:
            shutil.copy(source, target)
        return target

    def base(self, name: str) -> str:
        return str(self.bases / name)

    def out(self) -> Words:
        return ["-o", str(self.folder / "out")]


def safetensors_case(case: Case) -> Words:
    name = case.rng.choice(("lm", "lm", "lm_km", "lm_lin", "g_km", "g_int"))
    model = case.copy(name)
    file = next(model.glob("*.safetensors"))
    edit(file, safetensors_bytes, case.rng)
    case.checked = file
    return look_at(case, model, name)


def look_at(case: Case, model: Path, name: str) -> Words:
    """A command that reads the model."""
    here = str(model)
    if name.startswith(("g_", "t_")):
        data = case.base("data.npz" if name.startswith("g_") else "rows.npz")
        target = case.rng.choice(("onnx", "c") if name.endswith("_int") else ("onnx", "pt2", "safetensors"))
        ways = [["inspect", here], ["eval", here, "--images", data], ["verify", here], ["plan", here, "--pass", "fold"]]
        ways += [["export", here, "--to", target, *case.out()]]
        if not name.endswith("_int"):
            ways.append(["compress", here, "--pass", "int8", "--calib", data, "--no-eval", "--quiet", *case.out()])
        return case.rng.choice(ways)
    evaluate = ["eval", here, "--text", case.base("text.txt"), *EVALUATION]
    steps = ["compress", here, "--pass", "linear:group_size=32", *SHORT, *case.out()]
    choices = [["inspect", here], evaluate, *([steps] if name == "lm" else [["verify", here]])]
    return case.rng.choice(choices)


def config_case(case: Case) -> Words:
    model = case.copy("lm")
    name = case.rng.choice(("config.json", "config.json", "config.json", "tokenizer_config.json"))
    edit(model / name, json_text, case.rng)
    case.checked = model / "config.json"
    return look_at(case, model, "lm")


def own_case(case: Case) -> Words:
    name = case.rng.choice(("lm_km", "lm_lin", "g_km", "g_int", "t_int"))
    model = case.copy(name)
    edit(model / "config.json", json_text, case.rng)
    return look_at(case, model, name)


def file_of(name: str, *folders: str) -> Callable[[Case], Words]:
    """Damages the JSON file `name` of a graph's folder."""

    def make(case: Case) -> Words:
        folder = case.rng.choice(folders)
        model = case.copy(folder)
        edit(model / name, json_text, case.rng)
        return look_at(case, model, folder)

    return make


def index_case(case: Case) -> Words:
    """Damages the index of a checkpoint in shards, or which files lie beside it."""
    model = case.copy("shards")
    index = model / "model.safetensors.index.json"
    way = case.rng.randrange(10)
    if way < 7:
        edit(index, json_text, case.rng)
    elif way == 7:
        case.rng.choice(sorted(model.glob("*.safetensors"))).unlink()
    elif way == 8:
        index.rename(model / case.rng.choice(("effcli.safetensors.index.json", "other.json")))
    else:
        edit(case.rng.choice(sorted(model.glob("*.safetensors"))), safetensors_bytes, case.rng)
    return look_at(case, model, "lm")


def report_case(case: Case) -> Words:
    name = case.rng.choice(("g_lin", "lm_km", "g_int"))
    model = case.copy(name)
    case.checked = model / "report.json"
    damage(case.checked, json_text, case.rng)
    pair = [str(model), case.base("g_lin")]
    case.rng.shuffle(pair)
    words = case.rng.choice((["report", str(model)], ["compare", *pair]))
    return [*words, "--json"] if case.rng.random() < 0.3 else words


def yaml_case(case: Case) -> Words:
    case.checked = case.copy(case.rng.choice(("r.yaml", "r2.yaml")))
    plain = case.checked.name == "r2.yaml" or case.rng.random() < 0.5
    damage(case.checked, change_text if plain else json_text, case.rng)
    return ["plan", str(case.checked)]


def recipe_case(case: Case) -> Words:
    """Options that may be taken, in a recipe that is carried out."""
    text = case.rng.random() < 0.15
    data: dict[str, Any] = {"model": case.base("lm" if text else "net.pt2"), "passes": [{"linear": {}}], "seed": 1}
    data["calibration"] = {"data": case.base("text.txt" if text else "data.npz"), "samples": 2}
    data["evaluate"] = {"latency": False, "samples": 2} | ({} if text else {"images": case.base("data.npz")})
    if text:
        data["passes"] = [{case.rng.choice(("linear", "awq", "gptq", "nf4", "kmeans")): {}}]
        data["calibration"] |= {"length": 32}
        data["evaluate"] |= {"length": 32, "perplexity": case.base("text.txt")}
    else:
        chosen = ("linear", "fold", "int8", "kmeans", "gptq", "adaround", "equalize", "ternary", "binary", "centroids")
        data["passes"] = [{case.rng.choice(chosen): {}}]
    file = case.folder / "r.yaml"
    file.write_text(json.dumps(change_recipe(data, case.rng)), encoding="utf-8")
    return ["run", str(file), *case.out(), "--quiet"] if case.rng.random() < 0.8 else ["plan", str(file)]


def spec_case(case: Case) -> Words:
    from effcli import exporters, passes
    from effcli.inputs.preprocess import Preprocess

    rng = case.rng
    network = case.base(rng.choice(("net.pt2", "lm")))
    way = rng.randrange(8)
    if way == 0:
        name = rng.choice(("onnx", "c", "pt2", "safetensors", "gptq"))
        spec = change_spec(rng, name, list(exporters.load(name).model_fields) or ["x"])
        return ["export", case.base(rng.choice(("g_lin", "g_int"))), "--to", spec, *case.out()]
    if way == 1:
        spec = change_spec(rng, "x", list(Preprocess.model_fields))
        return [
            "eval",
            case.base("net.pt2"),
            "--images",
            case.base("imgs"),
            f"--set=preprocess.{spec.partition(':')[2]}",
        ]
    name = rng.choice(list(passes.PASSES))
    spec = change_spec(rng, name, list(passes.load(name).model_fields))
    if way == 2:
        key = rng.choice(("seed", "passes.0.linear", "calibration", "shape", "x.y", "", "threads", "passes.0.bits"))
        return ["plan", network, "--pass", "linear", f"--set={key}={spec.partition('=')[2]}"]
    if way == 3:
        value = rng.choice(("0", "-1", "2", "9" * 39, "9" * 5000, "x", "1.5", "", str(2**31), str(2**63 - 1), "\u00b2"))
        measured = ["eval", case.base("lm"), "--text", case.base("text.txt"), *EVALUATION]
        wide = ["plan", network, "--pass", "linear", rng.choice(("--bits", "--group-size")), value]
        return rng.choice(([*measured, rng.choice(("--samples", "--length", "--limit")), value], wide))
    return ["plan", network, "--pass", spec]


def jsonl_case(case: Case) -> Words:
    names = ("q.jsonl", "words.jsonl", "partial.jsonl", "prose.jsonl", "chat.jsonl")
    file = case.copy(case.rng.choice(names))
    damage(file, jsonl_bytes, case.rng)
    if file.name in ("prose.jsonl", "chat.jsonl"):
        if case.rng.random() < 0.7:
            return ["eval", case.base("lm"), "--text", str(file), "--length", "64"]
        return ["compress", case.base("lm"), "--pass", "awq:group_size=32", "--calib", str(file), *SHORT, *case.out()]
    # Of a text no more is read than is asked for, of questions every line.
    case.checked = file
    return ["eval", case.base("lm"), "--choices", str(file)]


def jsonl_bytes(data: bytes, rng: random.Random) -> bytes:
    """JSON lines with one line changed."""
    lines = data.splitlines()
    at = rng.randrange(len(lines))
    lines[at] = json_text(lines[at], rng)
    return rng.choice((b"\n", b"\n", b"\r\n", b"\n\n")).join(lines)


def data_of(name: str, change: Callable[[bytes, random.Random], bytes]) -> Callable[[Case], Words]:
    """Damages the labelled images of file `name`."""

    def make(case: Case) -> Words:
        case.checked = case.copy(name)
        damage(case.checked, change, case.rng)
        return ["eval", case.base("net.pt2"), "--images", str(case.checked)]

    return make


def images_case(case: Case) -> Words:
    folder = case.copy(case.rng.choice(("imgs", "formats", "formats")))
    case.checked = folder
    file = case.rng.choice(sorted(file for file in folder.rglob("*") if file.is_file()))
    way = case.rng.randrange(12)
    if way == 0:
        file.rename(file.with_name("\x1b[31m\u202e.png"))
    elif way == 1:
        file.rename(file.with_suffix(case.rng.choice((".png", ".jpg", ".bmp", ".webp", ".gif", ""))))
    else:
        damage(file, change_bytes, case.rng)
    resize = ["--set=preprocess.resize=[8,8]", "--set=preprocess.scale=0.004"] if case.rng.random() < 0.5 else []
    return ["eval", case.base("net.pt2"), "--images", str(folder), *resize]


def network_of(change: Callable[[bytes, random.Random], bytes], *names: str) -> Callable[[Case], Words]:
    """Damages the file of a network."""

    def make(case: Case) -> Words:
        name = case.rng.choice(names)
        file = case.checked = case.copy(name)
        edit(file, change, case.rng)
        run = ["eval", str(file), "--images", case.base("rows.npz" if name == "att.pt2" else "data.npz")]
        return case.rng.choice((["inspect", str(file)], ["plan", str(file), "--pass", "linear"], run))

    return make


KINDS: dict[str, Callable[[Case], Words]] = {
    "safetensors": safetensors_case,
    "config": config_case,
    "own": own_case,
    "index": index_case,
    "graph": file_of("graph.json", "g_km", "t_lin"),
    "integer": file_of("integer.json", "g_int", "t_int"),
    "report": report_case,
    "yaml": yaml_case,
    "spec": spec_case,
    "jsonl": jsonl_case,
    "recipe": recipe_case,
    "npz": data_of("data.npz", npz_bytes),
    "parquet": data_of("d.parquet", parquet_bytes),
    "images": images_case,
    "onnx": network_of(onnx_bytes, "net.onnx", "wide.onnx"),
    "pt2": network_of(zip_bytes, "net.pt2", "att.pt2"),
}


@dataclasses.dataclass(frozen=True)
class Limits:
    """Seconds, without those in which other processes had the processor, and bytes of memory for one input."""

    seconds: float
    memory: int


def clock(process: int | str = "self") -> float:
    """Seconds that count for a process: those that passed without those that it waited for a processor."""
    waited = 0
    with contextlib.suppress(OSError, ValueError, IndexError):
        waited = int(Path(f"/proc/{process}/schedstat").read_text().split()[1])
    return time.monotonic() - waited / 1e9


class TooLong(BaseException):
    """The time for one input is over."""


def attempt(kind: str, seed: int, number: int, bases: Path, folder: Path, limits: Limits) -> dict[str, Any]:
    """Make one input in `folder` and run effcli on it; what became of it."""
    from effcli.cli import main

    case = Case(bases, folder, random.Random(f"{kind}/{seed}/{number}"))
    words = KINDS[kind](case)
    before = reset_peak()
    out, err = io.StringIO(), io.StringIO()
    verdict, began = "", clock()

    def stop(*_: object) -> None:
        left = began + limits.seconds - clock()
        if left <= 0:
            raise TooLong
        signal.setitimer(signal.ITIMER_REAL, max(left, 0.1))

    signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, limits.seconds)
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            code: Any = main(words)
    except TooLong:
        code, verdict = None, "hang"
    except SystemExit as end:
        code = end.code
    except BaseException as error:
        code, verdict = None, "internal error"
        err.write(f"uncaught {type(error).__name__}: {error}")
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
    seconds = clock() - began
    grown = peak() - before
    said = err.getvalue()
    if not verdict and "out of memory" in said:
        verdict = "memory"
    if not verdict and (code not in (0, 1) or "internal error" in said):
        verdict = "internal error"
    if not verdict and grown > limits.memory:
        verdict = "memory"
    if not verdict and code == 0 and case.checked is not None:
        refused = refused_by_library(case.checked, bases)
        verdict, said = ("wrongly accepted", f"{said}\nerror: accepted: {refused}") if refused else (verdict, said)
    return {"verdict": verdict, "words": words, "code": code, "said": said, "grown": grown, "seconds": seconds}


def refused_by_library(file: Path, bases: Path) -> str:
    """What the library of the file's own format says against it, or against a file in a folder; else empty."""
    if file.is_dir():
        return next((said for below in sorted(file.rglob("*.*")) if (said := refused_by_library(below, bases))), "")
    if not file.is_file():
        return "not a file"
    try:
        read_by_library(file, bases)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return ""


def read_by_library(file: Path, bases: Path) -> None:
    """Read all of a file with the library of its format, which raises in its own ways."""
    import numpy as np
    import yaml
    from PIL import Image
    from safetensors import safe_open

    kind = file.suffix
    if kind == ".safetensors":
        with safe_open(file, "np"):
            pass
    elif kind == ".onnx":
        from effcli.platform import onnx_session

        onnx_session.open_session(file, 1)
    elif kind == ".pt2":
        open_pt2(file, bases / file.name)
    elif file.name == "config.json":
        from transformers import AutoConfig

        AutoConfig.from_pretrained(file.parent, local_files_only=True)
    elif kind == ".npz":
        with np.load(file, allow_pickle=False) as archive:
            for name in archive.files:
                try:
                    archive[name]
                except ValueError as error:
                    # Arrays of objects are left unread, which is said.
                    if "Object arrays" not in str(error):
                        raise
    elif kind == ".parquet":
        import pyarrow.parquet as pq

        pq.read_table(file)
    elif kind == ".json":
        json.loads(file.read_bytes().decode("utf-8"))
    elif kind == ".jsonl":
        for line in file.read_bytes().decode("utf-8-sig").split("\n"):
            if line.strip():
                json.loads(line)
    elif kind == ".yaml":
        # Which texts are numbers and dates differs on purpose.
        yaml.load(file.read_bytes().decode("utf-8"), yaml.BaseLoader)
    elif kind in (".png", ".jpg", ".bmp", ".webp"):
        with Image.open(file) as image:
            image.verify()
        with Image.open(file) as image:
            image.load()


def open_pt2(file: Path, base: Path) -> None:
    """What torch reads of the file besides its example inputs, a pickle that effcli leaves alone."""
    import torch

    made, inputs = io.BytesIO(), "/data/sample_inputs/model.pt"
    with zipfile.ZipFile(file) as archive, zipfile.ZipFile(base) as whole:
        held = {name: archive.read(name) for name in archive.namelist() if not name.endswith(inputs)}
        kept = {name: whole.read(name) for name in whole.namelist() if name.endswith(inputs)}
    with zipfile.ZipFile(made, "w") as new:
        for name, content in (held | kept).items():
            new.writestr(name, content)
    made.seek(0)
    torch.export.load(made)


def reset_peak() -> int:
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")
    return peak()


def peak() -> int:
    """The largest resident memory since the last reset, in bytes."""
    found = re.search(r"VmHWM:\s*(\d+) kB", Path("/proc/self/status").read_text())
    return int(found[1]) * 1024 if found else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def work(todo: list[tuple[str, int, int]], bases: Path, folder: Path, limits: Limits, results: Connection) -> None:
    """Carry out inputs in this process, telling each result."""
    quiet = os.open(os.devnull, os.O_RDWR)
    os.dup2(quiet, 2)
    used = int(re.search(r"VmSize:\s*(\d+) kB", Path("/proc/self/status").read_text())[1]) * 1024  # type: ignore[index]
    resource.setrlimit(resource.RLIMIT_AS, (used + 2 * limits.memory,) * 2)
    for kind, seed, number in todo:
        here = folder / f"{kind}-{seed}-{number}"
        here.mkdir(parents=True)
        results.send(("began", None))
        results.send(("ended", attempt(kind, seed, number, bases, here, limits)))
        shutil.rmtree(here, ignore_errors=True)


def answers(results: Connection, process: int | None, seconds: float) -> bool:
    """Whether a result comes from the process before `seconds` of its time are over."""
    end = clock(process or "self") + seconds
    while not results.poll(1):
        if clock(process or "self") > end:
            return False
    return True


def carry_out(
    todo: list[tuple[str, int, int]], bases: Path, limits: Limits, until: float, keep: Path | None
) -> list[tuple[str, dict[str, Any]]]:
    """Carry out inputs in children, a new one after each that ended badly; (kind, what became of it) in their order."""
    found: list[tuple[str, dict[str, Any]]] = []
    context = get_context("fork")
    with tempfile.TemporaryDirectory(prefix="fuzz-") as temporary:
        while len(found) < len(todo) and time.monotonic() < until:
            here, there = context.Pipe(duplex=False)
            rest = todo[len(found) :]
            child = context.Process(target=work, args=(rest, bases, Path(temporary), limits, there), daemon=True)
            child.start()
            there.close()
            while len(found) < len(todo) and time.monotonic() < until:
                kind, seed, number = todo[len(found)]
                made, verdict = None, ""
                try:
                    if answers(here, child.pid, limits.seconds + 10):
                        word, made = here.recv()
                        if word == "began":
                            continue
                    else:
                        verdict = "hang"
                except EOFError:
                    verdict = "crash"
                if verdict:
                    made = {"verdict": verdict, "words": [], "code": None, "said": "", "grown": 0, "seconds": 0.0}
                found.append((kind, made))
                if made["verdict"] and keep is not None:
                    save(keep / f"{kind}-{seed}-{number}", kind, seed, number, bases, made)
                if verdict:
                    break
            child.kill()
            child.join()
            here.close()
            shutil.rmtree(temporary, ignore_errors=True)
            Path(temporary).mkdir(exist_ok=True)
    return found


def save(folder: Path, kind: str, seed: int, number: int, bases: Path, made: dict[str, Any]) -> None:
    """Make an input again in `folder`, and write beside it what effcli was asked and what it said."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    words = KINDS[kind](Case(bases, folder, random.Random(f"{kind}/{seed}/{number}")))
    text = f"effcli {' '.join(map(repr, words))}\n{made['verdict']}, exit {made['code']}\n{made['said']}\n"
    (folder / "said.txt").write_text(text, encoding="utf-8", errors="backslashreplace")


def print_table(found: list[tuple[str, dict[str, Any]]]) -> None:
    """One row for each kind: how many inputs, how many of each bad end, the most seconds and bytes of one input."""
    width = max(map(len, KINDS))
    print(f"{'kind':{width}}  inputs  accepted  {'  '.join(VERDICTS)}  longest, s  most memory, MB")
    for kind in [*dict.fromkeys(kind for kind, _ in found), "all"]:
        rows = [made for each, made in found if kind in (each, "all")]
        counts = Counter(made["verdict"] for made in rows)
        figures = "  ".join(f"{counts[verdict]:{len(verdict)}}" for verdict in VERDICTS)
        accepted = sum(made["code"] == 0 for made in rows)
        longest, most = max(made["seconds"] for made in rows), max(made["grown"] for made in rows)
        print(f"{kind:{width}}  {len(rows):6}  {accepted:8}  {figures}  {longest:10.1f}  {most / 1e6:15.0f}")


def main() -> int:
    """Fuzz as asked; 1 where an input ended badly."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--count", type=int, default=20, help="inputs of each kind")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--kinds", default=",".join(KINDS), help="separated by commas")
    parser.add_argument("--only", metavar="KIND:SEED:NUMBER", help="one input, with what effcli says")
    parser.add_argument("--seconds", type=float, default=20, help="limit for one input")
    parser.add_argument("--memory", type=int, default=2000, help="limit for one input, in MB")
    parser.add_argument("--total", type=float, default=1e9, help="stop after so many seconds")
    parser.add_argument("--keep", type=Path, metavar="DIR", help="save the inputs that ended badly here")
    asked = parser.parse_args()
    todo = [(kind, asked.seed, number) for number in range(asked.count) for kind in asked.kinds.split(",")]
    if asked.only:
        kind, seed, number = asked.only.split(":")
        todo = [(kind, int(seed), int(number))]
    unknown = {kind for kind, _, _ in todo} - KINDS.keys()
    if unknown:
        parser.error(f"no such kind: {', '.join(sorted(unknown))}; there are {', '.join(KINDS)}")
    until = time.monotonic() + asked.total
    limits = Limits(asked.seconds, asked.memory * 1_000_000)
    with tempfile.TemporaryDirectory(prefix="fuzz-bases-") as temporary:
        bases = Path(temporary) / "bases"
        make_bases(bases)
        found = carry_out(sorted(todo, key=lambda one: one[2]), bases, limits, until, asked.keep)
    if not found:
        return 0
    print_table(found)
    bad = [(kind, made) for kind, made in found if made["verdict"]]
    messages = Counter((kind, made["verdict"], last_line(made["said"])) for kind, made in bad)
    for (kind, verdict, message), count in messages.most_common(40):
        print(f"{count:5}  {kind}  {verdict}  {message}")
    if asked.only:
        print(found[0][1]["words"], found[0][1]["code"], found[0][1]["said"], sep="\n")
    return 1 if bad else 0


def last_line(said: str) -> str:
    """What to count alike: the error's line without numbers and quoted names."""
    lines = [line for line in said.splitlines() if line.startswith(("error:", "uncaught"))]
    line = re.sub(r"'[^']*'|\"[^\"]*\"|/\S+", "'...'", lines[-1] if lines else "")
    return re.sub(r"\d+", "N", line)[:150].encode("ascii", "backslashreplace").decode()


if __name__ == "__main__":
    raise SystemExit(main())
