"""The entry point, in a vLLM that is not the one it was written for."""

import importlib.metadata
import logging
import sys
import types

import aqlm_c.vllm


def test_vllm_finds_the_plugin():
    (found,) = [
        point for point in importlib.metadata.entry_points(group="vllm.general_plugins") if point.name == "aqlm_c"
    ]
    assert found.load() is aqlm_c.vllm.register


def test_another_vllm_still_serves_other_models(monkeypatch, caplog):
    """vLLM calls plugins in every process, whatever model it serves: none may raise."""
    methods: list[str] = []
    for name in (
        "vllm",
        "vllm.model_executor",
        "vllm.model_executor.layers",
        "vllm.model_executor.layers.quantization",
    ):
        module = types.ModuleType(name)
        module.__path__ = []
        module.QUANTIZATION_METHODS = methods
        monkeypatch.setitem(sys.modules, name, module)
        parent, _, last = name.rpartition(".")
        if parent:
            monkeypatch.setattr(sys.modules[parent], last, module, raising=False)
    for name in ("config", "linear", "experts"):
        monkeypatch.delitem(sys.modules, f"aqlm_c.vllm.{name}", raising=False)
    with caplog.at_level(logging.WARNING, "aqlm_c"):
        aqlm_c.vllm.register()
    assert methods == [] and "does not go with this one" in caplog.text
