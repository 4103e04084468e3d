"""Requests that are decoded again: which ones, by what comparison, and that nothing else is done to
anybody.
"""

from __future__ import annotations

import json
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer
from types import SimpleNamespace

import pytest
from test_capture import request
from test_live_control import Reloader

from aurora_sglang_plugin.config import PluginConfig, SpeculationConfig
from aurora_sglang_plugin.serve.audit import AUDIT, WAITING, Audit, compare
from aurora_sglang_plugin.serve.control import Control
from aurora_sglang_plugin.serve.speculation import Speculation


def finished(rid="r", output=(5, 6, 7), kind="length", **params):
    return request(rid, range(4), output, finished=kind, **{"top_k": 1} | params)


def kept(req) -> int:
    audit = Audit(1.0, "http://nowhere")
    audit.ended(req)
    assert not audit.results
    return len(audit._waiting)


def test_greedy_requests_of_tokens_alone_are_repeated():
    assert kept(finished()) == kept(finished(kind="stop")) == 1
    assert (
        kept(finished(kind="abort")) == kept(finished(top_k=50)) == kept(finished(output=())) == 0
    )
    assert kept(request("r", range(4), (5,), top_k=1)) == 0
    assert kept(finished(repetition_penalty=1.1)) == kept(finished(logit_bias={"3": 1.0})) == 0
    assert kept(finished(json_schema="{}")) == kept(finished(grammar=object())) == 0
    assert kept(finished(custom_params={"aurora_capture": False})) == 0
    assert kept(finished(custom_params={AUDIT: True})) == 0
    assert kept(finished("HEALTH_CHECK_1")) == 0
    processed = finished()
    processed.custom_logit_processor = object()
    assert kept(processed) == 0


def test_a_share_of_them_and_few_at_a_time():
    audit = Audit(0.25, "http://nowhere")
    for n in range(400):
        audit.ended(finished(f"request-{n}"))
    assert len(audit._waiting) == WAITING
    assert not Audit(0.0, "http://nowhere")._waiting
    audit = Audit(1.0, "http://nowhere")
    audit.ended(SimpleNamespace(rid="broken"))
    assert audit.results == {"failed": 1}


def answer(tokens, *best):
    """`best`: the two best tokens of each position, with their logprobs."""
    top = [[[logprob, token, None] for token, logprob in pair.items()] for pair in best]
    return {"output_ids": list(tokens), "meta_info": {"output_top_logprobs": top}}


def test_what_differs_is_a_tie_or_not():
    sure = {5: -0.1, 9: -4.0}
    assert compare([5, 6], answer([5, 6], sure, sure)) == ("same", 2, 0.0)
    close = {7: -0.7, 6: -0.8}
    result, position, gap = compare([5, 6, 1], answer([5, 7, 2], sure, close, sure))
    assert (result, position) == ("tie", 1) and gap == pytest.approx(0.1)
    far = {7: -0.1, 6: -3.0}
    assert compare([5, 6], answer([5, 7], sure, far))[:2] == ("different", 1)
    # a token that is not among the best is at least as far as the last of them
    assert compare([5, 4], answer([5, 7], sure, close))[0] == "tie"
    assert compare([5, 4], answer([5, 7], sure, far))[0] == "different"
    # aborted
    assert compare([5, 6], answer([5], sure)) == ("interrupted", 1, 0.0)


@pytest.fixture
def server():
    """Answers /generate with `server.answers`, one after the other, and keeps what was asked."""

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            body = self.rfile.read(int(self.headers["Content-Length"]))
            site.asked.append((json.loads(body), self.headers.get("Authorization")))
            site.during()
            content = json.dumps(site.answers.pop(0)).encode()
            self.send_response(200)
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, *args):
            pass

    http = HTTPServer(("127.0.0.1", 0), Handler)
    site = SimpleNamespace(asked=[], answers=[], during=lambda: None)
    site.url = f"http://127.0.0.1:{http.server_port}"
    thread = threading.Thread(target=http.serve_forever, daemon=True)
    thread.start()
    yield site
    http.shutdown()


def test_results_are_counted(server, caplog):
    audit = Audit(1.0, server.url, api_key="secret")
    sure = {5: -0.1, 9: -4.0}
    server.answers = [answer([5, 6, 7], sure, sure, sure), answer([5, 6, 8], sure, sure, sure)]
    for _ in range(2):
        audit.ended(finished())
        audit.look(audit._waiting.popleft())
    assert audit.results == {"same": 1, "different": 1}
    assert "differs from plain decoding at token=2 of 3" in caplog.text
    (asked, key), _ = server.asked
    assert asked["input_ids"] == [0, 1, 2, 3] and key == "Bearer secret"
    params = asked["sampling_params"]
    assert params["temperature"] == 0 and params["max_new_tokens"] == 3 and params["ignore_eos"]
    assert params["custom_params"] == {"aurora_audit": True, "aurora_capture": False}
    # others ran beside it, or the target was changed: what it says proves nothing
    for during in (lambda: setattr(audit, "disturbed", True), audit.forget):
        server.during = during
        server.answers = [answer([5, 6, 8], sure, sure, sure)]
        audit.ended(finished())
        audit.look(audit._waiting.popleft())
    # nobody answers
    audit._url = "http://127.0.0.1:1"
    audit.ended(finished())
    audit.look(audit._waiting.popleft())
    assert audit.results == {"same": 1, "different": 1, "interrupted": 2, "failed": 1}


def test_an_audit_alone_is_decoded_plainly_and_nobody_waits_for_it():
    speculation = Speculation(SpeculationConfig(), 3, clock=lambda: 0.0)
    control, audit = Control(PluginConfig(), 3, Reloader(), speculation), Audit(1.0, "http://x")
    control.audit = audit
    again, user = request("again", custom_params={AUDIT: True}), request("user")
    control.prefill([user])
    control.begin([user])
    assert control.speculation.steps == 3
    control.prefill([again])
    control.begin([again])
    assert control.speculation.steps == 0 and not audit.disturbed
    control.prefill([user])
    control.begin([again, user])
    assert control.speculation.steps == 3 and audit.disturbed
    control.begin([user])
    assert control.speculation.steps == 3 and not control._auditing
    # between the chunks of its prompt others decode; then it is alone
    control.prefill([again])
    control.begin([again])
    assert control.speculation.steps == 0
