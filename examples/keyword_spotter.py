"""A keyword spotter from a trained network to firmware, and its accuracy on the device.

    python examples/keyword_spotter.py FOLDER [--target cortex-m4] [--calibration 250] [-o out/kws]

FOLDER holds `model.pt2`, a network that names the keyword in a second of sound from its MFCC features, and `data.npz`
with `features_int8` (clips, frames, coefficients), their `scale` and `zero_point`, and `labels` (clips,): those of
MLPerf Tiny's keyword spotting, for example. The network is quantized to int8 on the first clips, exported as C, and run
in QEMU on every clip; what it says there must be what the integer network says in Python.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

import numpy as np

import effcli
from effcli.exporters import c
from effcli.exporters.firmware import check, targets
from effcli.exporters.firmware.generate import generate
from effcli.graphs import executor
from effcli.graphs.integer import IntegerNetwork


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--target", default="cortex-m4", choices=[name for name in targets.TARGETS if name != "host"])
    parser.add_argument("--calibration", type=int, default=250, help="clips to calibrate on")
    parser.add_argument("--clips", type=int, default=None, help="clips to run; all unless given")
    parser.add_argument("-o", "--output", type=Path, default=Path("out/kws"))
    options = parser.parse_args()

    data = np.load(options.folder / "data.npz")
    features = (data["features_int8"].astype(np.float32) - float(data["zero_point"])) * np.float32(data["scale"])
    features, labels = features[: options.clips], data["labels"][: options.clips]
    with tempfile.TemporaryDirectory() as temporary:
        clips = Path(temporary) / "clips.npz"
        np.savez(clips, features=features, labels=labels)
        effcli.compress(
            str(options.folder / "model.pt2"),
            passes="int8",
            output=str(options.output),
            calib=str(clips),
            evals=[str(clips)],
            overrides=[f"calibration.samples={min(options.calibration, len(features))}"],
            overwrite=True,
        )

    network = IntegerNetwork.read(options.output)
    codes = network.quantize(features.reshape(-1, *network.input.shape))
    in_python = executor.run(network, codes).reshape(len(codes), -1)

    name, target = "kws", targets.find(options.target)
    done = c.C(name=name, target=options.target).export(options.output, options.output / "exports" / "c")
    print(f"written: {options.output / 'exports' / 'c'} ({done.checked})")

    generated = generate(network, name)
    with tempfile.TemporaryDirectory() as temporary:
        check.write_sources(Path(temporary), generated, name)
        # Stops with the first layer that differs.
        on_device = check.compare(network, generated.program, Path(temporary), name, target, codes)
    assert on_device is not None
    outputs = np.empty_like(in_python)
    outputs[:, generated.program.output.places] = on_device.outputs

    print(f"clips: {len(codes)}")
    print(f"accuracy in Python: {np.mean(in_python.argmax(1) == labels):.2%}")
    print(f"accuracy on {target.core}: {np.mean(outputs.argmax(1) == labels):.2%}")
    print(f"every layer of every clip equal: {np.array_equal(outputs, in_python)}")
    print(
        f"{on_device.instructions / 1e6:.2f} M instructions an inference, {generated.plan.nbytes} bytes of arena, "
        f"{on_device.stack} of stack, {on_device.sizes.text + on_device.sizes.data} of flash"
    )


if __name__ == "__main__":
    main()
