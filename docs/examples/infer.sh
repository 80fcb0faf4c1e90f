#!/usr/bin/env bash
# Asks about one image with curl: bash infer.sh cat.jpg [HOST:PORT]
set -euo pipefail
image=$1 server=${2:-127.0.0.1:8000}
export no_proxy=127.0.0.1,localhost,${no_proxy-${NO_PROXY-}}  # this machine is behind no proxy
model=http://$server/v2/models/adaptive_vit
wanted='{"name": "embedding"}'
case $(curl -s "$model") in
  *'"logits"'*) wanted='{"name": "logits", "parameters": {"classification": 3}}' ;;  # it has a head
esac
size=$(wc -c < "$image")
question='{
  "inputs": [{"name": "image_bytes", "shape": [1, 1], "datatype": "BYTES",
              "parameters": {"binary_data_size": '$((4 + size))'}}],
  "outputs": [{"name": "escalated"}, {"name": "score"}, '$wanted']
}'
# Of each element Triton wants its length first: four bytes, the lowest one first.
length=$(printf '\\x%02x' $((size & 255)) $((size >> 8 & 255)) $((size >> 16 & 255)) $((size >> 24)))
{ printf %s "$question"; printf "$length"; cat "$image"; } |
  curl -sS --fail-with-body --data-binary @- -H "Inference-Header-Content-Length: ${#question}" \
    "$model/infer"
