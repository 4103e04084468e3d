"""What a step teaches, taken on the scheduler's thread: decide which requests are sampled, copy the
step's tensors, queue a snapshot. On CUDA kernels pack a step (step_buffer.py); everything else
(top-K and packing on the CPU, parents) happens on the publisher's thread, in snapshot.py. No state
per request.

Dimensions: B requests, N tree nodes, P = S + 1 path columns, V target vocabulary.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterator, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from aurora_kernels.dispatch import kernels_run_on
from aurora_kernels.pack_step import float8

from aurora_sglang_plugin.config import CaptureConfig
from aurora_sglang_plugin.link.wire import DOMAIN, FLAG_ALTERED_DISTRIBUTION, EndReason, Kind
from aurora_sglang_plugin.serve.accepted_counts import Acceptance
from aurora_sglang_plugin.serve.capture_boundary import Boundary
from aurora_sglang_plugin.serve.excluded import DOMAIN_LABEL, why_excluded
from aurora_sglang_plugin.serve.snapshot import End, Prefill, Verify
from aurora_sglang_plugin.serve.step_buffer import Packing, layers_of
from aurora_sglang_plugin.serve.transfer import HostTensors, Pinned, PinnedBuffers, Staged

if TYPE_CHECKING:
    from aurora_sglang_plugin.link.publisher import Publisher

log = logging.getLogger(__name__)

WITHOUT_KERNELS = (
    "this GPU runs no kernels of Aurora: PyTorch packs each captured step, which costs more and"
    " was never tried; expected an NVIDIA GPU from sm_80 on. Where decoding suffers, capture"
    " less: plugin.capture.sample_rate"
)
KINDS = ("prefill", "verify", "end")


class Capture:
    """Takes prefill chunks, verify steps and ends from the seam in worker.py and offers them to the
    publisher.

    Methods never raise into serving (capture_boundary.py).
    """

    def __init__(
        self,
        config: CaptureConfig,
        publisher: Publisher,
        device: torch.device,
        num_steps: int,
        topk: int,
        rejection: bool = False,
        layers: tuple[int, int] = (1, 0),
    ):
        """`num_steps`: the most draft steps that a round has; `layers`: how many of the target's
        feed the draft, and the width of each."""
        self.config = config
        self.publisher = publisher
        self._device = device
        self.num_steps = num_steps
        self.topk = topk
        # --speculative-use-rejection-sampling
        self.rejection = rejection
        self.transfer: PinnedBuffers | HostTensors
        if device.type == "cuda":
            if not kernels_run_on(device):
                log.warning(WITHOUT_KERNELS)
            self.transfer = PinnedBuffers(device, config.pinned_buffers, config.pinned_buffer_bytes)
        else:
            self.transfer = HostTensors()
        self._feature_width = layers[0] * layers[1]
        in_float8 = config.features == "float8"
        self._packing = Packing(config.topk_logits, layers[0] if in_float8 else 0, topk > 1)
        self.boundary = Boundary(KINDS)
        self.acceptance = Acceptance(num_steps)
        # beyond max_prompt_features
        self.prompt_tokens_skipped = 0
        # requests by cause (excluded.py)
        self.excluded: Counter[str] = Counter()
        # B of the verify step that is running
        self._size = 0
        # of the verify step that is running: which of its requests are sampled
        self._rows: list[int] = []
        # the same on the device, where they are not all
        self._index: torch.Tensor | None = None

    def prewarm(self, vocab: int, dtype: torch.dtype) -> None:
        """Before anything is served: the kernels of a step, of `vocab` logits and features in
        `dtype`."""
        if self.transfer.packs:
            with self.boundary.of("prewarm"):
                self._packing.prewarm(
                    vocab, self._feature_width, dtype, self._device, self.transfer
                )

    def sampled(self, req: Any) -> bool:
        """Whether this request is captured. Decided and counted once: all of its steps, or none."""
        if not hasattr(req, "aurora_excluded"):
            req.aurora_excluded = cause = (
                "failing"
                if self.boundary.resting
                else why_excluded(req, self.config.sample_rate, self.publisher.no_trainer)
            )
            if cause is not None:
                self.excluded[cause] += 1
        return req.aurora_excluded is None and not self.boundary.resting

    def prefill(self, batch: Any, input_ids: torch.Tensor, result: Any, version: int) -> None:
        """After the draft's extend, which leaves the ids rotated left by one in batch.input_ids."""
        with self.boundary.of("prefill"):
            chunks = self._chunks(batch)
            if not chunks:
                return
            hidden = result.logits_output.hidden_states
            layers = layers_of(hidden.shape[1], self._packing.layers)
            # ids, and the padding of a buffer
            size = 1 if layers and self.transfer.packs else hidden.element_size()
            row_bytes = hidden.shape[1] * size + 4 * layers + 64
            for group in _fitting(chunks, self.config.pinned_buffer_bytes // row_bytes):
                if not self.transfer.has_room():
                    self.publisher.drop("no_buffer")
                    continue
                take = partial(self._take, spans=[(end - n, end) for _, _, n, end, _ in group])
                tensors = {"hidden": take(hidden)}
                if layers and self.transfer.packs:
                    codes, scales = float8(tensors["hidden"], layers)
                    tensors = {"hidden": codes, "scales": scales}
                tensors |= {
                    "input_ids": take(input_ids),
                    # the last one of a chunk is the token after it
                    "rotated_ids": take(batch.input_ids),
                    "seq_lens": self.transfer.private(batch.seq_lens),
                }
                host = dict(
                    rows=[row for row, *_ in group],
                    lens=[n for _, _, n, _, _ in group],
                    prompt_lens=[len(req.origin_input_ids) for _, req, _, _, _ in group],
                    before=[ids for *_, ids in group],
                    layers=layers,
                )
                reqs = [req for _, req, *_ in group]
                about = dict(domains=_domains(reqs), draft_version=version, extend_version=version)
                staged = self.transfer.stage(tensors)
                self._offer("prefill", Prefill, staged, host, [req.rid for req in reqs], **about)
            self.boundary.worked("prefill")

    def _chunks(self, batch: Any) -> list[tuple[int, Any, int, int, Sequence[int]]]:
        """(row, request, features to take, end of its rows in the batch, ids before them) of every
        chunk that is taken.
        """
        chunks, end = [], 0
        for row, (req, prefix, extend) in enumerate(
            zip(batch.reqs, batch.prefix_lens, batch.extend_lens)
        ):
            end += extend
            if self.sampled(req):
                first = max(prefix, len(req.origin_input_ids) - self.config.max_prompt_features)
                taken = max(0, min(extend, prefix + extend - first))
                self.prompt_tokens_skipped += extend - taken
                if taken:
                    before = self._cached_ids(req, prefix, prefix + extend - taken)
                    chunks.append((row, req, taken, end, before))
                req.aurora_prefilled = prefix + extend
        return chunks

    def _cached_ids(self, req: Any, prefix: int, first: int) -> Sequence[int]:
        """The last ids before the first feature of a request, `first`, where the prefix before it
        was cached: the trainer may know it from an earlier request. Of a prompt no more ids travel
        than `max_prompt_features`."""
        prompt = req.origin_input_ids
        # a chunk that follows another one, or features that are left out
        if not 0 < first == prefix != getattr(req, "aurora_prefilled", -1) or first > len(prompt):
            return ()
        count = self.config.max_prompt_features - (len(prompt) - first)
        return prompt[max(0, first - count) : first] if count > 0 else ()

    def before_verify(self, batch: Any) -> None:
        self._rows = []
        with self.boundary.of("rows"):
            self.boundary.begin()
            self._size = len(batch.seq_lens)
            rows = [row for row, req in enumerate(batch.reqs) if self.sampled(req)]
            if not rows:
                return
            # known before anything is computed or copied for nothing
            if not self.transfer.has_room():
                self.publisher.drop("no_buffer")
                return
            if len(rows) < self._size:
                device = batch.seq_lens.device
                index = torch.tensor(rows, pin_memory=device.type == "cuda")
                self._index = index.to(device, non_blocking=True)
            self._rows = rows
            self.boundary.worked("rows")

    def verify(
        self, batch: Any, tree: Any, result: Any, draft_version: int, extend_version: int
    ) -> None:
        """After verify: `tree` is the EagleVerifyInput, `result` has the accepted path compacted to
        the front and the logits as they judged: sampling edits them in place (penalties, bias), and
        leaves temperature and truncation to a copy."""
        if not self._rows:
            return
        with self.boundary.of("verify"):
            nodes = tree.retrieve_next_token.shape[1]
            host: dict[str, Any] = {}
            staged: Staged | Pinned | None
            if self.transfer.packs:
                rows = None if len(self._rows) == self._size else self._index
                packed = self._packing.pack(tree, result, rows, self.transfer)
                staged, host["shape"] = packed or (None, None)
            else:
                staged = self.transfer.stage(self._copies(tree, result))
            reqs = [batch.reqs[row] for row in self._rows]
            self._offer(
                "verify",
                Verify,
                staged,
                dict(
                    k=self.config.topk_logits,
                    version=draft_version,
                    # a plain round accepts nothing, whatever the draft is worth
                    acceptance=self.acceptance if nodes > 1 else None,
                    layers=layers_of(
                        result.logits_output.hidden_states.shape[-1], self._packing.layers
                    ),
                    **host,
                ),
                [req.rid for req in reqs],
                flags=_flags(batch, self._rows),
                draft_version=draft_version,
                extend_version=extend_version,
                num_steps=self.num_steps,
                topk=self.topk,
                rejection=self.rejection,
            )
            self.boundary.worked("verify")

    def ended(self, req: Any) -> None:
        """A request gives back its KV rows: it finished, was aborted or was retracted."""
        with self.boundary.of("end"):
            if not self.sampled(req):
                return
            length = len(req.output_ids) if req.finished_len is None else req.finished_len
            end = End(len(req.origin_input_ids) + length)
            self.publisher.offer(
                "end", end, requests=[req.rid], reasons=[_reason(req)], domains=_domains([req])
            )
            self.boundary.worked("end")

    def _copies(self, tree: Any, result: Any) -> dict[str, torch.Tensor]:
        """Of the sampled rows, what the publisher's thread packs.

        A copy of the logits is cheaper here than top-K."""
        size, nodes = tree.retrieve_next_token.shape
        path, select, output = result.accept_index.shape[1], self._select, result.logits_output
        logits = output.next_token_logits
        tensors = {
            "logits": select(logits.view(size, -1, logits.shape[-1])).flatten(0, 1),
            "hidden": select(output.hidden_states.view(size, nodes, -1)[:, :path]),
            "draft_tokens": select(tree.draft_token.view(size, nodes)),
            "positions": select(tree.positions.view(size, nodes)[:, 0]),
            "accept_index": select(result.accept_index),
            "accept_lens": select(result.accept_lens),
            "next_tokens": select(result.next_token_ids.view(size, nodes)[:, :path]),
        }
        # one candidate a level is a chain
        if self._packing.links:
            tensors["next_token"] = select(tree.retrieve_next_token)
            tensors["next_sibling"] = select(tree.retrieve_next_sibling)
        return tensors

    def _select(self, tensor: torch.Tensor) -> torch.Tensor:
        """The sampled rows of [B, ...], fit to be staged."""
        if len(self._rows) == self._size:
            return self.transfer.private(tensor)
        return tensor.index_select(0, self._index)

    def _take(self, tensor: torch.Tensor, spans: list[tuple[int, int]]) -> torch.Tensor:
        """Some spans of rows, fit to be staged."""
        parts = [tensor[start:end] for start, end in spans]
        return torch.cat(parts) if len(parts) > 1 else self.transfer.private(parts[0])

    def _offer(
        self,
        kind: Kind,
        snapshot_type: type,
        staged: Staged | Pinned | None,
        host: dict,
        requests: list,
        **header: Any,
    ) -> None:
        if staged is None:
            self.publisher.drop("too_large" if self.transfer.has_room() else "no_buffer")
        else:
            self.publisher.offer(kind, snapshot_type(staged, **host), requests=requests, **header)


def _fitting(chunks: list[tuple], max_rows: int) -> Iterator[list[tuple]]:
    """The chunks in order, as many at a time as have `max_rows` features together: what fits a
    buffer and a message.
    """
    group: list[tuple] = []
    rows = 0
    for chunk in chunks:
        if group and rows + chunk[2] > max_rows:
            yield group
            group, rows = [], 0
        group.append(chunk)
        rows += chunk[2]
    yield group


def _flags(batch: Any, rows: list[int]) -> list[int]:
    """Per captured row: FLAG_ALTERED_DISTRIBUTION under a grammar's mask or a watermark.

    Both differ from node to node and force tokens that the target would not choose. Penalties and
    bias are part of the judging logits, and flag nothing.
    """
    watermarked = getattr(batch.sampling_info, "watermark_candidates_host", None)
    altered = [
        batch.reqs[row].grammar is not None or bool(watermarked and watermarked[row])
        for row in rows
    ]
    return [FLAG_ALTERED_DISTRIBUTION if flag else 0 for flag in altered]


def _domains(reqs: list[Any]) -> list[str]:
    """Their labels, "" where there is none that is fit to travel; nothing where no request has
    one.
    """
    labels = [(req.sampling_params.custom_params or {}).get(DOMAIN_LABEL) for req in reqs]
    labels = [
        label if isinstance(label, str) and DOMAIN.fullmatch(label) else "" for label in labels
    ]
    return labels if any(labels) else []


def _reason(req: Any) -> EndReason:
    if not req.finished():
        return "retract"
    kind = req.finished_reason.to_json()["type"]
    return kind if kind in ("stop", "length") else "abort"
