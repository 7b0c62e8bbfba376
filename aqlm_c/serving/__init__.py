"""`aqlm-c serve`: one model behind OpenAI's HTTP API, by the handlers of transformers' own server.

requests.py: what a request may ask for; generation.py: how texts are made, one by one or in a batch that changes with
every token; server.py: routes, errors, signals. The handlers of `transformers.cli.serving` turn messages into tokens
and tokens into answers; whatever of that server loads, unloads or fetches models has no part here.
"""
