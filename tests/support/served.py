"""A server and OpenAI's client for it, in this process, for the tests."""

import contextlib
import threading

import openai

from aqlm_c.hf.models import load_model
from aqlm_c.serving import server


@contextlib.contextmanager
def served(directory, device="cpu", **options):
    """A client of a server in a thread of this process, that serves a model as "small"; gives (client, service)."""
    model, tokenizer, _ = load_model(directory, device=device)
    service, bound = server.Service("small", model, tokenizer, **options), server.listen("127.0.0.1", 0)
    started = {}

    def run():
        server.run(service, bound, on_start=lambda stop: started.update(stop=stop))

    running = threading.Thread(target=run)
    running.start()
    try:
        with openai.OpenAI(base_url=server.url(bound), api_key="none", max_retries=0, timeout=30) as client:
            client.models.list()
            yield client, service
    finally:
        started["stop"](0)
        running.join(30)
        assert not running.is_alive()
