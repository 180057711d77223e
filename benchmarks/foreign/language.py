"""Language models: experts, hybrids and encoders with decoders; x-transformers, mambapy."""

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

import ood_monitor as om
from benchmarks.foreign.case import Case, Density, Foreign

__all__ = ["CASES", "log_probability"]

VOCABULARY = 100


def log_probability(logits: Tensor, tokens: Tensor) -> Tensor:
    """The sum over the tokens of log p, (B,)."""
    return -nn.functional.cross_entropy(logits.mT, tokens, reduction="none").sum(1)


def tokens(batch: int, length: int) -> Tensor:
    return torch.randint(2, VOCABULARY, (batch, length))


def causal(
    batch: int,
    *,
    kind: str,
    width: int = 64,
    length: int = 32,
    experts: str | None = None,
    **options: Any,
) -> Case:
    """A language model of transformers, of two layers unless `options` say otherwise.

    Its experts are computed as it does by default, or `"eager"`: one by one.
    """
    import transformers

    sizes = {
        "vocab_size": VOCABULARY,
        "hidden_size": width,
        "intermediate_size": 2 * width,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 1,
    }
    config = getattr(transformers, f"{kind}Config")(**sizes | options)
    net = getattr(transformers, f"{kind.removesuffix('Text')}ForCausalLM")(config)
    if experts is not None:
        net.set_experts_implementation(experts)
    return om.SequenceLikelihood(net), tokens(batch, length)


def mixtral(batch: int, *, width: int = 256, length: int = 128, **options: Any) -> Case:
    return causal(batch, kind="Mixtral", width=width, length=length, num_local_experts=4, **options)


def t5(batch: int, *, width: int = 64, length: int = 16) -> Case:
    import transformers

    config = transformers.T5Config(
        vocab_size=VOCABULARY,
        d_model=width,
        d_kv=width // 4,
        d_ff=2 * width,
        num_layers=2,
        num_heads=4,
        dropout_rate=0.0,
        pad_token_id=0,
        eos_token_id=1,
        decoder_start_token_id=0,
    )
    net = transformers.T5ForConditionalGeneration(config)
    return given_source(net, batch, length)


def bart(batch: int, *, width: int = 64, length: int = 16) -> Case:
    import transformers

    config = transformers.BartConfig(
        vocab_size=VOCABULARY,
        d_model=width,
        encoder_layers=2,
        decoder_layers=2,
        encoder_attention_heads=4,
        decoder_attention_heads=4,
        encoder_ffn_dim=2 * width,
        decoder_ffn_dim=2 * width,
        max_position_embeddings=64,
        dropout=0.0,
    )
    return given_source(transformers.BartForConditionalGeneration(config), batch, length)


def given_source(net: nn.Module, batch: int, length: int) -> Case:
    """Of a target given a source."""

    def log_prob(net: Any, b: dict[str, Tensor]) -> Tensor:
        found = net(input_ids=b["source"], labels=b["target"], use_cache=False)
        return log_probability(found.logits, b["target"])

    return Density(net, log_prob), {
        "source": tokens(batch, length),
        "target": tokens(batch, length),
    }


def masked(batch: int, *, width: int = 64, length: int = 32) -> Case:
    """The pseudo-likelihood of every fourth token, which is masked."""
    import transformers

    config = transformers.BertConfig(
        vocab_size=VOCABULARY,
        hidden_size=width,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=2 * width,
        max_position_embeddings=64,
    )

    def log_prob(net: Any, x: Tensor) -> Tensor:
        hidden = x.clone()
        hidden[:, ::4] = 1
        return log_probability(net(input_ids=hidden).logits[:, ::4], x[:, ::4])

    return Density(transformers.BertForMaskedLM(config), log_prob), tokens(batch, length)


def x_transformer(batch: int, *, width: int = 64, length: int = 32, **options: Any) -> Case:
    from x_transformers import Decoder, TransformerWrapper

    sizes = {"depth": 2, "heads": 4, "attn_dim_head": width // 4}
    layers = Decoder(dim=width, **sizes | options)
    net = TransformerWrapper(num_tokens=VOCABULARY, max_seq_len=64, attn_layers=layers)
    return om.SequenceLikelihood(net), tokens(batch, length)


class Mamba(nn.Module):
    """A language model of mambapy's layers; its own needs kernels of a GPU to be imported."""

    def __init__(self, width: int, **options: Any) -> None:
        from mambapy import mamba

        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, width)
        self.layers = mamba.Mamba(mamba.MambaConfig(d_model=width, n_layers=2, **options))
        self.output = nn.Linear(width, VOCABULARY, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.output(self.layers(self.embedding(x)))
        return logits


def mamba(batch: int, *, width: int = 64, length: int = 32, **options: Any) -> Case:
    return om.SequenceLikelihood(Mamba(width, **options)), tokens(batch, length)


SMALL = {"width": 16, "length": 6}
#: Their grouped matrix products are not there in double precision.
ONE_BY_ONE = {"experts": "eager"}
ROTARY = {"attn_dim_head": 64, "rotary_pos_emb": True, "ff_glu": True, "use_rmsnorm": True}
ROUTED = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 64}
#: By name: a class of transformers, and its options.
EXPERTS: dict[str, tuple[str, dict[str, Any]]] = {
    "Qwen2-MoE": ("Qwen2Moe", ROUTED | {"shared_expert_intermediate_size": 64}),
    "OLMoE": ("Olmoe", {"num_experts": 4, "num_experts_per_tok": 2}),
    "GPT-OSS": ("GptOss", {"num_local_experts": 4, "num_experts_per_tok": 2, "head_dim": 16}),
    "DeepSeek-V3": (
        "DeepseekV3",
        {
            "moe_intermediate_size": 64,
            "n_routed_experts": 8,
            "n_group": 2,
            "topk_group": 1,
            "num_experts_per_tok": 2,
            "num_key_value_heads": 4,
            "q_lora_rank": 16,
            "kv_lora_rank": 16,
            "qk_rope_head_dim": 8,
            "qk_nope_head_dim": 8,
            "v_head_dim": 16,
            "first_k_dense_replace": 1,
        },
    ),
    "Granite MoE": ("GraniteMoe", {"num_local_experts": 4, "num_experts_per_tok": 2}),
    "Jamba": (
        "Jamba",
        {
            "num_experts": 2,
            "num_experts_per_tok": 1,
            "attn_layer_period": 2,
            "attn_layer_offset": 1,
            "expert_layer_period": 2,
            "expert_layer_offset": 1,
            "mamba_d_state": 8,
            "use_mamba_kernels": False,
        },
    ),
    "Qwen3-Next": (
        "Qwen3Next",
        ROUTED
        | {
            "shared_expert_intermediate_size": 64,
            "head_dim": 16,
            "linear_num_key_heads": 2,
            "linear_num_value_heads": 4,
            "linear_key_head_dim": 8,
            "linear_value_head_dim": 8,
            "layer_types": ["linear_attention", "full_attention"],
        },
    ),
}

#: Likewise, without experts.
DENSE: dict[str, tuple[str, dict[str, Any]]] = {
    "Mamba": ("Mamba", {"state_size": 8, "use_mambapy": False}),
    "Mamba 2": ("Mamba2", {"state_size": 8, "num_heads": 4, "head_dim": 32, "n_groups": 1}),
    "RecurrentGemma": (
        "RecurrentGemma",
        {"num_hidden_layers": 3, "lru_width": 64, "attention_window_size": 16},
    ),
    "LFM2": ("Lfm2", {"layer_types": ["conv", "full_attention"]}),
    "Falcon-H1": (
        "FalconH1",
        {"mamba_d_ssm": 64, "mamba_n_heads": 4, "mamba_d_head": 16, "mamba_d_state": 8},
    ),
    "RWKV": ("Rwkv", {"attention_hidden_size": 64}),
    "Gemma 3": ("Gemma3Text", {"head_dim": 16}),
}

#: What computes in single precision whatever its weights are.
IN_SINGLE = {"Mamba", "Mamba 2", "Falcon-H1", "Jamba", "Qwen3-Next"}

CASES: tuple[Foreign, ...] = (
    Foreign("Mixtral 256 x 4, T = 128", "transformers", mixtral, 8, 1.4, SMALL | ONE_BY_ONE),
    Foreign("T5", "transformers", t5, target=4, small=SMALL),
    Foreign("BART", "transformers", bart, small=SMALL),
    Foreign("BERT, masked", "transformers", masked, small=SMALL),
    *(
        Foreign(
            name,
            "transformers",
            partial(causal, kind=kind, **options),
            small={"length": 6} | (ONE_BY_ONE if name in EXPERTS else {}),
            tolerance=1e-5 if name in IN_SINGLE else 1e-8,
        )
        for name, (kind, options) in (EXPERTS | DENSE).items()
    ),
    Foreign("x-transformers", "x_transformers", x_transformer, small=SMALL),
    Foreign(
        "x-transformers, rotary, GLU, RMS norm",
        "x_transformers",
        partial(x_transformer, **ROTARY),
        small=SMALL,
    ),
    Foreign(
        "x-transformers, ALiBi, memory",
        "x_transformers",
        partial(x_transformer, alibi_pos_bias=True, attn_num_mem_kv=4),
        small=SMALL,
    ),
    Foreign("mambapy", "mambapy", partial(mamba, pscan=False), small=SMALL, tolerance=1e-5),
    Foreign("mambapy, parallel scan", "mambapy", mamba, small=SMALL, tolerance=1e-5),
)
