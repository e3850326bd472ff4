#!/bin/sh
# What is not known of GPUs: passes compiled and not, beside sentence-transformers with its best token budget.
# Nothing else should use the GPU. Send the whole output as an issue.
#
#     pip install -r benchmarks/requirements.txt && sh benchmarks/gpu_check.sh DATA
#
# DATA: a folder with train.jsonl, or such a file. ROWS=64 sets the batch (256), ROUNDS=9 the measured turns (5); both
# together must not need more rows than there are.
cd "$(dirname "$0")/.." || exit 1
data=${1:-train-data.jsonl} batch=${ROWS:-256} rounds=${ROUNDS:-5}
for model in minilm gemma; do
    for compile in off on; do
        for tokens in 0 auto; do
            echo && echo "== training $model, --compile $compile, --micro-batch-tokens $tokens"
            python benchmarks/train_speed.py --data "$data" --model "$model" --batch-size "$batch" --rounds "$rounds" \
                --compile "$compile" --micro-batch-tokens "$tokens" --peer-tokens 0 16384 65536
        done
        echo && echo "== embedding with $model, --compile $compile"
        python benchmarks/embed_speed.py --data "$data" --model "$model" --rounds "$rounds" --compile "$compile"
    done
done
