"""A real SGLang server in a subprocess, for tests and the demo: on the CPU, or on a GPU if there
is one.

    with Server("target/", draft="draft/", algorithm="AURORA", num_steps=4) as server:
        server.generate("def main(", {"max_new_tokens": 32})

The server and its children are one process group. It ends with the `with` block and with `kill`
(both at once, by SIGKILL), with `stop` (after its running requests; SGLang takes some 6 s for that)
and with this process, however that ends.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

import children

CPU_ENV = {
    "SGLANG_USE_CPU_ENGINE": "1",
    # a thread pool costs more than it gains on the matrices of a small model
    "OMP_NUM_THREADS": "1",
    "SGLANG_CPU_OMP_THREADS_BIND": "0",
    # else the first batch compiles; also spares every process an import of inductor
    "TORCHDYNAMO_DISABLE": "1",
    "HF_HUB_OFFLINE": "1",
}
CPU_ARGS = (
    "--device cpu --dtype float32 --mem-fraction-static 0.1 --max-total-tokens 16384"
    " --max-running-requests 8 --skip-server-warmup --sleep-on-idle"
).split()
# SGLang's CUDA kernels compute in 16 bits
GPU_ARGS = (
    "--dtype bfloat16 --mem-fraction-static 0.5 --max-running-requests 32 --skip-server-warmup"
).split()
# More words for every server's command, such as an attention backend that this machine has.
MORE_ARGS = "AURORA_SERVER_ARGS"


class Server:
    """Starts on construction and returns once /health answers.

    `model`, `draft`: directories. `algorithm`: None, "EAGLE3" or "AURORA"; `num_steps` and `topk`
    shape its trees, of `num_draft_tokens` nodes (default: all that topk 1 has, else 1 + num_steps *
    topk). `args` are passed to SGLang after our own, `env` is added to its environment. `log` is
    the file that holds its output. Raises RuntimeError with the end of that log if the server dies
    or is not healthy after `timeout_s`.
    """

    def __init__(
        self,
        model: str | Path,
        *,
        draft: str | Path | None = None,
        algorithm: str | None = None,
        num_steps: int = 4,
        topk: int = 1,
        num_draft_tokens: int | None = None,
        port: int | None = None,
        args: tuple[str, ...] | list[str] = (),
        env: dict[str, str] | None = None,
        log: str | Path | None = None,
        timeout_s: float = 180,
    ):
        self.port = port or free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self.log = Path(log) if log else Path(tempfile.mkstemp(prefix="sglang-", suffix=".log")[1])
        on_gpu = has_gpu()
        command = [
            sys.executable,
            "-m",
            "sglang.launch_server",
            "--model-path",
            str(model),
            "--host",
            "127.0.0.1",
        ]
        command += ["--port", str(self.port), *(GPU_ARGS if on_gpu else CPU_ARGS)]
        if algorithm:
            command += ["--speculative-algorithm", algorithm]
        # a server without a draft chooses for itself
        if algorithm and draft:
            command += ["--speculative-num-steps", str(num_steps)]
            command += ["--speculative-eagle-topk", str(topk), "--speculative-num-draft-tokens"]
            command += [str(num_draft_tokens or 1 + num_steps * topk)]
        if draft:
            command += ["--speculative-draft-model-path", str(draft)]
        command += [*map(str, args), *os.environ.get(MORE_ARGS, "").split()]
        environment = {
            **os.environ,
            "PYTHONUNBUFFERED": "1",
            **({} if on_gpu else CPU_ENV),
            **(env or {}),
        }
        self.process = children.start(command, self.log, environment)
        started = time.monotonic()
        try:
            self._wait_until_healthy(timeout_s)
        except BaseException:
            self.kill()
            raise
        self.startup_s = time.monotonic() - started

    def generate(
        self, prompt: Any, sampling_params: dict[str, Any] | None = None, **fields: Any
    ) -> Any:
        """POST /generate and return its JSON.

        `prompt` is a text, a list of texts, a list of token ids, or a list of such lists; `fields`
        are SGLang's own (rid, stream, custom_params, ...). Decoding is greedy unless
        `sampling_params` say otherwise.
        """
        key = "text" if isinstance(prompt, str) or isinstance(prompt[0], str) else "input_ids"
        params = {"temperature": 0, **(sampling_params or {})}
        return self.post("/generate", {key: prompt, "sampling_params": params, **fields})

    def post(self, path: str, body: Any, timeout_s: float = 600) -> Any:
        data = json.dumps(body).encode()
        request = urllib.request.Request(
            self.url + path, data, {"Content-Type": "application/json"}
        )
        with urllib.request.urlopen(request, timeout=timeout_s) as response:
            return json.loads(response.read() or b"null")

    def get(self, path: str, timeout_s: float = 30) -> str:
        with urllib.request.urlopen(self.url + path, timeout=timeout_s) as response:
            return response.read().decode()

    def metric(self, name: str) -> float:
        """A metric of /metrics, summed over its labels.

        Raises RuntimeError where there is none of that name: a server exports every series of its
        families from its start, so that what is absent was never there, and is not 0.
        """
        found = re.findall(rf"^{re.escape(name)}(?:{{.*}})? (\S+)$", self.get("/metrics"), re.M)
        if not found:
            raise RuntimeError(
                f"the server exports no {name}; expected a metric of docs/metrics.md, and"
                " --enable-metrics"
            )
        return sum(map(float, found))

    def log_tail(self, lines: int = 60) -> str:
        # SGLang prints all of its arguments in one line of 20,000 characters
        return "\n".join(
            line[:1000] for line in self.log.read_text(errors="replace").splitlines()[-lines:]
        )

    def stop(self, timeout_s: float = 60) -> None:
        """Let the server finish its requests and exit; SIGKILL to what is left after
        `timeout_s`.
        """
        self.process.terminate()
        try:
            self.process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            pass
        self.kill()

    def kill(self) -> None:
        """SIGKILL to the server and everything that it started."""
        try:
            # the group outlives its leader while a member lives
            os.killpg(self.process.pid, signal.SIGKILL)
        except ProcessLookupError:
            pass
        self.process.wait()

    def __enter__(self) -> Server:
        return self

    def __exit__(self, *exc: object) -> None:
        self.kill()

    def _wait_until_healthy(self, timeout_s: float) -> None:
        deadline = time.monotonic() + timeout_s
        while time.monotonic() < deadline:
            if self.process.poll() is not None:
                raise RuntimeError(
                    f"the server exited with {self.process.returncode}:\n{self.log_tail()}"
                )
            try:
                self.get("/health", timeout_s=5)
                return
            except (OSError, urllib.error.URLError):
                time.sleep(0.2)
        raise RuntimeError(f"the server was not healthy after {timeout_s} s:\n{self.log_tail()}")


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def has_gpu() -> bool:
    import torch

    return torch.cuda.is_available()


def main() -> None:
    parser = argparse.ArgumentParser(
        description="Serve a model; further arguments go to sglang.launch_server."
    )
    parser.add_argument("--model", required=True)
    parser.add_argument("--draft")
    parser.add_argument(
        "--algorithm",
        default=None,
        help="EAGLE3 or AURORA; default: AURORA with a draft, else none",
    )
    parser.add_argument("--num-steps", type=int, default=4)
    parser.add_argument("--topk", type=int, default=1)
    parser.add_argument("--port", type=int)
    options, rest = parser.parse_known_args()
    options.algorithm = options.algorithm or ("AURORA" if options.draft else None)
    with Server(**vars(options), args=rest) as server:
        print(f"{server.url} ready after {server.startup_s:.1f} s, log {server.log}", flush=True)
        try:
            server.process.wait()
        except KeyboardInterrupt:
            pass


if __name__ == "__main__":
    main()
