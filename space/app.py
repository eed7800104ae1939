"""A Space that says what a model needs: the estimator of `bigpipe ui` behind Gradio's fields.

python space/app.py
"""

from __future__ import annotations

from typing import Any

import gradio

from bigpipe.sizes import format_size
from bigpipe.webpage import answer

DTYPES = ["float32", "float16", "bfloat16", "int8", "int4"]
HEADS = [
    "dtype", "Largest Layer", "Total Size", "Training using Adam", "weights as loaded", "KV cache", "to infer",
    "fits on",
]  # fmt: skip


def estimate(
    model: str, dtypes: list[str], batch_size: float, sequence_length: float
) -> tuple[list[list[str]], str, dict[str, Any]]:
    """Return a row of HEADS per dtype, what to say about them, and the JSON of `bigpipe estimate --json`. Only
    repositories are looked at, and nothing of them runs. An error is said, and there are no rows."""
    options = {"dtypes": dtypes or DTYPES, "batch_size": int(batch_size), "sequence_length": int(sequence_length)}
    told = answer({"model": model.strip(), "options": options})
    errors, page = told["estimate"]["errors"], told["page"]
    if page is None:
        return [], "\n\n".join(f"**{each['cause']}**\n\n{each['cure']}" for each in errors), told["estimate"]
    counted = {row["dtype"]: row for row in page["accelerate"]}
    smallest = _smallest(page["fits"])
    rows = [
        [row["dtype"], *_accelerate(counted.get(row["dtype"])), format_size(row["weights"]),
         format_size(row["kv_cache"]), format_size(row["inference"]), smallest[row["dtype"]]]
        for row in page["dtypes"]
    ]  # fmt: skip
    about = page["about"]
    words = f"{about['class']}, {about['parameters']:,} parameters; {about['batch_size']} × {about['sequence_length']}"
    return rows, "\n\n".join([f"{words} tokens", *about["notes"]]), told["estimate"]


def _accelerate(row: dict[str, Any] | None) -> list[str]:
    """accelerate's columns, as `accelerate estimate-memory` counts them."""
    sizes = [None, None, None] if row is None else [row[name] for name in list(row)[1:]]
    return ["–" if size is None else format_size(size) for size in sizes]


def _smallest(fits: dict[str, Any]) -> dict[str, str]:
    """dtype → the smallest GPU that holds it."""
    found = {}
    for place, dtype in enumerate(fits["dtypes"]):
        rows = [row for row in fits["rows"] if row["cells"][place]["fits"]]
        found[dtype] = min(rows, key=lambda row: row["memory"])["gpu"] if rows else "several GPUs"
    return found


def demo() -> gradio.Blocks:
    """Return the page, not yet launched."""
    with gradio.Blocks(title="What a model needs") as page:
        gradio.Markdown("# What a model needs\nMemory by dtype, from the headers of its weights alone.")
        model = gradio.Textbox(label="Model name or URL", placeholder="google-bert/bert-base-cased")
        dtypes = gradio.CheckboxGroup(DTYPES, value=["float32", "float16", "int8", "int4"], label="dtypes")
        with gradio.Row():
            batch_size = gradio.Number(1, label="Batch size", precision=0, minimum=1)
            length = gradio.Number(2048, label="Sequence length", precision=0, minimum=1)
        go = gradio.Button("Calculate memory")
        said = gradio.Markdown()
        table = gradio.Dataframe(headers=HEADS, label="Memory", interactive=False)
        with gradio.Accordion("JSON", open=False):
            data = gradio.JSON()
        asked, shown = [model, dtypes, batch_size, length], [table, said, data]
        go.click(estimate, asked, shown, concurrency_limit=2)
        model.submit(estimate, asked, shown, concurrency_limit=2)
    return page


if __name__ == "__main__":
    demo().launch()
