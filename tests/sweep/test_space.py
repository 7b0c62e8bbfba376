"""SPACE.yaml: what it may say, and that everything else is an error that names it."""

import copy
import json

import pytest
import yaml

from aqlm_c.sweeps.rows import averaged, best_of, flat, mark_pareto
from aqlm_c.sweeps.space import Range, Space, key_of


def test_lists_are_a_grid(fields):
    space = Space.from_dict(fields)
    assert not space.has_ranges and space.count == 4
    assert space.points()[1] == {"scheme": "1x4g8", "seed": 1}
    config = space.config(space.points()[3], "out", device="cpu")
    assert (config.scheme, config.seed, config.samples, config.out) == ("2x4g8", 1, 8, "out")


def test_parts_are_joined_and_repeated_points_tried_once(fields):
    fields["options"] = {"samples": 2}
    fields["space"] = [{"solver": "ldl", "beam_size": [1, 2]}, {"solver": ["rtn"]}, {"solver": "ldl", "beam_size": 2}]
    points = Space.from_dict(fields).points()
    assert points == [{"solver": "ldl", "beam_size": 1}, {"solver": "ldl", "beam_size": 2}, {"solver": "rtn"}]


def test_method_is_the_other_name_of_solver(fields):
    fields["options"] = {"samples": 2}
    fields["space"] = [{"method": ["aqlm", "rtn"]}, {"solver": "rtn"}]
    points = Space.from_dict(fields).points()
    assert points == [{"solver": "aqlm"}, {"solver": "rtn"}]
    assert [Space.from_dict(fields).config(point, "out").resolve().config.solver for point in points] == ["ldl", "rtn"]
    with pytest.raises(ValueError, match="method: got 'rtn', expected no solver beside it"):
        Space.from_dict({**fields, "options": {"method": "rtn", "solver": "rtn"}})


def test_ranges_are_a_study(fields):
    fields["space"] = {
        "relative_mse_tolerance": {"low": "1e-3", "high": 0.1, "log": True},
        "max_sweeps": {"low": 1, "high": 9, "step": 2},
        "scheme": ["1x4g8"],
    }
    space = Space.from_dict({**fields, "trials": 7})
    (part,) = space.parts
    assert space.has_ranges and space.count == 7
    assert part["relative_mse_tolerance"] == Range("relative_mse_tolerance", 0.001, 0.1, None, True)
    assert part["max_sweeps"].whole
    for point in space.samples(20):
        assert 0.001 <= point["relative_mse_tolerance"] <= 0.1 and point["max_sweeps"] in (1, 3, 5, 7, 9)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"objectiv": ["bits"]}, r"unknown option 'objectiv': did you mean 'objectives'"),
        ({"model": 3}, r"model: got 3"),
        ({"space": {"schem": ["1x4g8"]}}, r"space: unknown option 'schem': did you mean 'scheme'"),
        ({"space": {"model": ["a"]}}, r"space: unknown option 'model'"),
        ({"space": {"scheme": []}}, r"space.scheme: got \[\], expected at least one value"),
        ({"space": {"scheme": ["1x4g8", "no"]}}, r'space: the point {"scheme": "no"}: scheme: got'),
        ({"space": {"scheme": {"low": 1, "high": 2}}}, r"space.scheme: got .* scheme is no number"),
        ({"space": {"ldl_passes": {"low": 1, "hihg": 2}}}, r"space.ldl_passes: unknown option 'hihg'"),
        ({"space": {"ldl_passes": {"low": 1, "high": 2.5}}, "trials": 2}, r"space.ldl_passes.high: got 2.5"),
        ({"space": {"ldl_passes": {"low": 5, "high": 2}}, "trials": 2}, r"more than low"),
        ({"space": {"relative_damp": {"low": 0, "high": 0.1, "log": True}}, "trials": 2}, r"low: got 0, .*log"),
        ({"space": {"ldl_passes": {"low": 0, "high": 2}}}, r"trials: got None, expected a number of trials"),
        ({"space": {"ldl_passes": {"low": -1, "high": 2}}, "trials": 3}, r"ldl_passes: got -1"),
        ({"trials": 3}, r"trials: got 3, expected none: a grid"),
        ({"space": {"error_correction": [0.5]}}, r"error_correction: got 0.5, expected none with statistics"),
        ({"space": [{"solver": ["rtn"], "beam_size": [1]}]}, r"beam_size"),
        ({"options": {"threads": 2}}, r"options: unknown option 'threads'"),
        ({"evaluation": {"data": ["a"], "window": 3}}, r"evaluation: unknown option 'window': did you mean 'windows'"),
        ({"evaluation": {"data": ["a/x.txt", "b/x.txt"]}}, r"evaluation.data: got"),
        ({"evaluation": {}}, r"evaluation.data"),
        ({"objectives": ["speed"]}, r"objectives: got 'speed', expected one of perplexity, kl, bits, bytes, seconds"),
        ({"keep": "some"}, r"keep: got 'some'"),
        ({"lease": 0}, r"lease: got 0"),
        ({"proxy_blocks": 0}, r"proxy_blocks: got 0"),
        ({"space": {"layers": ["mlp"]}, "proxy_blocks": 1}, r"proxy_blocks: got 1, expected none with layers"),
    ],
)
def test_what_is_wrong_is_named(fields, write, change, said):
    with pytest.raises(ValueError, match=said):
        Space.from_dict({**fields, **change})
    with pytest.raises(ValueError, match=r"space.yaml: "):
        Space.from_file(write({**fields, **change}))


def test_a_file_that_is_no_mapping_is_refused(tmp_path):
    (tmp_path / "space.yaml").write_text("- a\n")
    with pytest.raises(ValueError, match=r"space.yaml'.* expected a mapping"):
        Space.from_file(tmp_path / "space.yaml")


def test_every_option_of_a_sweep_is_in_the_documentation(fields):
    from pathlib import Path

    from aqlm_c.sweeps import space

    text = (Path(__file__).parents[2] / "docs" / "sweeps.md").read_text()
    assert [name for name in space._KEYS if f"`{name}`" not in text] == []
    for block in text.split("```yaml\n")[1:]:
        Space.from_dict(copy.deepcopy(yaml.safe_load(block.split("```")[0])))


def test_a_password_is_not_shown(fields):
    space = Space.from_dict({**fields, "storage": "postgresql://me:secret@host/db"})
    assert "secret" not in json.dumps(space.shown()) and "me:***@host" in json.dumps(space.shown())
    assert "secret" not in json.dumps(space.settings())


def row(trial, perplexity, bits, **more):
    params = {"seed": trial}
    return {"key": key_of(params), "trial": trial, "params": params, "state": "complete"} | {
        "perplexity": perplexity,
        "bits": bits,
        **more,
    }


def test_the_front_and_the_best():
    failed = {"key": "f", "trial": 9, "params": {}, "state": "failed", "error": "no"}
    foreign = row(8, 1.0, None, foreign="x.gguf")
    rows = [row(0, 10.0, 2.0), row(1, 9.0, 3.0), row(2, 10.0, 2.5), row(3, 9.0, 3.0), failed, foreign]
    front = [r["trial"] for r in mark_pareto(rows, ("perplexity", "bits")) if r["pareto"]]
    assert front == [0, 1, 3]
    assert best_of(rows, ("perplexity", "bits"))["trial"] == 1
    assert best_of(rows, ("bits", "perplexity"))["trial"] == 0
    assert best_of([failed, foreign], ("perplexity",)) is None


def test_scores_of_texts_are_averaged_by_their_logarithms():
    found = averaged({"a": {"perplexity": 4.0, "kl": 0.1}, "b": {"perplexity": 9.0, "kl": 0.3}})
    assert found == pytest.approx({"perplexity": 6.0, "kl": 0.2})
    assert flat({**row(0, 1.0, 2.0), "scores": {"a": {"kl": 0.5}}})["a.kl"] == 0.5
