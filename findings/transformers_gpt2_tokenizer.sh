#!/usr/bin/env bash
# transformers 5.24.0: AutoTokenizer on a folder of model_type gpt2 does not use the folder's tokenizer.json as it is.
#
# A reader expects: tokenizer.json is the whole tokenizer, so AutoTokenizer splits text as the tokenizers library does.
# Seen: its pre-tokenizer (here: single digits) is replaced by GPT-2's, so the same text has other ids, and a token
# <|endoftext|> is added whose id lies past the model's vocabulary. With tokenizer_class PreTrainedTokenizerFast in
# tokenizer_config.json it is used as it is.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/env"
"$work/env/bin/python" -m pip install -q --disable-pip-version-check transformers==5.24.0 tokenizers==0.23.2
cat >"$work/run.py" <<'PYTHON'
import json
import tempfile
from pathlib import Path

import transformers
from tokenizers import Tokenizer, models, pre_tokenizers

print('transformers', transformers.__version__)
vocabulary = {token: i for i, token in enumerate(['a', 'b', 'ab', '1', '2', '12'])}
tokenizer = Tokenizer(models.BPE(vocabulary, [('a', 'b'), ('1', '2')]))
tokenizer.pre_tokenizer = pre_tokenizers.Digits(individual_digits=True)
print('tokenizers', tokenizer.encode('ab12').ids, 'of', tokenizer.get_vocab_size())
with tempfile.TemporaryDirectory() as folder:
    tokenizer.save(folder + '/tokenizer.json')
    ids = {'bos_token_id': None, 'eos_token_id': None}
    Path(folder, 'config.json').write_text(json.dumps({'model_type': 'gpt2', 'vocab_size': len(vocabulary)} | ids))
    for tokenizer_config in ({}, {'tokenizer_class': 'PreTrainedTokenizerFast'}):
        Path(folder, 'tokenizer_config.json').write_text(json.dumps(tokenizer_config))
        loaded = transformers.AutoTokenizer.from_pretrained(folder)
        print('AutoTokenizer', tokenizer_config, loaded('ab12').input_ids, 'of', len(loaded), 'eos', loaded.eos_token)
PYTHON
"$work/env/bin/python" "$work/run.py" 2>"$work/log" | tee "$work/seen" || { cat "$work/log" >&2; exit 1; }
diff "$work/seen" - <<'SEEN' || { echo "changed: the lines above differ from what was seen before" >&2; exit 1; }
transformers 5.24.0
tokenizers [2, 3, 4] of 6
AutoTokenizer {} [2, 5] of 7 eos <|endoftext|>
AutoTokenizer {'tokenizer_class': 'PreTrainedTokenizerFast'} [2, 3, 4] of 6 eos None
SEEN
