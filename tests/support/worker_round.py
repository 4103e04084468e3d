"""SGLang's own decode round around Aurora's worker, without a model: prints as JSON what happens in
it, in order: with lengths published by the scheduler, twice; without; on an idle rank.
"""

import json
import os
from contextlib import nullcontext
from types import SimpleNamespace

os.environ |= {
    "SGLANG_USE_CPU_ENGINE": "1",
    "TORCHDYNAMO_DISABLE": "1",
    "SGLANG_SPEC_SKIP_ZERO_STEP_DRAFT_EXTEND": "1",
}

from aurora_sglang_plugin import cpu_engine

cpu_engine.install()

import torch  # noqa: E402
from sglang.srt.speculative import eagle_worker_v2 as eagle  # noqa: E402

from aurora_sglang_plugin.worker import AuroraWorker  # noqa: E402

happened: list[str] = []
RESULT = SimpleNamespace(new_seq_lens=torch.ones(1))


def happens(what, result=None):
    return lambda *_, **__: happened.append(what) or result


def round_of(worker, idle=False, **kwargs):
    happened.clear()
    batch = SimpleNamespace(
        forward_mode=SimpleNamespace(is_idle=lambda: idle, is_extend=lambda: False),
        is_extend_in_batch=False,
        reqs=[],
        seq_lens=torch.ones(1),
        spec_info=SimpleNamespace(is_verify_input=lambda: True),
    )
    assert worker.forward_batch_generation(batch, **kwargs) is RESULT
    return list(happened)


eagle.get_parallel = lambda: SimpleNamespace(pp_size=1)
eagle.spec_stage_span = lambda _: nullcontext()
eagle.EAGLEWorkerV2.verify = happens("verify", RESULT)
eagle.EAGLEWorkerV2.activate_step_by_batch = lambda *_: None
eagle.EAGLEWorkerV2._stub_skipped_draft_extend = happens("draft-extend")

worker = AuroraWorker.__new__(AuroraWorker)
worker.speculative_num_steps, worker._draft_worker = 0, None
worker.control = SimpleNamespace(
    begin=happens("begin"), verified=happens("verified"), step=happens("step"), idle=lambda: None
)
worker.reloader = SimpleNamespace(version=1, step=happens("swap"))
worker.capture = SimpleNamespace(before_verify=happens("before_verify"), verify=happens("capture"))
publishes = {"on_publish": happens("publish")}
rounds = [
    round_of(worker, **publishes),
    round_of(worker, **publishes),
    round_of(worker),
    round_of(worker, idle=True, **publishes),
]
print(json.dumps(rounds))
