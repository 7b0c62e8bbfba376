"""Regular expressions of others' files: they find what `re` finds, and none takes long."""

import random
import re
import time

import pytest

from aqlm_c import patterns
from aqlm_c.format import Rules
from aqlm_c.patterns import Pattern

NAME = "model.layers.61.mlp.experts.255.down_proj"
ATOMS = ["a", "b", ".", "[ab]", "[^a]", r"\d", r"\w", r"\.", "(a|b)", "(?:ab|a)", "^", "$", r"\b", "(?=a)", "(?!b)"]
ATOMS += ["(?:a*b)+", r"\S", "[a-c0-9_]", "(a|)", "[^\\W_]", "(?!.*b)"]
QUANTIFIERS = ["", "", "", "*", "+", "?", "{2}", "{1,3}", "*?"]


@pytest.mark.parametrize("ways", [0, 1024], ids=["program", "as chosen"])
def test_a_pattern_finds_what_re_finds(monkeypatch, ways):
    monkeypatch.setattr(patterns, "_WAYS", ways)
    rng = random.Random(ways)
    for _ in range(1500):
        text = "".join(rng.choice(ATOMS) + rng.choice(QUANTIFIERS) for _ in range(rng.randint(1, 6)))
        try:
            expected = re.compile(text)
        except re.error:
            continue
        try:
            pattern = Pattern("rules", text)
        except ValueError:  # too complex a program
            continue
        for _ in range(4):
            name = "".join(rng.choice("ab.1_x\n") for _ in range(rng.randint(0, 9)))
            assert pattern.found_in(name) == (expected.search(name) is not None), (text, name)


@pytest.mark.parametrize(
    ("text", "found"),
    [
        (r"(([a-z_.0-9])+)+!", False),  # hours by re
        (r"(\w+\.)*\w+!", False),
        (r"(a?){30}a{30}", False),
        (r"(x+x+)+y", False),
        (r"(.*)*(.*)*(.*)*!", False),
        (r"(?=(?=(?=.*m).*o).*d)", True),
        (r".*mlp.*down_proj.*", True),
        (r"^(?!.*layers\.0\.).*mlp", True),
        (r"^model\.layers\.\d+\.self_attn\.(q|k|v|o)_proj$", False),
        (r"layers\.([0-9]|6[0-5])\..*(up|down)_proj", True),
        (r"(?i)MLP", True),
    ],
)
def test_no_pattern_takes_long(text, found):
    started = time.process_time()
    assert Pattern("rules", text).found_in(NAME) == found
    assert time.process_time() - started < 1


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("(", "expected a regular expression: missing"),
        ("(" * 900, "expected a regular expression: "),
        ("a" * 1001, "expected a regular expression of at most 1000 characters"),
        (["a"], r"got \['a'\], expected a regular expression, as text"),
        (r"(a+)+\1", "expected a simpler regular expression: groupref only where"),
        (r"(a{100}){100}b*c*d*", "expected a simpler regular expression: it has more than 500 steps"),
        ("a{99999999999999999999}", "expected a regular expression: "),
    ],
)
def test_what_is_no_pattern_or_no_bounded_one_is_refused(text, words):
    with pytest.raises(ValueError, match=f"^rules: .*{words}"):
        Pattern("rules", text)


def test_rules_are_bounded_too():
    with pytest.raises(ValueError, match="rules: got 20000, expected at most 4096"):
        Rules({f"layers.{n}.": "2x8g8" for n in range(20_000)})
    with pytest.raises(ValueError, match="expected at most 64 patterns"):
        Rules({f"(a+)+{n}": "2x8g8" for n in range(65)})
    for rules in ([[["a"], "2x8g8"]], {1: "2x8g8"}, [["a", "2x8g8"], [{}, "2x8g8"]]):
        with pytest.raises(ValueError, match=r"rules: got .*, expected a regular expression, as text"):
            Rules(rules)
    started = time.process_time()
    assert Rules({f"layers\\.{n}\\.": "2x8g8" for n in range(4096)}).scheme_for(NAME) == "2x8g8"
    assert time.process_time() - started < 5
