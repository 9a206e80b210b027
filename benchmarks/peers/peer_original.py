"""The checkpoint as it is, by transformers' own loader: nothing is compressed."""

from __future__ import annotations

from typing import Any

import child


def compress(job: child.Job, clock: child.Clock) -> None:
    model = job.stock_model()
    model.save_pretrained(job.output)


def load(job: child.Job) -> Any:
    return job.stock_model(job.output)


if __name__ == "__main__":
    child.main(compress, load)
