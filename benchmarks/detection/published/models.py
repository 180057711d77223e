"""Antibody language models as packages carry them, under adapters.

The weights are PyTorch's own format, of which tensors alone are read. `iglm` is for non-commercial
use, `antiberty` has the MIT licence; neither's own code is run: that of `iglm` 0.1.0 fails under
transformers 5, whose tokenizer does not read its vocabulary.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor

import ood_monitor as om
from benchmarks.detection.published.sequences import RESIDUES

PAD, END, START = "[PAD]", "[SEP]", "[CLS]"


@dataclass(frozen=True)
class Language:
    """A model of sequences.

    Attributes:
        adapter: Of tokens as `tokens` gives them; in nats a token.
        vocabulary: Numbers of tokens.
        prompt: Tokens before a sequence.
        causal: Whether it generates.
    """

    adapter: om.SequenceLikelihood
    vocabulary: dict[str, int]
    prompt: tuple[str, ...]
    causal: bool

    def tokens(self, sequences: list[str]) -> Tensor:
        """Padded on the right, (B, T)."""
        rows = [
            torch.tensor([self.vocabulary[each] for each in (*self.prompt, *sequence, END)])
            for sequence in sequences
        ]
        padding = self.vocabulary[PAD]
        return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=padding)

    @torch.no_grad()
    def generated(self, count: int, temperature: float, seed: int) -> list[str]:
        """Samples of its own, of residues until the end, at most 148 of them."""
        generator = torch.Generator().manual_seed(seed)
        allowed = torch.tensor([self.vocabulary[each] for each in (*RESIDUES, END)])
        letters = (*RESIDUES, "")
        tokens = torch.tensor([[self.vocabulary[each] for each in self.prompt]] * count)
        found, going, cache = [""] * count, [True] * count, None
        module: Any = self.adapter.module
        for _ in range(148):
            output = module(tokens, past_key_values=cache, use_cache=True)
            cache = output.past_key_values
            p = (output.logits[:, -1, allowed].double() / temperature).softmax(-1)
            drawn = torch.multinomial(p, 1, generator=generator)
            tokens = allowed[drawn]
            for i, k in enumerate(drawn[:, 0].tolist()):
                going[i] = going[i] and letters[k] != ""
                found[i] += letters[k] if going[i] else ""
            if not any(going):
                break
        return [each for each in found if each]


def folder_of(package: str) -> Path:
    """Where a package is installed, without importing it."""
    spec = find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise ModuleNotFoundError(f"Expected {package}, got none: run `make published`.")
    return Path(spec.submodule_search_locations[0]) / "trained_models"


def vocabulary_of(folder: Path) -> dict[str, int]:
    return {word: i for i, word in enumerate((folder / "vocab.txt").read_text().split())}


def weights_of(folder: Path) -> dict[str, Tensor]:
    file = folder / "pytorch_model.bin"
    found: dict[str, Tensor] = torch.load(file, weights_only=True, map_location="cpu")
    return found


def iglm(name: str, species: str = "HUMAN") -> Language:
    """A GPT of antibody chains, told that they are heavy chains of a species."""
    folder = folder_of("iglm")
    config = json.loads((folder / name / "config.json").read_text())
    vocabulary = vocabulary_of(folder)
    ends = {"bos_token_id": None, "eos_token_id": vocabulary[END], "pad_token_id": vocabulary[PAD]}
    net = transformers.GPT2LMHeadModel(transformers.GPT2Config(**config | ends))
    checked(net.load_state_dict(weights_of(folder / name), strict=False))
    prompt = ("[HEAVY]", f"[{species}]")
    adapter = om.SequenceLikelihood(
        net.eval(), per_token=True, padding=vocabulary[PAD], given=len(prompt)
    )
    return Language(adapter, vocabulary, prompt, causal=True)


def antiberty() -> Language:
    """A BERT of antibody chains, which sees each residue that it predicts: no likelihood."""
    folder = folder_of("antiberty")
    file = folder / "AntiBERTy_md_smooth"
    config = transformers.BertConfig(**json.loads((file / "config.json").read_text()))
    net = transformers.BertForMaskedLM(config)
    checked(net.load_state_dict(weights_of(file), strict=False))
    vocabulary = vocabulary_of(folder)
    adapter = om.SequenceLikelihood(
        net.eval(), shifted=False, per_token=True, padding=vocabulary[PAD], given=1,
        padding_is_end=False,
    )  # fmt: skip
    return Language(adapter, vocabulary, (START,), causal=False)


def tiny(species: str = "HUMAN") -> Language:
    """A GPT of random weights, for a quick run."""
    words = (PAD, "[UNK]", START, END, "[MASK]", *RESIDUES, "[HUMAN]", "[MOUSE]", "[HEAVY]")
    vocabulary = {word: i for i, word in enumerate(words)}
    config = transformers.GPT2Config(
        vocab_size=len(words), n_positions=160, n_embd=16, n_layer=2, n_head=2,
        bos_token_id=None, eos_token_id=vocabulary[END], pad_token_id=vocabulary[PAD],
    )  # fmt: skip
    torch.manual_seed(0)
    net = transformers.GPT2LMHeadModel(config).eval()
    adapter = om.SequenceLikelihood(net, per_token=True, padding=vocabulary[PAD], given=2)
    return Language(adapter, vocabulary, ("[HEAVY]", f"[{species}]"), causal=True)


def checked(result: Any) -> None:
    """Refuse weights that lack one of the model's.

    Raises:
        ValueError: One is lacking.
    """
    if lacking := list(lacking_of(result)):
        raise ValueError(f"Expected all weights of the model, got none for {lacking}.")


def lacking_of(result: Any) -> Iterator[str]:
    """But for what is tied to another, or made anew."""
    tied = ("lm_head.weight", "decoder.bias", "decoder.weight", "position_ids")
    return (name for name in result.missing_keys if not name.endswith(tied))
