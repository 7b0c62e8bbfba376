"""`aqlm-c export` and `aqlm-c push`."""

import base64
import json
import os
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import ClassVar

import pytest
import torch
from safetensors.torch import load_file
from tiny import BYTES, byte_tokenizer, random_model, random_tokens, tiny_llama
from transformers import AutoModelForCausalLM, MixtralConfig

from aqlm_c.cli.main import main
from aqlm_c.hf.models import load_model

SMALL = ["--samples", "4", "--sequence-length", "32", "--preset", "fast", "--quiet", "--scheme", "2x4g8"]
RULED = ["--embeddings", "1x4g8", "--rule", "layers.0.mlp=1x4g8", "--rule", "v_proj=dense"]


@pytest.fixture(scope="module")
def quantized_dir(tmp_path_factory, one_thread):
    """A tiny float32 Llama with tied embeddings and layers in two schemes."""
    path = tmp_path_factory.mktemp("exported")
    tiny_llama(torch.float32, hidden_size=40, vocab_size=BYTES).save_pretrained(path / "dense")
    byte_tokenizer().save_pretrained(path / "dense")
    assert main(["quantize", str(path / "dense"), str(path / "quantized"), *SMALL, *RULED]) == 0
    return path / "quantized"


@pytest.fixture(scope="module")
def logits(quantized_dir):
    with torch.no_grad():
        return load_model(quantized_dir)[0](random_tokens(2, 16)).logits


def exported(quantized_dir, tmp_path, *options):
    assert main(["export", str(quantized_dir), str(tmp_path / "out"), *options]) == 0
    return tmp_path / "out"


def test_dense_is_what_the_codes_decode_to(quantized_dir, logits, tmp_path, capsys):
    out = exported(quantized_dir, tmp_path, "--dense")
    assert "dense, float32" in capsys.readouterr().out
    assert "quantization_config" not in json.loads((out / "config.json").read_text())
    tensors = load_file(out / "model.safetensors")
    assert all(name.endswith("weight") and tensor.dtype == torch.float32 for name, tensor in tensors.items())
    assert "lm_head.weight" not in tensors  # tied
    model = AutoModelForCausalLM.from_pretrained(out)
    with torch.no_grad():
        torch.testing.assert_close(model(random_tokens(2, 16)).logits, logits, rtol=1e-4, atol=1e-4)
    assert "Codes would take" in (out / "README.md").read_text()
    assert {"report.json", "run.yaml", "tokenizer.json"} <= {path.name for path in out.iterdir()}


def test_dense_in_another_dtype(quantized_dir, logits, tmp_path):
    out = exported(quantized_dir, tmp_path, "--dense", "--dtype", "bfloat16")
    assert json.loads((out / "config.json").read_text())["dtype"] == "bfloat16"
    assert {tensor.dtype for tensor in load_file(out / "model.safetensors").values()} == {torch.bfloat16}
    with torch.no_grad():
        found = AutoModelForCausalLM.from_pretrained(out)(random_tokens(2, 16)).logits.float()
    assert 1e-5 < (found - logits).norm() / logits.norm() < 0.02


def test_aqlm_has_one_scheme_and_no_other_code(quantized_dir, logits, tmp_path, capsys):
    out = exported(quantized_dir, tmp_path, "--aqlm")
    assert "2x4g8, 9 layers in codes" in capsys.readouterr().out
    config = json.loads((out / "config.json").read_text())["quantization_config"]
    assert config["quant_method"] == "aqlm" and "rules" not in config
    assert (config["num_codebooks"], config["nbits_per_codebook"], config["in_group_size"]) == (2, 4, 8)
    tensors, before = load_file(out / "model.safetensors"), load_file(quantized_dir / "model.safetensors")
    codes = {name for name in tensors if name.endswith(".codes")}
    assert codes == {name for name, tensor in before.items() if name.endswith(".codes") and tensor.shape[-1] == 2}
    assert all(torch.equal(tensors[name], before[name]) for name in codes)
    for name in ("model.embed_tokens.weight", "model.layers.0.mlp.up_proj.weight", "lm_head"):
        assert name in config["linear_weights_not_to_quantize"]
    model, _, source = load_model(out)
    assert source.quantized
    with torch.no_grad():
        torch.testing.assert_close(model(random_tokens(2, 16)).logits, logits, rtol=1e-4, atol=1e-4)
    assert main(["inspect", str(out), "--check"]) == 0


def test_wrong_exports(quantized_dir, tmp_path, capsys):
    def error(*arguments):
        assert main(["export", *map(str, arguments)]) == 2
        return capsys.readouterr().err

    out = tmp_path / "out"
    assert "none of --dense and --aqlm" in error(quantized_dir, out)
    assert "both of --dense and --aqlm" in error(quantized_dir, out, "--dense", "--aqlm")
    assert "--dtype: got 'bfloat16', expected auto with --aqlm" in error(
        quantized_dir, out, "--aqlm", "--dtype", "bfloat16"
    )
    assert "expected a model in codes" in error(quantized_dir.parent / "dense", out, "--aqlm")
    assert not out.exists()
    assert "which exists" in error(quantized_dir, quantized_dir, "--dense")
    assert "holds MODEL" in error(quantized_dir, quantized_dir, "--dense", "--overwrite")


class Hub(BaseHTTPRequestHandler):
    """As much of the hub as a commit of small files needs."""

    files: ClassVar[dict]
    asked: ClassVar[list]

    def do_POST(self):
        content = self.rfile.read(int(self.headers.get("content-length") or 0))
        assert self.headers["authorization"] == "Bearer hf_a-token"
        self.asked.append(self.path)
        answer = {}
        if self.path == "/api/repos/create":
            fields = json.loads(content)
            if fields["name"] == "taken":
                return self.say(403, {"error": "you may not"})
            name = f"{fields['organization']}/{fields['name']}"
            answer = {"url": f"http://{self.headers['host']}/{name}", "id": name}
        elif "/preupload/" in self.path:
            wanted = json.loads(content)["files"]
            answer = {"files": [{"path": f["path"], "uploadMode": "regular", "shouldIgnore": False} for f in wanted]}
        elif "/commit/" in self.path:
            for line in map(json.loads, content.splitlines()):
                if line["key"] == "file":
                    self.files[line["value"]["path"]] = base64.b64decode(line["value"]["content"])
            answer = {"commitUrl": f"http://{self.headers['host']}/me/tiny/commit/1", "commitOid": "1", "success": True}
        self.say(200, answer)

    def do_GET(self):
        self.say(200, {})

    def say(self, status, answer):
        content = json.dumps(answer).encode()
        self.send_response(status)
        self.send_header("content-type", "application/json")
        self.send_header("content-length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *_):
        pass


@pytest.fixture
def hub():
    """(address, files by name, routes asked) of a hub on this machine."""
    kind = type("OneHub", (Hub,), {"files": {}, "asked": []})
    with ThreadingHTTPServer(("127.0.0.1", 0), kind) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}", kind.files, kind.asked
        server.shutdown()
        thread.join()


def test_push(quantized_dir, hub, tmp_path, capsys):
    address, files, asked = hub
    (quantized_dir / ".hidden").write_text("not a file of the model")
    code = "import sys; from aqlm_c.cli.main import main; sys.exit(main(['push', *sys.argv[1:]]) + "
    code += "10 * main(['push', sys.argv[1], 'me/taken', '--quiet']))"
    environment = {**os.environ, "HF_ENDPOINT": address, "HF_TOKEN": "hf_a-token", "HF_HUB_OFFLINE": "0"}
    environment |= {"HF_HOME": str(tmp_path), "HF_HUB_DISABLE_XET": "1", "NO_PROXY": "127.0.0.1"}
    command = [sys.executable, "-c", code, str(quantized_dir), "me/tiny", "--quiet"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 20, done.stderr
    assert done.stdout == f"{address}/me/tiny/commit/1\n"
    assert "NAME: got 'me/taken', which the hub does not take" in done.stderr
    assert any(path.startswith("/api/models/me/tiny/commit/main") for path in asked)
    own = {path.name: path.read_bytes() for path in quantized_dir.iterdir() if path.name != ".hidden"}
    assert files.keys() == own.keys()
    assert files["README.md"] == own["README.md"].replace(b"THIS_REPOSITORY", b"me/tiny") != own["README.md"]
    assert all(files[name] == own[name] for name in own if name != "README.md")


def test_what_is_not_pushed(quantized_dir, tmp_path, capsys):
    assert main(["push", str(quantized_dir), "no-owner"]) == 2
    assert "expected owner/name" in capsys.readouterr().err
    (tmp_path / "config.json").write_text("{}")
    assert main(["push", str(tmp_path), "me/tiny"]) == 2
    assert main(["push", str(tmp_path / "none"), "me/tiny"]) == 2
    for name in ("config.json", "model.safetensors"):
        (tmp_path / name).write_bytes((quantized_dir / name).read_bytes())
    (tmp_path / "notes.doc").write_text("mine")
    capsys.readouterr()
    assert main(["push", str(tmp_path), "me/tiny"]) == 2
    assert "notes.doc is none" in capsys.readouterr().err


def test_experts(tmp_path):
    """Of dense weights they are joined again where transformers joins them; in codes they stay apart."""
    sizes = {"vocab_size": BYTES, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1}
    sizes |= {"num_attention_heads": 4, "num_key_value_heads": 2, "num_local_experts": 4, "num_experts_per_tok": 2}
    model = random_model(MixtralConfig(**sizes, max_position_embeddings=64, initializer_range=0.1))
    model.save_pretrained(tmp_path / "dense")
    byte_tokenizer().save_pretrained(tmp_path / "dense")
    quantize = ["quantize", str(tmp_path / "dense"), str(tmp_path / "quantized"), *SMALL, "--rule", "experts.1.=1x4g8"]
    assert main([*quantize, "--embeddings", "dense"]) == 0
    ids = random_tokens(2, 16)
    with torch.no_grad():
        expected = load_model(tmp_path / "quantized")[0](ids).logits
        for option in ("--dense", "--aqlm"):
            assert main(["export", str(tmp_path / "quantized"), str(tmp_path / option[2:] / "out"), option]) == 0
            found, _, source = load_model(tmp_path / option[2:] / "out")
            assert source.quantized == (option == "--aqlm")
            torch.testing.assert_close(found(ids).logits, expected, rtol=1e-4, atol=1e-4)
    config = json.loads((tmp_path / "aqlm" / "out" / "config.json").read_text())["quantization_config"]
    assert "rules" not in config and config["num_codebooks"] == 2
