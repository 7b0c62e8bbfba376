"""`aqlm-c serve`: what comes before the server, and what it says."""

from __future__ import annotations

import signal
import sys
from pathlib import Path

from ..errors import printable, require, wrong
from .display import Display

_BATCH_TOKENS = 16384  # on a CPU


def check_packages() -> None:
    """Raise an ImportError that says the cure for what the server needs and is not installed."""
    for package in ("fastapi", "uvicorn", "openai", "transformers"):
        require(package)
    try:
        import transformers.cli.serving.completion  # noqa: F401
    except ImportError:
        from transformers import __version__

        raise ValueError(f"transformers: got {__version__}, expected 5.24 or newer for aqlm-c serve") from None


def serve_model(
    model: str,
    address: tuple[str, int],
    dtype: str,
    device: str,
    *,
    name: str | None,
    batching: bool | None,
    batch_tokens: int | None,
    verbose: bool,
) -> int:
    """Load a model and serve it until a signal comes; the exit code: 0 after SIGTERM.

    address: host and port; batching None: on a GPU, where the model can. Raises KeyboardInterrupt after SIGINT and
    ValueError for wrong input.
    """
    from ..core.runtime import find_device
    from ..hf.models import load_model
    from ..serving.generation import can_batch
    from ..serving.server import Service, is_loopback, listen, run, url

    place = find_device(device, "--device")
    with listen(*address) as bound:
        with Display(verbose=verbose) as display:
            display.on_phase("load")
            network, tokenizer, _ = load_model(model, dtype, str(place))
        possible = can_batch(network, tokenizer)
        if batching and not possible:
            raise wrong("--batching", True, "--no-batching for this model: a batch would give other tokens")
        together = possible and (place.type == "cuda" if batching is None else batching)
        if batch_tokens is None and place.type == "cpu":
            batch_tokens = _BATCH_TOKENS
        service = Service(name or Path(model).resolve().name, network, tokenizer, together, batch_tokens)
        how = "many requests at a time" if together else "one request at a time"

        def say(_: object) -> None:  # once a signal would stop it
            print(printable(f"{service.name} answers at {url(bound)}, {how}; Ctrl-C stops it"), flush=True)

        if not is_loopback(bound):
            print("it needs no key: who reaches this address may ask", file=sys.stderr)
        number = run(service, bound, verbose, say)
    if number == signal.SIGINT:
        raise KeyboardInterrupt
    return 0
