"""effcli under the same harness. options: passes, a list of strings as for --pass, and inputs, those of calibration.

The clock covers `effcli.compress` whole: effcli streams, so reading and writing the weights cannot be told from it.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import child


def compress(job: child.Job, clock: child.Clock) -> None:
    import effcli

    calibration = {
        "data": job.calibration,
        "samples": job.samples,
        "length": job.length,
        "inputs": job.options["inputs"],
    }
    with clock:
        effcli.compress(
            job.checkpoint, job.options["passes"], Path(job.output), calibration=calibration, evaluate=False
        )


def load(job: child.Job) -> Any:
    import effcli

    return effcli.load(job.output)


if __name__ == "__main__":
    child.main(compress, load)
