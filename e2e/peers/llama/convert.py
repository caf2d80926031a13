"""Writes a Qwen3-MoE checkpoint as GGUF for llama.cpp.

    python gguf_convert.py MODEL_DIR OUT_FILE bf16|q8_0|q4_0

All matrices get the format, as `foregate --quantization` has it for its own; norms and routers stay float32, as
llama.cpp wants them.
"""

import json
import mmap
import struct
import sys
from pathlib import Path

import gguf
import numpy as np

FORMATS = {
    "bf16": (gguf.GGMLQuantizationType.BF16, gguf.LlamaFileType.MOSTLY_BF16),
    "q8_0": (gguf.GGMLQuantizationType.Q8_0, gguf.LlamaFileType.MOSTLY_Q8_0),
    "q4_0": (gguf.GGMLQuantizationType.Q4_0, gguf.LlamaFileType.MOSTLY_Q4_0),
}
# Names within a block: those of the checkpoint, those of GGUF.
BLOCK = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate": "ffn_gate_inp",
}
EXPERTS = {"gate_proj": "ffn_gate_exps", "up_proj": "ffn_up_exps", "down_proj": "ffn_down_exps"}
WHOLE = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}


class Checkpoint:
    """Tensors of one safetensors file, in bfloat16."""

    def __init__(self, path):
        self.file = path.open("rb")
        (length,) = struct.unpack("<Q", self.file.read(8))
        self.header = json.loads(self.file.read(length))
        self.bytes = mmap.mmap(self.file.fileno(), 0, access=mmap.ACCESS_READ)
        self.start = 8 + length

    def bits(self, name):
        """A tensor as the upper halves of float32 numbers."""
        entry = self.header[name]
        if entry["dtype"] != "BF16":
            sys.exit(f"{name}: {entry['dtype']}, expected BF16")
        begin, end = entry["data_offsets"]
        raw = np.frombuffer(self.bytes, np.uint16, (end - begin) // 2, self.start + begin)
        return raw.reshape(entry["shape"])


def floats(bits):
    return (bits.astype(np.uint32) << 16).view(np.float32)


def main():
    model, out, form = Path(sys.argv[1]), sys.argv[2], sys.argv[3]
    kind, file_type = FORMATS[form]
    config = json.loads((model / "config.json").read_text())
    checkpoint = Checkpoint(model / "model.safetensors")
    writer = gguf.GGUFWriter(out, "qwen3moe")
    writer.add_file_type(file_type)
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    add_shape(writer, config)
    add_tokenizer(writer, model)

    def matrix(name, bits):
        if kind == gguf.GGMLQuantizationType.BF16:
            writer.add_tensor(name, bits.view(np.uint8), raw_dtype=kind)
        else:
            writer.add_tensor(name, gguf.quants.quantize(floats(bits), kind), raw_dtype=kind)

    for theirs, ours in WHOLE.items():
        bits = checkpoint.bits(f"{theirs}.weight")
        matrix(f"{ours}.weight", bits) if bits.ndim > 1 else writer.add_tensor(f"{ours}.weight", floats(bits))
    for layer in range(config["num_hidden_layers"]):
        for theirs, ours in BLOCK.items():
            bits = checkpoint.bits(f"model.layers.{layer}.{theirs}.weight")
            name = f"blk.{layer}.{ours}.weight"
            if bits.ndim == 1 or ours == "ffn_gate_inp":
                writer.add_tensor(name, floats(bits))
            else:
                matrix(name, bits)
        for theirs, ours in EXPERTS.items():
            of = [f"model.layers.{layer}.mlp.experts.{expert}.{theirs}.weight" for expert in range(config["num_experts"])]
            matrix(f"blk.{layer}.{ours}.weight", np.stack([checkpoint.bits(name) for name in of]))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def add_shape(writer, config):
    rope = config.get("rope_parameters") or config
    writer.add_name("bench")
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_expert_feed_forward_length(config["moe_intermediate_size"])
    writer.add_expert_count(config["num_experts"])
    writer.add_expert_used_count(config["num_experts_per_tok"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_key_length(config["head_dim"])
    writer.add_value_length(config["head_dim"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_rope_freq_base(rope["rope_theta"])
    writer.add_vocab_size(config["vocab_size"])


def add_tokenizer(writer, model):
    tokenizer = json.loads((model / "tokenizer.json").read_text())
    vocab = sorted(tokenizer["model"]["vocab"].items(), key=lambda entry: entry[1])
    special = {token["id"] for token in tokenizer["added_tokens"]}
    types = gguf.TokenType
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list([token for token, _ in vocab])
    writer.add_token_types([types.CONTROL if at in special else types.NORMAL for _, at in vocab])
    merges = tokenizer["model"]["merges"]
    writer.add_token_merges([merge if isinstance(merge, str) else " ".join(merge) for merge in merges])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_add_bos_token(False)


main()
