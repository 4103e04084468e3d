"""The commands about drafts and sizes: export, import, prune-vocab, plan.

`cli.py` adds them to the others.

As there, nothing heavy is imported before a command runs.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from aurora_trainer.tools.report_user_errors import report_user_errors

app = typer.Typer()

Out = Annotated[Path, typer.Argument(help="Directory to write the draft to.")]
TargetName = Annotated[
    str, typer.Option("--target", help="Directory of the target, or its name in the HF cache.")
]
Dtype = Annotated[str, typer.Option(help="same (bits as they are), float32, bfloat16 or float16.")]
Force = Annotated[bool, typer.Option("--force", help="Replace what is there.")]
# typer's mark of an option that must be given
REQUIRED: Any = ...
DraftVocab = Annotated[
    int | None, typer.Option(min=1, help="Keep so many target tokens, the most frequent.")
]


@app.command("export")
def export_draft(
    source: Annotated[Path, typer.Argument(help="A weights directory, a draft, or a checkpoint.")],
    out: Out,
    version: Annotated[
        int | None, typer.Option(help="Of a weights directory; default: what CURRENT names.")
    ] = None,
    dtype: Dtype = "same",
    draft_vocab: DraftVocab = None,
    counts: Annotated[
        Path | None, typer.Option(help="JSON list: how often each target token was generated.")
    ] = None,
    ids: Annotated[
        Path | None, typer.Option(help="JSON list of the target ids to keep, instead of --counts.")
    ] = None,
    keep: Annotated[
        str, typer.Option(help="Target ids to keep whatever their counts, e.g. end of text: 5,6.")
    ] = "",
    draft: Annotated[Path | None, typer.Option(help="A checkpoint's initial draft.")] = None,
    force: Force = False,
) -> None:
    """Write a draft as a Hugging Face directory that SGLang (EAGLE3 and AURORA) and others load."""
    with report_user_errors():
        import json

        import torch

        from aurora_trainer.drafts.kinds import export
        from aurora_trainer.tools.prune import read_counts

        if (draft_vocab is None) != (counts is None) or (ids is not None and counts is not None):
            raise ValueError("expected --draft-vocab with --counts, or --ids, or neither")
        weights = export.read_weights(source, version, draft)
        if ids is not None:
            weights = export.prune(
                weights, torch.tensor(json.loads(ids.read_text()), dtype=torch.int64)
            )
        elif draft_vocab is not None:
            kept = tuple(int(i) for i in keep.split(",") if i)
            weights = export.prune(
                weights, export.most_frequent(weights, read_counts(counts), draft_vocab, kept)
            )
        export.write_draft(weights, out, dtype, force)
        typer.echo(f"draft written directory={out} {_describe(weights, dtype)}")


@app.command("import")
def import_draft(
    source: Annotated[Path, typer.Argument(help="Directory of a draft made elsewhere.")],
    out: Annotated[
        Path | None, typer.Argument(help="Directory to write it to; without one, only check it.")
    ] = None,
    target: TargetName = REQUIRED,
    dtype: Dtype = "same",
    force: Force = False,
) -> None:
    """Check a draft made elsewhere, explain all that does not fit, and write it in the form that
    AURORA loads.
    """
    with report_user_errors():
        from aurora_trainer.drafts import kinds
        from aurora_trainer.drafts.target import open_target

        explained = (
            kinds.import_draft(source, out, target, dtype, force)
            if out
            else kinds.explain(source, open_target(target))
        )
        for kind, lines in (("converted", explained.conversions), ("note", explained.notes)):
            for line in lines:
                typer.echo(f"{kind if out else kind.replace('converted', 'to convert')}: {line}")
        if explained.problems:
            raise ValueError(explained.text())
        typer.echo(
            f"draft written directory={out}" if out else f"{source} fits the target {target}"
        )


@app.command("prune-vocab")
def prune_vocab(
    target: Annotated[
        str, typer.Argument(help="Directory of the target, or its name in the local HF cache.")
    ],
    recording: Annotated[
        Path | None, typer.Option(help="Count the tokens generated in a recording.")
    ] = None,
    text: Annotated[
        list[Path] | None, typer.Option(help="Or those of text files. Repeatable.")
    ] = None,
    sizes: Annotated[
        str | None, typer.Option(help="Vocabularies to report, e.g. 8192,32768.")
    ] = None,
    counts: Annotated[
        Path | None, typer.Option(help="Write the counts here, for init-draft and export.")
    ] = None,
    draft: Annotated[
        Path | None, typer.Option(help="Draft to prune: what export takes as its source.")
    ] = None,
    draft_vocab: DraftVocab = None,
    out: Annotated[Path | None, typer.Option(help="Directory of the pruned draft.")] = None,
    force: Force = False,
) -> None:
    """Count generated tokens, say what smaller draft vocabularies cover, and prune a draft to one
    of them.
    """
    with report_user_errors():
        from aurora_trainer.drafts.kinds import export
        from aurora_trainer.drafts.target import open_target
        from aurora_trainer.recordings.recording import CorruptionLog, read_recording
        from aurora_trainer.tools import prune

        if (recording is None) == (not text):
            raise ValueError("expected --recording or --text")
        if len({draft is None, draft_vocab is None, out is None}) != 1:
            raise ValueError("expected --draft, --draft-vocab and --out together, or none of them")
        opened = open_target(target)
        if recording is not None:
            damage = CorruptionLog()
            counted = prune.count_messages(
                (record.parts for record in read_recording(recording, damage)), opened
            )
            for found in damage.texts:
                typer.echo(f"damaged, counted without it: {found}", err=True)
        else:
            counted = prune.count_text(text, opened)
        wanted = [int(s) for s in sizes.split(",")] if sizes else prune.default_sizes(opened)
        typer.echo(
            f"counted tokens={int(counted.sum())} different={int((counted.sum(0) > 0).sum())}"
        )
        for line in prune.table(prune.coverage(counted, wanted, opened)):
            typer.echo(line)
        if counts is not None:
            prune.write_counts(counted, counts)
            typer.echo(f"counts written file={counts}")
        if draft is not None:
            weights = export.read_weights(draft)
            kept = export.most_frequent(weights, counted.sum(0), draft_vocab, opened.eos_token_ids)
            weights = export.prune(weights, kept)
            export.write_draft(weights, out, "same", force)
            typer.echo(f"draft written directory={out} {_describe(weights, 'same')}")


@app.command()
def plan(
    model: Annotated[
        str, typer.Argument(help="A config.json, its directory, or a name in the local HF cache.")
    ],
    config: Annotated[
        Path | None, typer.Option("--config", "-c", help="TOML file whose settings apply.")
    ] = None,
    overrides: Annotated[
        list[str] | None, typer.Option("--set", help="One setting. Repeatable.")
    ] = None,
    tokens_per_s: Annotated[float, typer.Option(min=0, help="Generated by each server.")] = 1000.0,
    requests_per_s: Annotated[float, typer.Option(min=0, help="Of each server.")] = 4.0,
    prompt_tokens: Annotated[int, typer.Option(min=0, help="Of a request.")] = 512,
    accept_length: Annotated[
        float, typer.Option(min=1, help="Expected, bonus token included.")
    ] = 2.5,
    running: Annotated[int, typer.Option(min=1, help="Requests in one step.")] = 16,
    num_steps: Annotated[int, typer.Option(min=1, help="--speculative-num-steps.")] = 3,
    topk: Annotated[int, typer.Option(min=1, help="--speculative-eagle-topk.")] = 1,
    draft_tokens: Annotated[
        int, typer.Option(min=0, help="--speculative-num-draft-tokens; 0: as many as fit.")
    ] = 0,
    tp: Annotated[int, typer.Option(min=1, help="Tensor-parallel ranks of a server.")] = 1,
    servers: Annotated[int, typer.Option(min=1, help="That one trainer learns from.")] = 1,
    ranks: Annotated[
        int, typer.Option(min=1, help="Of the trainer: processes that torchrun starts.")
    ] = 1,
    draft_vocab: Annotated[
        int | None, typer.Option(min=1, help="Of the draft. Default: what init-draft makes.")
    ] = None,
    dtype: Annotated[
        str, typer.Option(help="Of the server and its draft; default: the target's own.")
    ] = "",
    as_json: Annotated[
        bool, typer.Option("--json", help="Print JSON, in bytes and per second.")
    ] = False,
) -> None:
    """Bytes, memory and steps that a target will need, from its config.json alone."""
    with report_user_errors():
        import json

        from aurora_trainer.config import load_trainer_config
        from aurora_trainer.drafts.target import read_config
        from aurora_trainer.tools import plan as planning
        from aurora_trainer.tools.sizes import Load

        if config is None:
            overrides = [
                f"trainer.model.target={model}",
                "trainer.model.draft=none",
                "trainer.model.device=cuda",
                *(overrides or ()),
            ]
        settings = load_trainer_config(config, overrides or ())
        load = Load(
            tokens_per_s, requests_per_s, prompt_tokens, accept_length, running, num_steps, topk,
            draft_tokens, tp, servers, ranks,
        )  # fmt: skip
        found = planning.plan(read_config(model), settings, load, draft_vocab, dtype)
        typer.echo(
            json.dumps(found, indent=2) if as_json else "\n".join(planning.lines(model, found))
        )


def _describe(weights, dtype: str) -> str:
    from aurora_sglang_plugin.drafts.kinds import MAPS

    size = sum(t.numel() for n, t in weights.tensors.items() if n not in MAPS)
    kind = str(weights.dtype).removeprefix("torch.") if dtype == "same" else dtype
    return f"parameters={size} vocabulary={weights.config.draft_vocab_size} dtype={kind}"
