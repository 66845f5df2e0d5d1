"""A server under 32 clients for long: its memory stays, and nothing is left over.

MEGATRAIN_SOAK_SECONDS says for how long; ten minutes: `MEGATRAIN_SOAK_SECONDS=600 pytest -m slow tests/serving/test_soak.py`.
"""

import http.client
import json
import os
import random
import threading
import time

import psutil
import pytest
import served

SECONDS = float(os.environ.get("MEGATRAIN_SOAK_SECONDS", "45"))
CLIENTS = 32


def client(server, number, until, counts):
    """Ask for one thing after the other: whole texts, streams, streams that are left in the middle, nonsense."""
    draw = random.Random(number)
    host, port = server.url.removeprefix("http://").split(":")
    while time.monotonic() < until:
        connection = http.client.HTTPConnection(host, int(port), timeout=60)
        kind = draw.choice(["whole", "stream", "left", "wrong"])
        body = {"prompt": "x" * draw.randint(1, 150), "max_tokens": draw.randint(1, 90), "stream": kind in ("stream", "left")}
        body |= {"n": draw.choice([1, 1, 2]), "logprobs": draw.choice([None, 3])} | (
            {"temperature": "x"} if kind == "wrong" else {}
        )
        connection.request("POST", "/v1/completions", json.dumps(body), {"content-type": "application/json"})
        reply = connection.getresponse()
        if kind == "left":
            reply.read(draw.randint(1, 500))
        else:
            text = reply.read()
            if kind == "stream" and reply.status == 200 and not text.endswith(b"data: [DONE]\n\n"):
                counts["cut"] = counts.get("cut", 0) + 1
        key = f"{kind} {reply.status}"
        counts[key] = counts.get(key, 0) + 1
        reply.close()
        connection.close()


@pytest.mark.slow  # 45 seconds of two cores, or as long as is asked for
@pytest.mark.timeout(SECONDS + 200)
def test_memory_stays_under_32_clients(model, tmp_path, monkeypatch):
    # oneDNN keeps what it has compiled for up to 1,024 numbers of rows, 0.1 MiB each, which takes hours to fill.
    monkeypatch.setenv("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "0")
    with served.running(tmp_path, model, "--log-bytes", "2000000", "--log-files", "2", "--queue", "100") as server:
        process, counts, sizes = psutil.Process(server.job.processes[0].pid), {}, []
        until = time.monotonic() + SECONDS
        threads = [threading.Thread(target=client, args=(server, number, until, counts)) for number in range(CLIENTS)]
        for thread in threads:
            thread.start()
        while time.monotonic() < until:
            time.sleep(min(1.0, SECONDS / 40))
            sizes.append(process.memory_info().rss / 2**20)
        for thread in threads:
            thread.join()
        served.wait_until(lambda: server.get("/health")["open"] == server.get("/health")["blocks_used"] == 0, 2, server)
        assert "Traceback" not in server.said()
    warm, last = max(sizes[: len(sizes) // 3]), max(sizes[-len(sizes) // 10 :])
    shown = ", ".join(f"{size:.0f}" for size in sizes[:: max(1, len(sizes) // 20)])
    print(f"\n{counts}; MiB over time: {shown}")
    assert {key for key in counts if not key.endswith((" 200", "wrong 400"))} == set()
    assert counts["whole 200"] > SECONDS and last - warm < 5 + 0.02 * warm
