#!/bin/sh
# Speeds on a CPU, each beside the peer at its best: more than an hour of two cores, on which nothing else should run.
#
#     pip install -r benchmarks/requirements.txt && sh benchmarks/cpu_check.sh DATA SMOLLM2 | tee speeds.txt
#
# DATA: a folder with train.jsonl. SMOLLM2: the folder that tools/fetch_smollm2.py writes; without it that row is left out.
# ROUNDS=3 sets the measured turns (5), TEXTS=1000 the answers that are embedded (5000). One that fails does not end it.
cd "$(dirname "$0")/.." || exit 1
data=${1:-../shared/data/medquad} smollm2=$2 rounds=${ROUNDS:-5}
compare() {
    echo && echo "== $*"
    script=$1 && shift
    python "benchmarks/$script.py" --rounds "$rounds" "$@"
}
compare limit --data "$data" --texts 600 --profile
compare train_speed --data "$data" --batch-size 256
[ -n "$smollm2" ] && compare train_speed --data "$data" --batch-size 32 --model "$smollm2"
compare train_speed --data "$data" --batch-size 256 --train-type full
compare train_speed --data "$data" --batch-size 64 --task late
compare embed_speed --data "$data" --texts "${TEXTS:-5000}"
compare rerank_speed --data "$data"
compare quantised_speed --data "$data"
