"""A checkpoint of random weights with the shapes of a large model, to time quantization where there are no weights.

    python benchmarks/random_checkpoint.py OUT --shape 8b
    aqlm-c quantize OUT OUT-2x8g8 --data OUT/tokens.npy --samples 512 --sequence-length 2048

Rows of a matrix are normal with the size 1 / sqrt(in) times exp(0.25 N), and a few columns are larger, as in
trained models. Written block by block, a file each, in bfloat16: the same bits for the same seed and kind of device.
With it come a tokenizer of bytes and `tokens.npy`, random token ids of the whole vocabulary.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, PreTrainedTokenizerFast

ROPE = {  # of Llama 3.1
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
SHAPES = {  # of Llama-3.1-8B and 70B, and one for tests
    "8b": {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32},
    "70b": {"hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80, "num_attention_heads": 64},
    "tiny": {"hidden_size": 64, "intermediate_size": 160, "num_hidden_layers": 2, "num_attention_heads": 8},
}
OUTLIERS, LARGER = 0.002, 8.0  # share of the columns, and how much larger they are


def config_of(shape: str, layers: int | None) -> LlamaConfig:
    """The config of a shape, of so many blocks."""
    sizes = SHAPES[shape] | ({"num_hidden_layers": layers} if layers else {})
    config = LlamaConfig(
        **sizes,
        num_key_value_heads=8,
        vocab_size=512 if shape == "tiny" else 128_256,
        max_position_embeddings=131_072,
        rms_norm_eps=1e-5,
        tie_word_embeddings=False,
        rope_theta=500_000.0,
        rope_scaling=ROPE,
        bos_token_id=None,
        eos_token_id=256,
    )
    config.architectures = ["LlamaForCausalLM"]
    return config


class Weights:
    """Random tensors on a device, each of its own seed."""

    def __init__(self, seed: int, device: torch.device) -> None:
        self.seed, self.device, self.drawn = seed, device, 0

    def generator(self) -> torch.Generator:
        self.drawn += 1
        return torch.Generator(self.device).manual_seed(self.seed * 1_000_003 + self.drawn)

    def matrix(self, rows: int, columns: int) -> torch.Tensor:
        """bfloat16 [rows, columns] in CPU memory."""
        generator, options = self.generator(), {"device": self.device}
        weight = torch.randn(rows, columns, generator=generator, **options).mul_(columns**-0.5)
        weight.mul_(torch.randn(rows, 1, generator=generator, **options).mul_(0.25).exp_())
        count = max(1, int(OUTLIERS * columns))
        weight[:, torch.randperm(columns, generator=generator, **options)[:count]] *= LARGER
        return weight.bfloat16().cpu()

    def norm(self, size: int) -> torch.Tensor:
        return (1 + 0.1 * torch.randn(size, generator=self.generator(), device=self.device)).bfloat16().cpu()


def block(weights: Weights, config: LlamaConfig, index: int) -> dict[str, torch.Tensor]:
    """The tensors of a block, by their names on disk."""
    hidden, wide = config.hidden_size, config.intermediate_size
    few = config.num_key_value_heads * (hidden // config.num_attention_heads)
    shapes = {
        "self_attn.q_proj": (hidden, hidden),
        "self_attn.k_proj": (few, hidden),
        "self_attn.v_proj": (few, hidden),
    }
    shapes |= {"self_attn.o_proj": (hidden, hidden), "mlp.gate_proj": (wide, hidden), "mlp.up_proj": (wide, hidden)}
    shapes |= {"mlp.down_proj": (hidden, wide)}
    tensors = {f"{name}.weight": weights.matrix(*shape) for name, shape in shapes.items()}
    tensors |= {f"{name}.weight": weights.norm(hidden) for name in ("input_layernorm", "post_attention_layernorm")}
    return {f"model.layers.{index}.{name}": tensor for name, tensor in tensors.items()}


def write(out: Path, config: LlamaConfig, weights: Weights) -> int:
    """The files of the model, one for each block; bytes of its tensors."""
    hidden, vocabulary = config.hidden_size, config.vocab_size
    out.mkdir(parents=True)
    n_files, places, total = config.num_hidden_layers + 2, {}, 0
    for number in range(n_files):
        if number == 0:
            tensors = {"model.embed_tokens.weight": weights.matrix(vocabulary, hidden)}
        elif number == n_files - 1:
            tensors = {"model.norm.weight": weights.norm(hidden), "lm_head.weight": weights.matrix(vocabulary, hidden)}
        else:
            tensors = block(weights, config, number - 1)
        file = f"model-{number + 1:05}-of-{n_files:05}.safetensors"
        save_file(tensors, out / file, metadata={"format": "pt"})
        places |= dict.fromkeys(tensors, file)
        total += sum(tensor.nbytes for tensor in tensors.values())
    index = {"metadata": {"total_size": total}, "weight_map": places}
    (out / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
    fields = {**config.to_dict(), "dtype": "bfloat16", "torch_dtype": "bfloat16"}
    (out / "config.json").write_text(json.dumps(fields, indent=2) + "\n", encoding="utf-8")
    return total


def byte_tokenizer(size: int) -> PreTrainedTokenizerFast:
    """A token for each byte, so that any text can be read, and as many more as the model has that no text gives."""
    vocabulary = {symbol: index for index, symbol in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    vocabulary |= {"<eos>": 256} | {f"<{index}>": index for index in range(257, size)}
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<eos>")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path, metavar="OUT", help="directory to write")
    parser.add_argument("--shape", choices=SHAPES, default="8b")
    parser.add_argument("--layers", type=int, help="blocks, if not all")
    parser.add_argument("--tokens", type=int, default=512 * 2048, help="random token ids in tokens.npy")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    options = parser.parse_args()
    started, config = time.perf_counter(), config_of(options.shape, options.layers)
    total = write(options.out, config, Weights(options.seed, torch.device(options.device)))
    byte_tokenizer(config.vocab_size).save_pretrained(options.out)
    ids = np.random.default_rng(options.seed).integers(0, config.vocab_size, options.tokens, dtype=np.int32)
    np.save(options.out / "tokens.npy", ids)
    print(f"{options.out}: {total / 1e9:.2f} GB in {time.perf_counter() - started:.0f} s")


if __name__ == "__main__":
    main()
