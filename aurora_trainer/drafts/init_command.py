"""`aurora-trainer init-draft`, whose options are EAGLE3's; cli.py adds it to the others.

Nothing heavy is imported before it runs.
"""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer


class Kind(StrEnum):
    random = "random"
    target = "target"


def init_draft(
    target: Annotated[
        str,
        typer.Argument(help="Directory of the target model, or its name in the local HF cache."),
    ],
    out: Annotated[Path, typer.Argument(help="Directory to write the draft to.")],
    kind: Annotated[
        Kind, typer.Option(help="Random, or from the target's weights, able to copy.")
    ] = Kind.target,
    draft_vocab: Annotated[
        int | None,
        typer.Option(min=1, help="Tokens that it can propose. Default: 32,768, or all if fewer."),
    ] = None,
    counts: Annotated[
        Path | None,
        typer.Option(
            help="JSON list: how often each target token was generated (length V); the most"
            " frequent are kept. Default: the tokenizer's first ids."
        ),
    ] = None,
    aux_layers: Annotated[
        str | None,
        typer.Option(
            help="Target layers whose OUTPUT feeds the draft, e.g. 1,17,32. Default: SGLang's."
        ),
    ] = None,
    seed: Annotated[int, typer.Option(help="Of what is random.")] = 0,
    dtype: Annotated[
        str, typer.Option(help="same (as the target's), float32, bfloat16 or float16.")
    ] = "same",
    kv_heads: Annotated[
        int | None, typer.Option(min=1, help="Key-value heads. Default: the target's.")
    ] = None,
    eagle31: Annotated[
        bool,
        typer.Option(
            "--eagle31", help="EAGLE 3.1's shape: norms before fc and of the state handed on."
        ),
    ] = False,
) -> None:
    """Write an untrained draft for a target: config.json and model.safetensors that SGLang
    loads.
    """
    import json

    import torch

    from aurora_trainer.drafts.eagle3_init import init_draft as write
    from aurora_trainer.drafts.target import open_target

    dtypes = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
    if dtype == "same":
        dtype = str(open_target(target).embedding().dtype).removeprefix("torch.")
    if dtype not in dtypes:
        raise ValueError(f"--dtype {dtype}: expected same or one of {', '.join(dtypes)}")
    token_counts = torch.tensor(json.loads(counts.read_text())) if counts else None
    layers = tuple(int(i) for i in aux_layers.split(",")) if aux_layers else None
    draft = write(
        target, out, kind.value, draft_vocab, token_counts, layers, seed=seed,
        dtype=dtypes[dtype],
        kv_heads=kv_heads, eagle31=eagle31,
    )  # fmt: skip
    size, head = (sum(p.numel() for p in of) for of in (draft.parameters(), [draft.lm_head.weight]))
    per = dtypes[dtype].itemsize / 1e6
    typer.echo(
        f"draft written directory={out} kind={kind.value} parameters={size}"
        f" vocabulary={len(draft.d2t)} of {draft.config.vocab_size}\n"
        f"a draft step reads {size * per:,.0f} MB of weights, {head * per:,.0f} MB of them its head"
    )
