"""`run --backend local-completions` over a server that others wrote: `transformers serve`, with bundled weights."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest

from fluid_eval.cli.main import main
from fluid_eval.results.run_folder import read_json, read_samples

for library in ("tenacity", "fastapi", "openai", "uvicorn"):
    pytest.importorskip(library)

TINY = str(Path(__file__).parents[1] / "checkpoints" / "tiny-ar")
TASK = "mini_gsm8k_1"
START_SECONDS = 600
"""The server has to start within them. It takes 10 s on a free core."""


@pytest.fixture(scope="module")
def served(tmp_path_factory) -> Iterator[str]:
    """Address of `transformers serve` over the weights of tiny-ar, in float32."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    words = ["serve", TINY, "--host", "127.0.0.1", "--port", str(port), "--device", "cpu", "--dtype", "float32"]
    log = tmp_path_factory.mktemp("served") / "log"
    with log.open("w") as output:
        server = subprocess.Popen(
            [sys.executable, "-m", "transformers.cli.transformers", *words],
            stdout=output, stderr=subprocess.STDOUT, env={**os.environ, "HF_HUB_OFFLINE": "1"},
        )  # fmt: skip
    address = f"http://127.0.0.1:{port}"
    try:
        deadline = time.monotonic() + START_SECONDS
        while not is_up(address):
            assert server.poll() is None, log.read_text()
            assert time.monotonic() < deadline, log.read_text()
            time.sleep(0.2)
        yield address
    finally:
        server.terminate()
        server.wait(60)


def is_up(address: str) -> bool:
    try:
        with urllib.request.urlopen(f"{address}/health", timeout=5) as response:
            return bool(response.status == 200)
    except OSError:
        return False


@pytest.mark.slow
def test_a_server_of_others_writes_the_text_of_this_engine_s_ar(served, tmp_path, capsys):
    theirs, ours = tmp_path / "served", tmp_path / "ar"
    run = ["run", "--tasks", TASK, "--limit", "4", "--model", TINY]
    args = f"base_url={served}/v1/completions,tokenizer_backend=none,tokenized_requests=False"
    # 0, or 3 where a health gate warns: a model this small fills some answers' limit
    assert main([*run, "--backend", "local-completions", "--backend-args", args, "--out", str(theirs)]) in (0, 3)
    table = capsys.readouterr().out
    assert main([*run, "--decoder", "ar", "--dtype", "float32", "--device", "cpu", "--out", str(ours)]) in (0, 3)

    samples, own = ({one["key"]: one for one in read_samples(folder)} for folder in (theirs, ours))
    assert len(own) == 4
    for key, record in own.items():
        assert samples[key]["output"] == record["output"] != "", key
        assert samples[key]["tokens"] >= len(record["output_ids"]), "a server counts all that it wrote"

    result = read_json(theirs / "result.json")
    line = result["lines"][0]
    assert line["score"] == read_json(ours / "result.json")["lines"][0]["score"]
    seconds = sum(record["seconds"] for record in samples.values())
    assert line["tokens"] == sum(record["tokens"] for record in samples.values())
    assert line["tokens_per_second"] == pytest.approx(line["tokens"] / seconds)
    assert (line["forwards"], line["tokens_per_forward"]) == (None, None)
    (notice,) = result["notices"]
    assert notice == (
        "backend local-completions: tokens are counted as the server counts them; seconds are wall time of its calls; "
        "forwards are not known"
    )
    assert "forwards are not known" in " ".join(table.split())
