#!/usr/bin/env bash
# transformers: `BertTokenizer(vocab_file=...)` does not read the file. It makes a tokenizer of five
# special tokens, says nothing, and gives [UNK] for every word. The keyword is now `vocab`.
#
# Guessed first: the keyword of nine years is read, or refused; its documentation still says that
# without `vocab` the vocabulary is loaded from `vocab_file`, and `from_pretrained` does load it.
#
# Versions: transformers 5.23.0, Python 3.11; run on 2026-11-29.
# Behaviour: `__init__` takes `vocab` and `**kwargs`; `vocab_file` goes into the latter, and without a
# vocabulary the five special tokens are all there is. Models that are told so see a run of the same
# token: their loss is finite and their embeddings are those of [UNK].
# Output seen:
#   vocab_file=  5 tokens  A C D -> 2 1 1 1 3
#   vocab=       8 tokens  A C D -> 2 5 6 7 3
# Source: transformers/models/bert/tokenization_bert.py (BertTokenizer.__init__).
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check \
  'transformers==5.23.0' 'numpy==2.4.1'
cd "$folder"
printf '%s\n' '[PAD]' '[UNK]' '[CLS]' '[SEP]' '[MASK]' A C D > vocab.txt
HF_HUB_OFFLINE=1 TRANSFORMERS_VERBOSITY=warning "$folder/venv/bin/python" -W error - <<'PROGRAM'
from transformers import BertTokenizer

found = {}
for keyword in ("vocab_file", "vocab"):
    tokenizer = BertTokenizer(**{keyword: "vocab.txt"}, do_lower_case=False)
    found[keyword] = tokenizer("A C D")["input_ids"]
    ids = " ".join(map(str, found[keyword]))
    print(f"{keyword + '=':<12} {len(tokenizer)} tokens  A C D -> {ids}")
assert found["vocab"] == [2, 5, 6, 7, 3], "the other keyword has changed"
assert found["vocab_file"] == [2, 1, 1, 1, 3], "the behaviour has changed"
PROGRAM
