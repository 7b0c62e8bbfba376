"""`aqlm-c serve` over loopback, asked by OpenAI's own client: tokens are those of `aqlm-c generate`."""

import contextlib
import io
import json
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from tiny import BYTES, byte_tokenizer, tiny_llama

from aqlm_c.cli.main import main
from aqlm_c.hf.models import load_model
from aqlm_c.serving import requests

openai = pytest.importorskip("openai", reason="needs aqlm-c[serve]")
pytest.importorskip("fastapi", reason="needs aqlm-c[serve]")
pytest.importorskip("transformers.cli.serving.completion", reason="needs a transformers that can serve")

from served import served  # noqa: E402

from aqlm_c.serving import generation  # noqa: E402

CHAT = "{% for m in messages %}{% if m['role'] == 'bad' %}{{ raise_exception('no such role') }}{% endif %}"
CHAT += "<{{ m['role'] }}>{{ m['content'] }}{% endfor %}<answer>"
PROMPTS = ["Is it so?", "No, it is not what you think it is.", "x"]
N = 12  # tokens of an answer


def ask(prompt):
    return [{"role": "user", "content": prompt}]


@pytest.fixture(scope="module")
def quantized_dir(tmp_path_factory, one_thread):
    """A tiny quantized Llama whose greedy text is ASCII: a token is a character."""
    path = tmp_path_factory.mktemp("served") / "tiny"
    model = tiny_llama(torch.float32, hidden_size=40, vocab_size=BYTES, tie_word_embeddings=False)
    with torch.no_grad():
        printable = set(byte_tokenizer().convert_tokens_to_ids(list("abcdefghijklmnopqrstuvwxyz ")))
        for token in range(BYTES):
            if token not in printable:
                model.lm_head.weight[token] = 0
        model.lm_head.weight *= 4
    model.save_pretrained(path / "dense")
    byte_tokenizer(chat_template=CHAT).save_pretrained(path / "dense")
    small = ["--scheme", "2x4g8", "--samples", "4", "--sequence-length", "32", "--embeddings", "dense", "--quiet"]
    assert main(["quantize", str(path / "dense"), str(path / "small"), *small, "--preset", "fast"]) == 0
    return path / "small"


@pytest.fixture(scope="module")
def expected(quantized_dir):
    """The greedy text of a prompt by `aqlm-c generate`, for chat and as it is."""

    def text(prompt, *options, n=N):
        command = ["generate", str(quantized_dir), prompt, "--max-new-tokens", str(n), *options]
        with contextlib.redirect_stdout(io.StringIO()) as stdout:
            assert main(command) == 0
        return stdout.getvalue().removesuffix("\n")

    return text


@pytest.fixture(scope="module", params=["one by one", "batched"])
def client(request, quantized_dir):
    with served(quantized_dir, batching=request.param == "batched", batch_tokens=1024) as (client, _):
        yield client


def test_chat_streamed_and_not(client, expected):
    greedy = {"model": "small", "messages": ask(PROMPTS[0]), "temperature": 0, "max_tokens": N}
    answer = client.chat.completions.create(**greedy)
    assert answer.choices[0].message.content == expected(PROMPTS[0])
    assert answer.choices[0].finish_reason == "length"
    assert answer.usage.completion_tokens == N
    pieces = list(client.chat.completions.create(**greedy, stream=True))
    assert "".join(piece.choices[0].delta.content or "" for piece in pieces) == expected(PROMPTS[0])
    assert len(pieces) > 3
    assert pieces[-1].choices[0].finish_reason == "length"


def test_completion(client, expected):
    greedy = {"model": "small", "prompt": PROMPTS[1], "max_tokens": N}  # greedy without being asked: the model is
    assert client.completions.create(**greedy).choices[0].text == expected(PROMPTS[1], "--raw")
    pieces = client.completions.create(**greedy, stream=True)
    assert "".join(piece.choices[0].text for piece in pieces) == expected(PROMPTS[1], "--raw")


def test_requests_at_once(client, expected):
    """Each has its own length, and the answer that it has alone."""

    def answer(asked):
        prompt, n = asked
        made = client.chat.completions.create(model="small", messages=ask(prompt), temperature=0, max_tokens=n)
        return made.choices[0].message.content

    asked = [(prompt, n) for prompt in PROMPTS for n in (1, 40, 2, 20)]
    with ThreadPoolExecutor(len(asked)) as pool:
        answers = list(pool.map(answer, asked))
    whole = {prompt: expected(prompt, n=40) for prompt in PROMPTS}
    assert answers == [whole[prompt][:n] for prompt, n in asked]


def test_stop_and_seed(client, expected):
    whole = expected(PROMPTS[0], "--raw", n=40)
    stop = whole[20:22]
    cut = whole[: whole.index(stop)]
    asked = {"model": "small", "prompt": PROMPTS[0], "max_tokens": 40, "stop": ["§", stop]}
    answer = client.completions.create(**asked)
    assert (answer.choices[0].text, answer.choices[0].finish_reason) == (cut, "stop")
    assert "".join(piece.choices[0].text for piece in client.completions.create(**asked, stream=True)) == cut
    sampled = {"model": "small", "prompt": PROMPTS[0], "max_tokens": 40, "temperature": 1.5}
    texts = [client.completions.create(**sampled, seed=seed).choices[0].text for seed in (1, 1, 2)]
    assert texts[0] == texts[1] != texts[2]
    assert client.completions.create(**sampled, top_p=1e-6).choices[0].text == whole  # the likeliest token alone


def test_default_length_fits_the_positions(client):
    answer = client.completions.create(model="small", prompt="x" * 100)
    assert answer.usage.total_tokens <= 128


BAD = [
    ({"messages": []}, "messages"),
    ({"messages": [{"role": "user"}]}, "content"),
    ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]}, "content"),
    ({"messages": ask("\ud800")}, "messages"),
    ({"temperature": -1}, "temperature"),
    ({"temperature": "hot"}, "temperature"),
    ({"top_p": 0}, "top_p"),
    ({"max_tokens": 0}, "max_tokens"),
    ({"max_tokens": 10**30}, "max_tokens"),
    ({"max_tokens": 1000}, "max_tokens"),  # more than positions
    ({"messages": ask("x" * 500)}, "prompt"),
    ({"messages": [{"role": "bad", "content": "x"}]}, "no such role"),
    ({"n": 2}, "n"),
    ({"stop": ["a"] * 99}, "stop"),
    ({"stop": [""]}, "stop"),
    ({"logit_bias": {"1": 5}}, "logit_bias"),
    ({"generation_config": "{}"}, "generation_config"),
    ({"seed": -1}, "seed"),
    ({"stream": "yes"}, "stream"),
    ({"tools": ["a"]}, "tools"),
    ({"chat_template_kwargs": {"chat_template": "x"}}, "chat_template_kwargs"),
]


@pytest.mark.parametrize(("fields", "name"), BAD, ids=[f"{i}-{name}" for i, (_, name) in enumerate(BAD)])
def test_a_bad_request_is_the_clients_error(client, fields, name):
    body = {"model": "small", "messages": ask("x"), "max_tokens": 2, **fields}
    for streamed in ({}, {"stream": True}) if "stream" not in fields else ({},):
        with pytest.raises(urllib.error.HTTPError) as raised:
            post(client, "chat/completions", json.dumps({**body, **streamed}).encode())
        error = json.load(raised.value)["error"]
        assert raised.value.code == 400, error
        assert name in error["message"]
        assert error["type"] == "invalid_request_error"


def post(client, route, content, kind="application/json"):
    headers = {"content-type": kind}
    return urllib.request.urlopen(urllib.request.Request(f"{client.base_url}{route}", content, headers), timeout=20)


def test_errors_keep_the_server_alive(client, expected):
    for content, kind, code in (
        (b"{", "application/json", 400),
        (b"[]", "application/json", 400),
        (b"[" * 100_000, "application/json", 400),
        (b'{"prompt": "x"}', "text/plain", 415),
        (b" " * (requests.MOST_BYTES + 1), "application/json", 413),
    ):
        with pytest.raises(urllib.error.HTTPError) as raised:
            post(client, "completions", content, kind)
        assert raised.value.code == code
        assert json.load(raised.value)["error"]["message"]
    for name in ("other", "/etc", "org/name"):
        with pytest.raises(openai.NotFoundError, match="small"):
            client.completions.create(model=name, prompt="x")
        with pytest.raises(openai.NotFoundError):
            client.models.retrieve(name)
    for route in ("/load_model", "/reset"):  # of transformers' server: nothing is loaded, nothing unloaded
        with pytest.raises(openai.NotFoundError):
            client.post(route, cast_to=object, body={"model": "small"})
    assert [model.id for model in client.models.list()] == ["small"]
    assert client.models.retrieve("small").owned_by == "local"
    asked = client.completions.create(model="small", prompt=PROMPTS[0], max_tokens=N)
    assert asked.choices[0].text == expected(PROMPTS[0], "--raw")


def test_nan_is_the_servers_error(quantized_dir):
    with served(quantized_dir) as (client, service):
        service.model.lm_head.weight.data[:] = torch.nan
        with pytest.raises(openai.InternalServerError, match="NaN"):
            client.completions.create(model="small", prompt="x")
        with pytest.raises(openai.APIError, match="NaN"):
            list(client.completions.create(model="small", prompt="x", stream=True))


@pytest.mark.parametrize("batching", [False, True], ids=["one by one", "batched"])
def test_who_leaves_is_not_worked_for(quantized_dir, batching, monkeypatch):
    with served(quantized_dir, batching=batching, batch_tokens=1024) as (client, service):
        passes, forward = [], service.model.forward

        def slow(*args, **kwargs):
            passes.append(1)
            time.sleep(0.05)
            return forward(*args, **kwargs)

        monkeypatch.setattr(service.model, "forward", slow)
        asked = {"model": "small", "prompt": "x", "max_tokens": 100}
        with client.completions.create(**asked, stream=True) as stream:
            next(iter(stream))
        with pytest.raises(openai.APITimeoutError):
            client.with_options(timeout=0.3).completions.create(**asked)
        time.sleep(0.3)
        before = len(passes)
        time.sleep(0.5)
        assert len(passes) - before <= 1
        assert before < 100
        assert client.completions.create(**{**asked, "max_tokens": 2}).usage.completion_tokens == 2


def test_stop_texts_in_pieces():
    assert requests.up_to_stop("abc", ()) == ("abc", "", False)
    assert requests.up_to_stop("abc", ("cd", "x")) == ("ab", "c", False)
    assert requests.up_to_stop("abcd", ("cd", "bc")) == ("a", "", True)
    assert requests.up_to_stop("aab", ("aabc",)) == ("", "aab", False)
    shown, held = "", ""
    for letter in "one two\n\nthree":
        piece, held, found = requests.up_to_stop(held + letter, ("\n\n",))
        shown += piece
        if found:
            break
    assert (shown, held) == ("one two", "")


def test_a_model_that_is_not_batched(quantized_dir):
    model, tokenizer, _ = load_model(quantized_dir)
    assert generation.can_batch(model, tokenizer)
    for field, value in (("repetition_penalty", 1.2), ("stop_strings", ["x"])):  # a batch would leave them out
        setattr(model.generation_config, field, value)
        assert not generation.can_batch(model, tokenizer)
        setattr(model.generation_config, field, None)


def test_a_signal_stops_it(quantized_dir):
    command = [sys.executable, "-m", "aqlm_c", "serve", str(quantized_dir), "--port", "0", "--threads", "1"]
    options = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    expected = {signal.SIGTERM: (0, "load ...\n"), signal.SIGINT: (130, "load ...\naqlm-c: stopped\n")}
    with contextlib.ExitStack() as stack:
        processes = {}
        for number, batching in zip(expected, ("--no-batching", "--batching"), strict=True):
            process = stack.enter_context(subprocess.Popen([*command, batching, "--name", "a name"], **options))
            stack.callback(process.kill)
            processes[number] = process
        for number, process in processes.items():
            line = process.stdout.readline()
            assert line.startswith("a name answers at http://127.0.0.1:"), process.stderr.read()
            with openai.OpenAI(base_url=line.split()[4].rstrip(","), api_key="none", max_retries=0) as client:
                stream = client.completions.create(model="a name", prompt="x", max_tokens=100, stream=True)
                next(iter(stream))
                process.send_signal(number)
                with contextlib.suppress(openai.APIError):  # if it was not done by then
                    list(stream)
            stdout, stderr = process.communicate(timeout=120)
            assert (process.returncode, stdout, stderr) == (expected[number][0], "", expected[number][1])


def test_wrong_arguments(quantized_dir, capsys):
    def error(*arguments):
        assert main(["serve", *map(str, arguments)]) == 2
        captured = capsys.readouterr()
        assert captured.out == ""
        return captured.err

    assert "--port: got 99999" in error(quantized_dir, "--port", 99999)
    with socket.create_server(("127.0.0.1", 0)) as taken:
        assert "expected one that is free" in error(quantized_dir, "--port", taken.getsockname()[1])
    assert "--host: got 'no.such.host.invalid'" in error(quantized_dir, "--host", "no.such.host.invalid")
    assert "no such model directory" in error(quantized_dir / "none", "--port", 0)
    assert "--dtype" in error(quantized_dir, "--dtype", "int3", "--port", 0)


def test_a_missing_package_has_its_cure(quantized_dir, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    assert main(["serve", str(quantized_dir)]) == 2
    assert "pip install 'aqlm-c[serve]'" in capsys.readouterr().err
