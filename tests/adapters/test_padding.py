"""A text has one likelihood, however it is padded; what leaves open where it is, is refused."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import transformers
from torch import Tensor, nn

import ood_monitor as om
from ood_monitor.testing import check_adapter

VOCABULARY, PAD, START, END = 11, 0, 1, 2

SPECIAL = {
    "vocab_size": VOCABULARY,
    "pad_token_id": PAD,
    "bos_token_id": START,
    "eos_token_id": END,
}


class Bigram(nn.Module):
    """Logits of the next token from the last one alone; it takes no mask."""

    def __init__(self) -> None:
        super().__init__()
        self.logits = nn.Embedding(VOCABULARY, VOCABULARY, dtype=torch.float64)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.logits(tokens)  # type: ignore[no-any-return]


class Positions(nn.Module):
    """A causal model of positions and of means over what came, which takes neither mask nor ids."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens = nn.Embedding(VOCABULARY, 6, dtype=torch.float64)
        self.positions = nn.Embedding(40, 6, dtype=torch.float64)
        self.out = nn.Linear(6, VOCABULARY, dtype=torch.float64)

    def forward(self, tokens: Tensor) -> Tensor:
        count = torch.arange(tokens.shape[1], device=tokens.device)
        hidden = (self.tokens(tokens) * self.positions(count)).cumsum(1)
        return self.out((hidden / (count[:, None] + 1)).tanh())  # type: ignore[no-any-return]


def theirs(architecture: str, **options: Any) -> Callable[[], nn.Module]:
    """A small causal model of transformers, in float64."""

    def make() -> nn.Module:
        config = getattr(transformers, f"{architecture}Config")(**SPECIAL | options)
        return getattr(transformers, f"{architecture}ForCausalLM")(config).double().eval()

    return make


def gpt2(**options: Any) -> nn.Module:
    sizes = {"n_positions": 16, "n_embd": 8, "n_layer": 2, "n_head": 2}
    config = transformers.GPT2Config(**{**SPECIAL, **sizes, **options})
    return transformers.GPT2LMHeadModel(config).double().eval()


SIZES = {
    "hidden_size": 8,
    "intermediate_size": 12,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "max_position_embeddings": 16,
}

LONG_ROTARY = {
    "rope_type": "longrope",
    "rope_theta": 1e4,
    "short_factor": [1.0] * 4,
    "long_factor": [4.0] * 4,
    "original_max_position_embeddings": 8,
}
phi3 = theirs(
    "Phi3",
    **SIZES | {"hidden_size": 16},
    rope_parameters=LONG_ROTARY,
    original_max_position_embeddings=8,
)

#: Each with what kind of positions it has, and how far it computes in single precision.
MODELS: dict[str, tuple[Callable[[], nn.Module], float]] = {
    "bigram": (Bigram, 1e-12),
    "positions": (Positions, 1e-12),
    "gpt2": (gpt2, 1e-12),  # learned
    "llama": (theirs("Llama", **SIZES), 1e-12),  # rotary
    "phi3": (phi3, 1e-12),  # rotary, other above a width
    "opt": (
        theirs("OPT", **SIZES, ffn_dim=12, word_embed_proj_dim=8),
        1e-12,
    ),  # learned, from the mask
    "bloom": (theirs("Bloom", hidden_size=8, n_layer=2, n_head=2), 1e-6),  # ALiBi
    "mpt": (theirs("Mpt", d_model=8, n_heads=2, n_layers=1, max_seq_len=16), 1e-6),  # ALiBi
    "mamba": (theirs("Mamba", hidden_size=8, num_hidden_layers=1, state_size=4), 1e-5),  # recurrent
    "mixtral": (
        theirs(
            "Mixtral",
            **SIZES,
            num_key_value_heads=2,
            num_local_experts=4,
            experts_implementation="eager",
        ),
        1e-12,
    ),  # experts
}
every_model = pytest.mark.parametrize("name", MODELS)

#: Columns of padding before and after; the last are beyond the context.
WIDTHS = [(1, 0), (3, 0), (0, 3), (2, 2), (20, 0), (0, 20)]


def texts(n: int = 3, length: int = 6) -> Tensor:
    return torch.randint(3, VOCABULARY, (n, length))


def value(adapter: om.Adapter, batch: Any) -> Tensor:
    [(_, found)] = adapter.log_likelihood(batch)
    return found.total().detach()  # type: ignore[union-attr]


def by_loop(module: nn.Module, text: Tensor, given: int = 1) -> Tensor:
    """Log-likelihood of one text (T,) without padding, token by token."""
    logits = module(text[None])
    log_p = getattr(logits, "logits", logits)[0].detach().log_softmax(-1)
    terms = [log_p[t - 1, text[t]] for t in range(max(given, 1), len(text))]
    return torch.stack(terms).sum()


def masked(module: nn.Module, **options: Any) -> om.SequenceLikelihood:
    """As for what tokenizers give."""
    return om.SequenceLikelihood(
        module,
        inputs=lambda batch: batch["input_ids"],
        condition=lambda batch: {k: v for k, v in batch.items() if k != "input_ids"},
        **options,
    )


def with_mask(tokens: Tensor, left: int, right: int, by: int = PAD) -> dict[str, Tensor]:
    mask = F.pad(torch.ones_like(tokens), (left, right))
    return {"input_ids": F.pad(tokens, (left, right), value=by), "attention_mask": mask}


@every_model
def test_a_text_has_one_likelihood_in_any_width_padded_on_any_side(name: str) -> None:
    make, tolerance = MODELS[name]
    module, x = make(), texts()
    expected = torch.stack([by_loop(module, text) for text in x])
    close = {"rtol": tolerance, "atol": tolerance}
    adapter = om.SequenceLikelihood(module, padding=PAD)
    torch.testing.assert_close(value(adapter, x), expected, **close)
    for left, right in WIDTHS:
        padded = F.pad(x, (left, right), value=PAD)
        torch.testing.assert_close(value(adapter, padded), expected, **close)


@pytest.mark.parametrize("name", [name for name in MODELS if name not in ("bigram", "positions")])
def test_a_text_has_one_likelihood_whatever_a_mask_hides(name: str) -> None:
    make, tolerance = MODELS[name]
    module, x = make(), texts()
    expected = torch.stack([by_loop(module, text) for text in x])
    for by in (PAD, END, 5):
        for left, right in WIDTHS:
            found = value(masked(module), with_mask(x, left, right, by))
            torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)


@every_model
def test_a_text_has_the_same_gradient_norms_in_any_width_padded_on_any_side(name: str) -> None:
    make, tolerance = MODELS[name]
    adapter, x = om.SequenceLikelihood(make(), padding=PAD), texts(2)
    alone = om.gradient_norms(adapter, x[:1])
    for left, right in [(3, 0), (0, 3), (20, 0)]:
        padded = F.pad(x, (left, right), value=PAD)
        norms = {k: v[:1] for k, v in om.gradient_norms(adapter, padded).items()}
        torch.testing.assert_close(norms, alone, rtol=1e3 * tolerance, atol=1e3 * tolerance)


@pytest.mark.parametrize("name", ["positions", "gpt2", "llama", "bloom"])
def test_texts_of_other_lengths_beside_it_change_nothing(name: str) -> None:
    make, tolerance = MODELS[name]
    module, x = make(), [texts(1, n)[0] for n in (2, 7, 4, 5)]
    expected = torch.stack([by_loop(module, text) for text in x])
    adapter = om.SequenceLikelihood(module, padding=PAD)
    sides = [(0, 9), (4, 0), (3, 4), (6, 0)]
    rows = [F.pad(text, side, value=PAD) for text, side in zip(x, sides, strict=True)]
    rows = [F.pad(row, (0, 12 - len(row)), value=PAD) for row in rows]
    torch.testing.assert_close(
        value(adapter, torch.stack(rows)), expected, rtol=tolerance, atol=tolerance
    )


@pytest.mark.parametrize("per_token", [False, True])
def test_positions_that_count_from_the_text_are_kept(per_token: bool) -> None:
    module, x = gpt2(), texts()
    batch = with_mask(x, 6, 0)
    batch["position_ids"] = (batch["attention_mask"].cumsum(1) - 1).clamp_min(0)
    expected = torch.stack([by_loop(module, text) for text in x]) / (5 if per_token else 1)
    adapter = masked(module, padding=PAD, per_token=per_token)
    torch.testing.assert_close(value(adapter, batch), expected)


def test_token_types_move_with_their_tokens() -> None:
    module, x = gpt2(), texts()
    types = torch.randint(3, VOCABULARY, x.shape)
    alone = value(masked(module), with_mask(x, 0, 0) | {"token_type_ids": types})
    for left, right in WIDTHS:
        batch = with_mask(x, left, right) | {"token_type_ids": F.pad(types, (left, right))}
        torch.testing.assert_close(value(masked(module), batch), alone)


def test_a_masked_language_model_does_not_see_padding() -> None:
    module = transformers.BertForMaskedLM(transformers.BertConfig(**SPECIAL | SIZES)).double()
    adapter, x = om.SequenceLikelihood(module.eval(), padding=PAD, shifted=False), texts()
    expected = value(adapter, x)
    for left, right in WIDTHS:
        padded = F.pad(x, (left, right), value=PAD)
        torch.testing.assert_close(value(adapter, padded), expected)


class Translation(nn.Module):
    """Tokens given a source: T5 with what it takes under names of its own."""

    def __init__(self) -> None:
        super().__init__()
        sizes = {"d_model": 8, "d_kv": 4, "d_ff": 12, "num_layers": 1, "num_heads": 2}
        config = transformers.T5Config(**SPECIAL | sizes, decoder_start_token_id=PAD)
        self.model = transformers.T5ForConditionalGeneration(config).double().eval()

    def forward(self, tokens: Tensor, source: Tensor) -> Any:
        return self.model(input_ids=source, decoder_input_ids=tokens, use_cache=False)


def test_a_text_given_a_source_has_one_likelihood() -> None:
    adapter, x, source = masked(Translation(), padding=PAD), texts(), texts(3, 4)
    expected = value(adapter, {"input_ids": x, "source": source})
    for left, right in WIDTHS:
        batch = {"input_ids": F.pad(x, (left, right), value=PAD), "source": source}
        torch.testing.assert_close(value(adapter, batch), expected)


# The end token


@pytest.mark.parametrize("name", ["bigram", "positions", "gpt2", "llama"])
def test_of_padding_by_the_end_token_one_belongs_to_the_text(name: str) -> None:
    make, tolerance = MODELS[name]
    module, x = make(), F.pad(texts(), (0, 1), value=END)
    expected = torch.stack([by_loop(module, text) for text in x])
    adapter = om.SequenceLikelihood(module, padding=END, padding_is_end=True)
    for width in (0, 1, 5, 20):
        padded = F.pad(x, (0, width), value=END)
        torch.testing.assert_close(value(adapter, padded), expected, rtol=tolerance, atol=1e-12)


@pytest.mark.parametrize("ids", [END, [7, END]], ids=str)
def test_the_model_says_what_its_end_token_is(ids: Any) -> None:
    module, x = gpt2(eos_token_id=ids), F.pad(texts(), (0, 1), value=END)
    expected = torch.stack([by_loop(module, text) for text in x])
    adapter = om.SequenceLikelihood(module, padding=END)
    for left, right in [(0, 0), (0, 4), (3, 0), (2, 2)]:  # its start token is another one
        padded = F.pad(x, (left, right), value=END)
        torch.testing.assert_close(value(adapter, padded), expected)


def test_an_end_token_inside_a_text_is_text() -> None:
    module, x = gpt2(), F.pad(texts(), (0, 1), value=END)
    x[:, 3] = END
    expected = torch.stack([by_loop(module, text) for text in x])
    adapter = om.SequenceLikelihood(module, padding=END)
    torch.testing.assert_close(value(adapter, F.pad(x, (0, 4), value=END)), expected)


def test_texts_without_an_end_token_may_be_padded_by_it() -> None:
    module, x = gpt2(), texts()
    expected = torch.stack([by_loop(module, text) for text in x])
    adapter = om.SequenceLikelihood(module, padding=END, padding_is_end=False)
    for left, right in WIDTHS:
        torch.testing.assert_close(value(adapter, F.pad(x, (left, right), value=END)), expected)


def test_a_mask_says_which_end_tokens_are_text() -> None:
    module, x = gpt2(bos_token_id=END), F.pad(texts(), (1, 2), value=END)
    expected = torch.stack([by_loop(module, text) for text in x])
    for options in ({}, {"padding": END}):
        for left, right in WIDTHS:
            found = value(masked(module, **options), with_mask(x, left, right, END))
            torch.testing.assert_close(found, expected)


def test_a_text_cut_short_has_no_end_token() -> None:
    module, x = gpt2(), texts()
    adapter = om.SequenceLikelihood(module, padding=END, padding_is_end=True)
    expected = torch.stack([by_loop(module, text) for text in x])
    torch.testing.assert_close(value(adapter, x), expected)


@pytest.mark.parametrize("eos", [None, 50256])
@pytest.mark.parametrize("pad", [None, END])
def test_a_model_that_does_not_know_its_end_token_is_told_of(eos: Any, pad: Any) -> None:
    module, x = gpt2(eos_token_id=eos, pad_token_id=None), texts()
    with pytest.warns(UserWarning, match=f"padding={PAD} .* names no end token .*_is_end=True"):
        found = value(om.SequenceLikelihood(module, padding=PAD), x)
    said = om.SequenceLikelihood(module, padding=PAD, padding_is_end=False)
    torch.testing.assert_close(value(said, x), found)
    named = om.SequenceLikelihood(gpt2(eos_token_id=eos, pad_token_id=PAD), padding=PAD)
    assert value(named, x).shape == (3,)
    assert value(masked(module, padding=PAD), with_mask(x, 0, 2)).shape == (3,)


# Prompts


@pytest.mark.parametrize("name", ["bigram", "gpt2", "llama"])
@pytest.mark.parametrize("given", [0, 1, 2, 5])
def test_given_tokens_are_seen_but_not_scored(name: str, given: int) -> None:
    make, tolerance = MODELS[name]
    module, x = make(), texts()
    expected = torch.stack([by_loop(module, text, given) for text in x])
    adapter = om.SequenceLikelihood(module, padding=PAD, given=given)
    for left, right in WIDTHS:
        found = value(adapter, F.pad(x, (left, right), value=PAD))
        torch.testing.assert_close(found, expected, rtol=tolerance, atol=1e-12)


def test_each_text_may_have_a_prompt_of_its_own_length() -> None:
    module, x, lengths = gpt2(), texts(), torch.tensor([3, 1, 4])
    expected = [by_loop(module, text, int(n)) for text, n in zip(x, lengths, strict=True)]
    adapter = om.SequenceLikelihood(
        module, padding=PAD, per_token=True, given=lambda batch: batch[1]
    )
    mean = torch.stack(expected) / (6 - lengths)
    for left, right in WIDTHS:
        found = value(adapter, (F.pad(x, (left, right), value=PAD), lengths))
        torch.testing.assert_close(found, mean)


def test_what_is_given_and_what_is_predicted_add_up() -> None:
    module, x = gpt2(), texts()
    prompt = value(om.SequenceLikelihood(module), x[:, :3])
    rest = value(om.SequenceLikelihood(module, given=3), x)
    torch.testing.assert_close(prompt + rest, value(om.SequenceLikelihood(module), x))


def test_the_first_tokens_are_scored_unless_given_where_logits_are_not_shifted() -> None:
    module, x = Bigram(), texts()
    log_p = module(x).log_softmax(-1).gather(-1, x[..., None])[..., 0].detach()
    for given in (0, 1, 3):
        adapter = om.SequenceLikelihood(module, shifted=False, padding=PAD, given=given)
        torch.testing.assert_close(
            value(adapter, F.pad(x, (2, 1), value=PAD)), log_p[:, given:].sum(1)
        )


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (-1, "given of at least 0, got -1"),
        (lambda x: torch.tensor([1, -2, 0]), "from 0 on, got -2"),
        (lambda x: torch.ones(3), "from 0 on, got 1.0 of torch.float32"),
        (lambda x: torch.ones(2).long(), r"integers \(3,\).*shape \(2,\)"),
        (lambda x: [1, 1, 1], r"integers \(3,\).*a list of 3"),
        (6, r"only given or ignored ones in 3 of 3, first at index 0"),
        (
            lambda x: torch.tensor([1, 6, 7]),
            r"only given or ignored ones in 2 of 3, first at index 1",
        ),
    ],
    ids=["negative", "one negative", "real", "too few", "list", "all", "all of some"],
)
def test_given_tokens_that_are_no_lengths_of_prompts_are_refused(given: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        value(om.SequenceLikelihood(Bigram(), given=given), texts())


# What the model takes


@pytest.mark.parametrize("padded", [False, True])
def test_no_cache_is_kept(padded: bool) -> None:
    module, x, caches = gpt2(), F.pad(texts(), (0, 2 * padded), value=PAD), []
    module.register_forward_hook(lambda m, args, output: caches.append(output.past_key_values))
    value(om.SequenceLikelihood(module, padding=PAD), x)
    assert caches == [None]


def test_a_cache_that_the_condition_asks_for_is_kept() -> None:
    module, caches = gpt2(), []
    module.register_forward_hook(lambda m, args, output: caches.append(output.past_key_values))
    value(om.SequenceLikelihood(module, condition=lambda x: {"use_cache": True}), texts())
    assert caches[0] is not None


# Refusals

HOLE = torch.tensor([[3, 4, 5, 6, 7, 8], [3, 4, PAD, 6, 7, 8], [PAD, PAD, 5, 6, PAD, PAD]])


def test_padding_inside_a_text_is_refused() -> None:
    with pytest.raises(ValueError, match=r"some inside it in 1 of 3 rows, first at index 1"):
        value(om.SequenceLikelihood(gpt2(), padding=PAD), HOLE)
    batch = {"input_ids": texts(), "attention_mask": (HOLE != PAD).long()}
    with pytest.raises(ValueError, match=r"some inside it in 1 of 3 rows, first at index 1"):
        value(masked(gpt2()), batch)


def test_a_row_of_nothing_but_padding_or_of_one_token_is_refused() -> None:
    x = texts()
    x[1], x[2, :5] = PAD, PAD
    with pytest.raises(ValueError, match=r"padding only, one token .* in 2 of 3, .* index 1"):
        value(om.SequenceLikelihood(gpt2(), padding=PAD), x)
    with pytest.raises(ValueError, match=r"padding only, one token .* in 2 of 3, .* index 1"):
        value(masked(gpt2()), {"input_ids": texts(), "attention_mask": (x != PAD).long()})


def end(batch: Tensor, **options: Any) -> tuple[om.Adapter, Any]:
    return om.SequenceLikelihood(gpt2(bos_token_id=END), padding=END, **options), batch


ENDED = torch.tensor([[3, 4, END, END], [END, 5, 6, END]])
LEFT = with_mask(torch.tensor([[3, 4, 5], [6, 7, 8]]), 2, 0)

#: An adapter with a batch, and what is said of them.
REFUSED: dict[str, tuple[Callable[[], tuple[om.Adapter, Any]], str]] = {
    "start or padding": (
        lambda: end(ENDED),
        r"no padding=2 before a text, got it in 1 of 2 rows, first at index 1.*`attention_mask`",
    ),
    "start or padding, without a config": (
        lambda: (om.SequenceLikelihood(Bigram(), padding=END, padding_is_end=True), ENDED),
        "no padding=2 before a text",
    ),
    "not ended": (
        lambda: end(torch.tensor([[3, 4, END], [5, 6, 7]])),
        r"end by padding=2.* in 1 of 2 rows, first at index 1.*padding_is_end=False",
    ),
    "positions that count the padding": (
        lambda: (masked(gpt2()), LEFT | {"position_ids": torch.arange(5).expand(2, 5)}),
        "position_ids that count from a text's first token, got 2 .* in 2 of 2 rows",
    ),
    "shared positions": (
        lambda: (masked(gpt2()), LEFT | {"position_ids": torch.arange(5)[None]}),
        "position_ids that count from a text's first token, got 2",
    ),
    "a keyword a token": (
        lambda: (masked(gpt2()), LEFT | {"labels": torch.ones(2, 5).long()}),
        r"padding on the right only beside the keyword 'labels'.*shape \(2, 5\) for 5 tokens",
    ),
    "a mask of pairs": (
        lambda: (masked(gpt2()), LEFT | {"attention_mask": torch.ones(2, 1, 5, 5)}),
        r"attention_mask of the tokens' shape \(2, 5\), got \(2, 1, 5, 5\)",
    ),
    "a mask of the source": (
        lambda: (masked(gpt2()), LEFT | {"attention_mask": torch.ones(2, 4)}),
        r"attention_mask of the tokens' shape \(2, 5\), got \(2, 4\)",
    ),
    "a mask to be added": (
        lambda: (masked(gpt2()), LEFT | {"attention_mask": -1e9 * (LEFT["input_ids"] == PAD)}),
        "attention_mask of 1 for tokens and 0 for padding, got -1e",
    ),
    "a mask that shows padding": (
        lambda: (masked(gpt2(), padding=PAD), LEFT | {"attention_mask": torch.ones(2, 5)}),
        "hides padding=0, got one that shows it.*leave `padding=` out",
    ),
    "a text longer than the context": (
        lambda: (om.SequenceLikelihood(gpt2(), padding=PAD), F.pad(texts(2, 17), (2, 2))),
        "at most 16 tokens, the context of GPT2LMHeadModel, got 17",
    ),
    "texts on both sides of a rotary embedding's change": (
        lambda: (
            om.SequenceLikelihood(phi3(), padding=PAD),
            torch.stack([texts(1, 10)[0], F.pad(texts(1, 4)[0], (0, 6), value=PAD)]),
        ),
        "all of at most 8 tokens or all longer, got lengths from 4 to 10: Phi3ForCausalLM",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_leaves_the_text_open_is_refused(name: str) -> None:
    make, message = REFUSED[name]
    with pytest.raises(ValueError, match=message):
        value(*make())


def test_an_end_token_that_pads_is_named() -> None:
    with pytest.raises(ValueError, match=r"`padding=` with padding_is_end=True, got none"):
        om.SequenceLikelihood(Bigram(), padding_is_end=True)


# The contract


@pytest.mark.parametrize("name", ["positions", "gpt2", "llama"])
def test_padding_keeps_the_contract(name: str) -> None:
    module, x = MODELS[name][0](), F.pad(texts(), (1, 2), value=PAD)
    check_adapter(om.SequenceLikelihood(module, padding=PAD, given=2), x)
    if name != "positions":
        check_adapter(masked(module), with_mask(texts(), 1, 2))
    ended = om.SequenceLikelihood(module, padding=END, padding_is_end=True)
    check_adapter(ended, F.pad(texts(), (0, 2), value=END))


class Sees(Positions):
    """A model that looks ahead: at the mean of all tokens."""

    def forward(self, tokens: Tensor) -> Tensor:
        return super().forward(tokens) + self.tokens(tokens).mean(1).sum(1)[:, None, None] * (
            self.out.weight.sum(1)
        )


def test_a_model_that_sees_padding_breaks_the_contract() -> None:
    with pytest.raises(AssertionError, match=r"same with more padding on the left.*sees padding"):
        check_adapter(om.SequenceLikelihood(Sees(), padding=PAD), texts())


def test_a_text_that_padding_ends_breaks_the_contract() -> None:
    adapter = om.SequenceLikelihood(gpt2(), padding=END, padding_is_end=True)
    with pytest.raises(AssertionError, match=r"on the right.*padding_is_end=False"):
        check_adapter(adapter, texts())


def test_a_network_of_one_width_keeps_the_contract() -> None:
    class Fixed(Positions):
        def forward(self, tokens: Tensor) -> Tensor:
            return super().forward(tokens) + self.positions.weight[:6].sum(1)[:, None]

    check_adapter(om.SequenceLikelihood(Fixed(), padding=PAD), texts())
