"""Training on top of a loaded model: LoRA of PEFT, and Trainer tuning codebooks and scales."""

import subprocess
import sys

import pytest
import torch
import transformers
from safetensors.torch import load_file
from tiny import random_tokens, tiny_llama, write_published
from transformers import AutoModelForCausalLM

import aqlm_c
import aqlm_c.hf

LINEARS = 14  # of the two blocks
TOKENS = random_tokens(2, 12)


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    directory = tmp_path_factory.mktemp("published") / "model"
    write_published(directory, (2, 8, 8, 1), attention_bias=True)
    return directory


@pytest.fixture
def peft():
    return pytest.importorskip("peft")


def load(directory, **options):
    return AutoModelForCausalLM.from_pretrained(directory, **options)


def dense_twin(directory):
    return load(directory).dequantize()


def with_lora(peft, model, targets="all-linear", seed=0, **options):
    """`model` with random adapters; their B is zero else."""
    model = peft.get_peft_model(model, peft.LoraConfig(r=4, target_modules=targets, **options))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in sorted(model.named_parameters()):
            if "lora_" in name:
                parameter.copy_(0.1 * torch.randn(parameter.shape, generator=generator))
    return model


def gradients(model):
    model.zero_grad()
    loss = model(TOKENS, labels=TOKENS).loss
    loss.backward()
    return {name: p.grad for name, p in model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize(
    "targets", ["all-linear", ["q_proj", "down_proj"], r".*layers\.1.*(v_proj|up_proj)"], ids=["all", "list", "regex"]
)
def test_lora_equals_lora_on_the_dequantized_model(directory, peft, targets):
    ours, dense = (with_lora(peft, model, targets) for model in (load(directory), dense_twin(directory)))
    n_layers = {"all-linear": LINEARS}.get(targets, 2) if isinstance(targets, str) else 4
    assert sum(type(module).__name__ == "LoraQuantizedLinear" for module in ours.modules()) == n_layers
    torch.testing.assert_close(ours(TOKENS).logits, dense(TOKENS).logits, rtol=1e-5, atol=1e-5)
    found, expected = gradients(ours), gradients(dense)
    assert found.keys() == expected.keys() and len(found) == 2 * n_layers
    for name in expected:
        torch.testing.assert_close(found[name], expected[name], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("rows", [20, 40])  # on some CPUs, products of 32 rows and more are torch's
def test_lora_in_bfloat16(directory, peft, rows):
    def run(model):
        model = with_lora(peft, model)
        tokens = random_tokens(1, rows)
        output = model(tokens, labels=tokens)
        output.loss.backward()
        return [output.logits.detach()] + [p.grad for p in model.parameters() if p.requires_grad]

    truth = run(dense_twin(directory))
    own = run(dense_twin(directory).bfloat16())
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        found = run(load(directory, dtype=torch.bfloat16))
    finally:
        torch.set_num_threads(threads)

    def error(tensors):
        return sum(float((a.float() - b).norm() / b.norm()) for a, b in zip(tensors, truth, strict=True))

    assert error(found) <= 2 * error(own)


def test_lora_trains_saves_and_loads(directory, tmp_path, peft):
    base = load(directory)
    before = {name: tensor.clone() for name, tensor in base.state_dict().items()}
    model = with_lora(peft, base)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(5):
        losses.append(model(TOKENS, labels=TOKENS).loss)
        optimizer.zero_grad()
        losses[-1].backward()
        optimizer.step()
    assert losses[-1] < 0.9 * losses[0]
    logits = model(TOKENS).logits
    model.save_pretrained(tmp_path / "adapter")
    stored = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    assert len(stored) == 2 * LINEARS and all(".lora_" in name for name in stored)
    again = peft.PeftModel.from_pretrained(load(directory), tmp_path / "adapter")
    assert torch.equal(again(TOKENS).logits, logits)
    native = load(directory)
    native.load_adapter(tmp_path / "adapter")  # transformers' own interface to PEFT
    assert torch.equal(native(TOKENS).logits, logits)

    again.add_adapter("second", peft.LoraConfig(r=2, target_modules="all-linear"))
    again.set_adapter("second")
    assert torch.equal(again(TOKENS).logits, load(directory)(TOKENS).logits)  # its B is zero
    base = model.unload()
    after = base.state_dict()
    assert after.keys() == before.keys() and all(torch.equal(after[name], before[name]) for name in before)
    base.save_pretrained(tmp_path / "base")
    stored, original = (load_file(path / "model.safetensors") for path in (tmp_path / "base", directory))
    assert stored.keys() == original.keys() and all(torch.equal(stored[name], original[name]) for name in original)


def test_merging_is_refused_and_the_cure_it_names_works(directory, tmp_path, peft):
    model = with_lora(peft, load(directory))
    logits = model(TOKENS).logits
    model.save_pretrained(tmp_path)
    for merge in (model.merge_and_unload, model.merge_adapter):
        with pytest.raises(ValueError, match=r"merge: .* AQLM codes.*dequantize"):
            merge()
    assert torch.equal(model(TOKENS).logits, logits)
    merged = peft.PeftModel.from_pretrained(dense_twin(directory), tmp_path).merge_and_unload()
    torch.testing.assert_close(merged(TOKENS).logits, logits, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_gradient_checkpointing(directory, peft, use_reentrant):
    expected = gradients(with_lora(peft, load(directory)).train())
    model = peft.prepare_model_for_kbit_training(
        load(directory), gradient_checkpointing_kwargs={"use_reentrant": use_reentrant}
    )
    assert model.is_gradient_checkpointing and not any(p.requires_grad for p in model.parameters())
    assert model.model.layers[0].mlp.up_proj.codebooks.dtype == torch.float16  # not cast
    runs = []
    model.model.layers[0].mlp.up_proj.register_forward_hook(lambda *_: runs.append(1))
    found = gradients(with_lora(peft, model).train())
    assert len(runs) == 2  # again in the backward pass
    assert found.keys() == expected.keys()
    for name in expected:
        torch.testing.assert_close(found[name], expected[name], rtol=1e-5, atol=1e-7)


LAYER = """
def check():
    from peft import LoraConfig, get_peft_model
    layer = QuantizedLinear(16, 8, False, Format())
    torch.nn.init.zeros_(layer.codes), torch.nn.init.zeros_(layer.codebooks), torch.nn.init.zeros_(layer.scales)
    model = get_peft_model(torch.nn.ModuleDict({"first": layer}), LoraConfig(target_modules=["first"]))
    assert type(model.base_model.model["first"]).__name__ == "LoraQuantizedLinear", model
"""
ORDERS = {
    "peft first": ["import peft", "import aqlm_c.hf", LAYER, "check()"],
    "peft last": ["import aqlm_c.hf", "assert 'peft' not in sys.modules", LAYER, "check()"],
    "no peft": ["sys.modules['peft'] = None", "import aqlm_c.hf"],
}


@pytest.mark.parametrize("order", ORDERS)
def test_import_order(order):
    if order != "no peft":
        pytest.importorskip("peft")
    lines = ["import sys, torch", *ORDERS[order]]
    lines.insert(lines.index("import aqlm_c.hf") + 1, "from aqlm_c import Format, QuantizedLinear")
    done = subprocess.run([sys.executable, "-c", "\n".join(lines)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


# ---- tuning the quantized model itself --------------------------------------------------------------------------


def train(model, out, steps=5):
    """The losses of `steps` steps of Trainer on the same sequences."""
    sequences = [{"input_ids": row, "labels": row} for row in random_tokens(4, 12)]
    arguments = transformers.TrainingArguments(
        out,
        max_steps=steps,
        per_device_train_batch_size=4,
        learning_rate=1e-2,
        logging_steps=1,
        save_strategy="no",
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
    )
    trainer = transformers.Trainer(model, arguments, train_dataset=sequences)
    trainer.train()
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def test_trainer_tunes_codebooks_and_scales_and_nothing_else(directory, tmp_path):
    model = aqlm_c.hf.prepare_model_for_tuning(load(directory))
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    losses = train(model, tmp_path / "out")
    assert len(losses) == 5 and losses[-1] < 0.9 * losses[0]
    changed = {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])}
    assert changed == {name for name in before if name.endswith((".codebooks", ".scales"))}
    assert all(tensor.isfinite().all() for tensor in model.state_dict().values())

    model.eval().save_pretrained(tmp_path / "tuned")
    tuned, info = load(tmp_path / "tuned", output_loading_info=True)
    assert not any(info.values()), info
    for name, tensor in model.state_dict().items():
        assert torch.equal(tuned.state_dict()[name], tensor), name
    assert torch.equal(tuned(TOKENS).logits, model(TOKENS).logits)


def test_a_loaded_model_trains_as_any_other(directory, tmp_path):
    """Every float parameter, unless the user freezes it: here all but the norms."""
    model = load(directory)
    assert all(p.requires_grad == p.is_floating_point() for p in model.parameters())
    model.requires_grad_(False)
    norms = [module for module in model.modules() if "Norm" in type(module).__name__]
    for norm in norms:
        norm.requires_grad_(True)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    train(model, tmp_path, steps=1)
    changed = {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])}
    assert len(changed) == len(norms) and all("norm" in name for name in changed)


def test_tuning_keeps_the_dtype_after_a_quantized_embedding():
    model = tiny_llama(torch.bfloat16, tie_word_embeddings=False)
    fast = {"ldl_passes": 1, "max_sweeps": 1, "finetune_epochs": 0}
    aqlm_c.quantize_model(
        model, TOKENS, aqlm_c.AqlmConfig.from_scheme("1x4g8", rules={"embed_tokens": "1x4g8"}, **fast)
    )
    for _ in range(2):
        aqlm_c.hf.prepare_model_for_tuning(model)
    output = model(TOKENS, labels=TOKENS)
    output.loss.backward()
    assert output.logits.dtype == torch.bfloat16
    assert model.model.embed_tokens.codebooks.grad.dtype == torch.float32


def test_tuning_needs_a_quantized_layer():
    with pytest.raises(ValueError, match="model: got no quantized layer"):
        aqlm_c.hf.prepare_model_for_tuning(transformers.LlamaForCausalLM(transformers.LlamaConfig(
            vocab_size=8, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1
        )))  # fmt: skip


def two_adapters(peft, model, targets=("q_proj", "down_proj")):
    model = with_lora(peft, model)
    model.add_adapter("second", peft.LoraConfig(r=4, target_modules=list(targets)))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in sorted(model.named_parameters()):
            if ".second." in name:
                parameter.copy_(0.1 * torch.randn(parameter.shape, generator=generator))
    return model.eval()


def mixed_batch(peft, model):
    return two_adapters(peft, model)(TOKENS, adapter_names=["default", "second"]).logits


def weighted(peft, model, kind, **options):
    every = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    model = two_adapters(peft, model, every)
    model.add_weighted_adapter(["default", "second"], [0.7, 0.3], "both", kind, **options)
    model.set_adapter("both")
    return model(TOKENS).logits


FEATURES = {
    "one adapter a row": mixed_batch,
    "svd": lambda peft, model: weighted(peft, model, "svd"),
    "ties_svd": lambda peft, model: weighted(peft, model, "ties_svd", density=0.5),
    "linear": lambda peft, model: weighted(peft, model, "linear"),
    "dora": lambda peft, model: with_lora(peft, model, use_dora=True)(TOKENS).logits,
    "orthogonal": lambda peft, model: with_lora(peft, model, init_lora_weights="orthogonal")(TOKENS).logits,
    "embedding": lambda peft, model: with_lora(peft, model, ["embed_tokens", "q_proj"])(TOKENS).logits,
}


@pytest.mark.parametrize("feature", FEATURES)
def test_what_peft_can_do_with_dense_linears(directory, peft, feature):
    with torch.no_grad():
        found, expected = (FEATURES[feature](peft, model) for model in (load(directory), dense_twin(directory)))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("init", ["pissa", "pissa_niter_2", "olora"])
def test_starts_that_change_the_base_weight_are_refused(directory, peft, init):
    with pytest.raises(ValueError, match=r"weight: got .*expected only reading.*AQLM codes.*dequantize"):
        with_lora(peft, load(directory), init_lora_weights=init)
    with_lora(peft, dense_twin(directory), init_lora_weights=init)


@pytest.mark.skipif(not hasattr(transformers, "GgufConfig"), reason="transformers 4 ties weights alone")
def test_lora_on_a_quantized_embedding(peft):
    model = tiny_llama()
    options = {"finetune_epochs": 0, "max_sweeps": 1, "ldl_passes": 1, "init_max_iter": 2}
    config = aqlm_c.AqlmConfig.from_scheme("1x4g8", rules={"embed_tokens": "1x8g8"}, **options)
    aqlm_c.quantize_model(model, TOKENS, config)
    model = with_lora(peft, model, ["embed_tokens"])
    assert type(model.get_input_embeddings()).__name__ == "LoraQuantizedEmbedding"
    adapted = model(TOKENS).logits
    loss = model(TOKENS, labels=TOKENS).loss
    loss.backward()
    gradients = [p.grad for name, p in model.named_parameters() if "lora_" in name]
    assert len(gradients) == 2 and all(gradient.abs().max() > 0 for gradient in gradients)
    with model.disable_adapter():
        assert not torch.allclose(model(TOKENS).logits, adapted)
    with pytest.raises(ValueError, match="merge: an adapter cannot be merged"):
        model.merge_and_unload()


def test_a_model_with_adapters_is_not_quantized(peft):
    config = aqlm_c.AqlmConfig.from_scheme("1x4g8")
    wrapped = peft.get_peft_model(tiny_llama(), peft.LoraConfig(target_modules=["q_proj"]))
    injected = peft.inject_adapter_in_model(peft.LoraConfig(target_modules=["q_proj"]), tiny_llama())
    prompted = peft.get_peft_model(tiny_llama(), peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2))
    for model in (wrapped, injected, prompted):
        with pytest.raises(ValueError, match=r"model: got \w+, which has adapters of PEFT.*merge them first"):
            aqlm_c.quantize_model(model, TOKENS, config)
