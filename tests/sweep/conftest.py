"""A tiny model with its tokenizer, a space over it, and a PostgreSQL server where its programs are installed."""

import glob
import os
import pwd
import shutil
import socket
import subprocess
import tempfile
from pathlib import Path

import pytest
import torch
import yaml
from tiny import BYTES, byte_tokenizer, tiny_llama


@pytest.fixture(scope="session")
def model(tmp_path_factory):
    path = tmp_path_factory.mktemp("models") / "tiny"
    tiny_llama(torch.bfloat16, vocab_size=BYTES, max_position_embeddings=256).save_pretrained(path)
    byte_tokenizer().save_pretrained(path)
    return path


@pytest.fixture
def fields(model):
    """A grid of 4 trials, as in a file."""
    return {
        "model": str(model),
        "options": {
            "preset": "fast",
            "samples": 8,
            "sequence_length": 32,
            "embeddings": "dense",
            "ldl_passes": 1,
            "max_sweeps": 1,
        },
        "space": {"scheme": ["1x4g8", "2x4g8"], "seed": [0, 1]},
        "evaluation": {"data": ["pydoc_data.topics"], "sequence_length": 64, "windows": 4},
        "objectives": ["perplexity", "bits"],
    }


@pytest.fixture
def write(tmp_path):
    def write(fields):
        (tmp_path / "space.yaml").write_text(yaml.safe_dump(fields, sort_keys=False))
        return tmp_path / "space.yaml"

    return write


@pytest.fixture(scope="session")
def postgres():
    """The URL of an empty database of a server that runs as long as the tests."""
    pytest.importorskip("psycopg", reason="psycopg is not installed")
    found = shutil.which("pg_ctl") or next(iter(sorted(glob.glob("/usr/lib/postgresql/*/bin/pg_ctl"))), None)
    if found is None:
        pytest.skip("no PostgreSQL server is installed (pg_ctl)")
    programs, user = os.path.dirname(found), None
    folder = Path(tempfile.mkdtemp(prefix="aqlm_c-postgres-"))  # pytest's own folders are its user's alone
    if os.getuid() == 0:  # as whom no server runs
        try:
            user = pwd.getpwnam("postgres").pw_name
        except KeyError:
            pytest.skip("a PostgreSQL server does not run as root, and there is no user postgres")
        shutil.chown(folder, user)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]

    def call(program, *arguments):
        command = [os.path.join(programs, program), *map(str, arguments)]
        subprocess.run(command, check=True, user=user, cwd=folder, stdout=subprocess.DEVNULL, timeout=60)

    data = folder / "data"
    call("initdb", "-D", data, "-U", "aqlm", "--auth=trust", "--no-sync")
    options = f"-p {port} -c listen_addresses=127.0.0.1 -c unix_socket_directories={folder} -c fsync=off"
    call("pg_ctl", "-D", data, "-w", "-l", folder / "log", "-o", options, "start")
    try:
        yield f"postgresql://aqlm@127.0.0.1:{port}/postgres"
    finally:
        call("pg_ctl", "-D", data, "-m", "immediate", "stop")
        shutil.rmtree(folder, ignore_errors=True)
