"""`aqlm-c serve` under random requests, streams that are left, and input that is no request, for as long as one likes.

A server of its own process answers four threads. Greedy answers must equal the first one to the same prompt; what is
wrong must be answered by a status of 4xx; nothing may be answered by one of 5xx or with silence; stderr stays empty.
The server's resident memory is printed every 100 requests; the exit code is 1 where, after a warm-up, it grows by more
than 1 MB per 100 requests, where there were 2,000 of them or more.
"""

import argparse
import contextlib
import http.client
import json
import os
import random
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "support"))
os.environ |= {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "OMP_NUM_THREADS": "1"}

THREADS = 4
WARM_UP = 0.25  # share of the requests
MOST_SLOPE, ENOUGH = 1.0, 2000  # MB per 100 requests; requests from which on it says something
CHAT = "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}{% endfor %}<answer>"
PROMPTS = ["Is it so?", "No.", "Tell me of the sea, please.", "ä ö ü \u20ac \U0001f600", "x" * 60]
NASTY = [None, True, -1, 0, 2**63, 1e308, float("nan"), "", "\x00", "\ud800", [], {}, [[]], {"a": {}}, "x" * 10_000]
FIELDS = ["model", "messages", "prompt", "max_tokens", "temperature", "top_p", "seed", "stop", "stream", "n", "tools"]
FIELDS += ["logit_bias", "response_format", "chat_template_kwargs", "generation_config", "echo", "suffix", "no_field"]
ROUTES = ["/v1/chat/completions", "/v1/completions"]


class Wrong(Exception):
    """What must not come of a request."""


class Soak:
    """A server, and what came of the requests to it in `counts`."""

    def __init__(self, arguments, seed, exact=True):
        environment = {**os.environ, "PYTHONFAULTHANDLER": "1"}
        command = [sys.executable, "-m", "aqlm_c", "serve", *arguments, "--port", "0", "--name", "served"]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        self.process = subprocess.Popen(command, env=environment, **pipes)
        line = self.process.stdout.readline()
        if "answers at" not in line:
            raise Wrong(f"no server: {self.process.stderr.read()}")
        self.port = int(line.split("127.0.0.1:")[1].split("/")[0])
        self.seed, self.exact, self.counts, self.samples, self.wrong = seed, exact, Counter(), [], []
        self.lock, self.number, self.answers = threading.Lock(), 0, {}

    def run(self, seconds):
        """Ask for so long; the growth in MB per 100 requests."""
        end = time.monotonic() + seconds
        threads = [threading.Thread(target=self._ask, args=(end,)) for _ in range(THREADS)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return self.slope()

    def _ask(self, end):
        while time.monotonic() < end and not self.wrong:
            with self.lock:
                number = self.number
                self.number += 1
                if number % 100 == 0:
                    self._sample(number)
            rng = random.Random(f"{self.seed}:{number}")
            kind = rng.choices(*zip(*KINDS, strict=True))[0]
            try:
                outcome = kind(self, rng)
            except Exception as error:
                self.wrong.append(f"request {number}, {kind.__name__}: {type(error).__name__}: {error}")
                return
            with self.lock:
                self.counts[f"{kind.__name__.strip('_')}: {outcome}"] += 1

    def _sample(self, number):
        status = Path(f"/proc/{self.process.pid}/status").read_text()
        resident = int(status.split("VmRSS:")[1].split()[0]) * 1024 / 1e6
        self.samples.append((number, resident))
        print(f"{number:7} requests, resident {resident:.1f} MB", flush=True)

    def slope(self):
        """MB per 100 requests, by least squares, without the first requests."""
        kept = self.samples[int(len(self.samples) * WARM_UP) :]
        mean_x, mean_y = (sum(values) / len(kept) for values in zip(*kept, strict=True))
        square = sum((x - mean_x) ** 2 for x, _ in kept)
        return 100 * sum((x - mean_x) * (y - mean_y) for x, y in kept) / square if square else 0.0

    def stop(self):
        """(exit code, stderr) after SIGTERM; with all stacks where it does not end."""
        self.process.send_signal(signal.SIGTERM)
        try:
            _, stderr = self.process.communicate(timeout=120)
        except subprocess.TimeoutExpired:
            self.process.send_signal(signal.SIGABRT)
            _, stderr = self.process.communicate()
        return self.process.returncode, stderr

    def post(self, route, body, read=True, **headers):
        """(status, content) of a request; read False: (status, connection)."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=300)
        try:
            connection.request("POST", route, body, {"content-type": "application/json", **headers})
            answer = connection.getresponse()
            return (answer.status, answer.read()) if read else (answer.status, answer)
        finally:
            if read:
                connection.close()

    def first(self, key, text):
        """Raise unless a greedy answer is what it was before."""
        with self.lock:
            if self.exact and self.answers.setdefault(key, text) != text:
                raise Wrong(f"{key}: got {text!r}, expected {self.answers[key]!r}")


def _body(rng, route, **fields):
    prompt = rng.choice(PROMPTS)
    asked = {"messages": [{"role": "user", "content": prompt}]} if "chat" in route else {"prompt": prompt}
    return {"model": "served", **asked, "max_tokens": rng.choice([1, 8, 20]), "temperature": 0, **fields}


def _greedy(soak, rng):
    route = rng.choice(ROUTES)
    body = _body(rng, route)
    status, content = soak.post(route, json.dumps(body))
    if status != 200:
        raise Wrong(f"{status}: {content}")
    choice = json.loads(content)["choices"][0]
    text = choice["message"]["content"] if "chat" in route else choice["text"]
    soak.first((route, json.dumps(body)), text)
    return status


def _streamed(soak, rng):
    route = rng.choice(ROUTES)
    body = _body(rng, route)
    status, content = soak.post(route, json.dumps({**body, "stream": True}))
    lines = [line[6:] for line in content.decode().split("\n\n") if line]
    if status != 200 or lines[-1] != "[DONE]":
        raise Wrong(f"{status}: {content}")
    choices = [json.loads(line)["choices"][0] for line in lines[:-1]]
    pieces = [choice["delta"].get("content") if "chat" in route else choice["text"] for choice in choices]
    soak.first((route, json.dumps(body), "streamed"), "".join(piece or "" for piece in pieces))
    return status


def _sampled(soak, rng):
    route = rng.choice(ROUTES)
    fields = {"temperature": rng.choice([0.3, 1, 2.0]), "top_p": rng.choice([0.5, 1])}
    fields |= rng.choice([{}, {"seed": rng.randrange(99)}, {"stop": [rng.choice("abcdefgh ")]}])
    status, content = soak.post(route, json.dumps(_body(rng, route, **fields)))
    if status != 200:
        raise Wrong(f"{status}: {content}")
    return status


def _left_stream(soak, rng):
    route = rng.choice(ROUTES)
    body = _body(rng, route, stream=True, max_tokens=60)
    _, answer = soak.post(route, json.dumps(body), read=False)
    for _ in range(rng.randrange(6)):
        answer.readline()
    answer.close()
    return "left"


def _left_early(soak, rng):
    """Half a request, or a whole one whose answer nobody reads."""
    route = rng.choice(ROUTES)
    content = json.dumps(_body(rng, route, max_tokens=60)).encode()
    head = (
        f"POST {route} HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\ncontent-length: {len(content)}\r\n\r\n"
    )
    whole = head.encode() + content
    with socket.create_connection(("127.0.0.1", soak.port), timeout=60) as connection:
        connection.sendall(whole[: rng.choice([len(whole), rng.randrange(len(whole))])])
        if rng.random() < 0.5:
            time.sleep(0.05)
    return "left"


def _noise(soak, rng):
    """What is no HTTP."""
    address = ("127.0.0.1", soak.port)
    with socket.create_connection(address, timeout=60) as connection, contextlib.suppress(ConnectionError):
        connection.sendall(rng.randbytes(rng.randrange(1, 5000)) + b"\r\n\r\n")
        connection.shutdown(socket.SHUT_WR)
        connection.recv(1000)
    return "left"


def _bad(soak, rng):
    """A request that has fields of any kind."""
    route = rng.choice(ROUTES)
    body = _body(rng, route)
    for field in rng.sample(FIELDS, rng.randrange(1, 4)):
        body[field] = rng.choice(NASTY)
    content = json.dumps(body)
    if rng.random() < 0.3:
        content = content[: rng.randrange(len(content))]
    status, answer = soak.post(route, content)
    if status >= 500:
        raise Wrong(f"{status}: {answer} to {content[:500]}")
    if status != 200 and "message" not in json.loads(answer)["error"]:
        raise Wrong(f"{status}: {answer}")
    return status


def _other(soak, rng):
    kinds = [("/v1/nothing", b"{}", {}, 404), ("/v1/completions", b"{}", {"content-type": "text/plain"}, 415)]
    kinds += [("/v1/completions", b'{"model": "org/other", "prompt": "x"}', {}, 404), ("/reset", b"{}", {}, 404)]
    kinds += [("/v1/completions", b" " * (5 << 20), {}, 413)] if rng.random() < 0.1 else []
    route, content, headers, expected = rng.choice(kinds)
    try:
        status, answer = soak.post(route, content, **headers)
    except ConnectionError:  # the rest of what is too large is not read
        status = 413
    if status != expected:
        raise Wrong(f"{status}: {answer}, expected {expected}")
    return status


KINDS = [(_greedy, 20), (_streamed, 20), (_sampled, 10), (_left_stream, 15), (_left_early, 10), (_bad, 20)]
KINDS += [(_noise, 3), (_other, 5)]


def tiny(folder):
    """A tiny quantized model in a new directory."""
    import torch
    from tiny import BYTES, byte_tokenizer, tiny_llama

    from aqlm_c.cli.main import main

    tiny_llama(torch.float32, hidden_size=40, vocab_size=BYTES).save_pretrained(folder / "dense")
    byte_tokenizer(chat_template=CHAT).save_pretrained(folder / "dense")
    small = ["--scheme", "2x4g8", "--samples", "4", "--sequence-length", "32", "--embeddings", "dense", "--quiet"]
    assert main(["quantize", str(folder / "dense"), str(folder / "small"), *small, "--preset", "fast"]) == 0
    return folder / "small"


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--model", help="directory of a model; none: a tiny one")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--batching", action="store_true", help="requests are answered together")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        model = options.model or tiny(Path(folder))
        batching = ["--batching", "--batch-tokens", "2048"] if options.batching else ["--no-batching"]
        exact = not (options.batching and options.model)  # in 16 bits rows of a batch are rounded by its other rows
        soak = Soak([str(model), "--threads", "1", "--device", options.device, *batching], options.seed, exact)
        try:
            slope = soak.run(options.seconds)
        finally:
            code, stderr = soak.stop()
    facts = {"requests": soak.number, "outcomes": dict(sorted(soak.counts.items())), "exit code": code}
    print(json.dumps({**facts, "MB per 100 requests": round(slope, 3)}), flush=True)
    unexpected = stderr.replace("load ...\n", "")
    if soak.wrong or unexpected or code or (slope > MOST_SLOPE and soak.number >= ENOUGH):
        print(*soak.wrong, unexpected, sep="\n", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
