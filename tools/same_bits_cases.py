"""What same_bits.py runs: the table of cases.

A command is one line. `train.py ...` is the checkout's own script; {inputs} is what same_bits_inputs.py made, {query}
one of its queries, {folder} the case's own folder, which is the current one: what a command writes is named relative to
it. What a command prints is compared, too.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Case:
    """Commands that follow each other in one folder, all of whose files are compared.

    plain: run a second time with MLX_RETRIEVAL_PLAIN=1. code: the exit code that every command is to end with; where
    it is not 0, what stands on stderr is compared as well. here: the current folder is the checkout.
    """

    name: str
    commands: tuple[str, ...]
    plain: bool = True
    code: int = 0
    here: bool = False


SMALL = "--eval-tasks {inputs}/eval --seed 7 --lora-rank 4 --learning-rate 1e-3"
PARTS = "--batch-size 12 --gradient-accumulation-steps 3"
RUN = f"{SMALL} {PARTS} --steps 4 --eval-steps 2 --save-steps 2 --output run"
DROPOUT = "--lora-dropout 0.1"
RERANK = "--query '{query}' --documents {inputs}/documents.jsonl --top-n 12 --json"
QUERIES = "--input {inputs}/eval/queries.jsonl --prompt query"
CORPUS = "--input {inputs}/eval/corpus.jsonl"
MINED = "--data {inputs}/rows.jsonl --corpus {inputs}/eval/corpus.jsonl"

WARM_UP = Case("warm-up", (f"train.py --data {{inputs}}/rows.jsonl {PARTS} --steps 1 --eval-tasks --output run",))
CASES = (
    Case("help", tuple(f"{name}.py --help" for name in ("train", "eval", "embed", "rerank", "export")), plain=False),
    Case("help-of-subcommands", tuple(
        f"{name} --help" for name in ("search.py", "search.py index", "search.py search", "search.py eval", "mine.py",
                                      "mine.py code", "mine.py negatives", "mine.py score")
    ), plain=False),
    Case("mistakes", (
        "train.py --model nowhere --data {inputs}/rows.jsonl",
        "train.py --data missing.jsonl",
        "train.py --data {inputs}/bad.jsonl --output run",
        "eval.py --model gemma-3-tiny-mlx --eval-tasks ./none",
        "embed.py --model {inputs}/bert --max-length 5000 --input {inputs}/eval/corpus.jsonl --output x.npy",
        "search.py search anything",
        "export.py --adapter nowhere --output out",
        "mine.py negatives --data {inputs}/rows.jsonl --by both --output out.jsonl",
    ), plain=False, code=2),
    Case("check", ("embed.py --check gemma-3-tiny-mlx", "embed.py --check {inputs}/bert"), plain=False),
    Case("defaults", ("train.py --steps 3 --seed 3 --skip-eval-init --output {folder}/run",), plain=False, here=True),
    Case("embed-lora", (
        f"train.py --data {{inputs}}/rows.jsonl {RUN} {DROPOUT} --matryoshka-dims 32 64",
        f"embed.py --model run/best {CORPUS} --output docs.npy",
        f"embed.py --model run/final {QUERIES} --output queries.npy --dimensions 64 --precision binary",
        f"embed.py --model run/final {CORPUS} --output int8.npy --dimensions 64 --precision int8",
        "eval.py --model run/final --eval-tasks {inputs}/eval --output results.json --precision float32 int8 binary "
        "--dimensions 256 64",
    )),
    Case("embed-dora", (
        f"train.py --data {{inputs}}/negatives.jsonl {RUN} {DROPOUT} --train-type dora --grad-checkpoint "
        "--loss hard_negative_info_nce --beta 0.7 --margin-weight 0.1 --positive-aware perc --query-prompt 'ask: '",
    )),
    Case("embed-full", (
        f"train.py --data {{inputs}}/rows.jsonl:2 {{inputs}}/negatives.jsonl:1 {RUN} --train-type full --pooling last "
        "--loss symmetric_info_nce --weight-decay 0.01 --max-grad-norm 0.5 --schedule linear --warmup 1",
        "export.py --adapter run/final --output exported --format hf --skip-library-check",
    )),
    Case("embed-kl", (
        f"train.py --model {{inputs}}/bert --data {{inputs}}/scored.jsonl {RUN} {DROPOUT} --loss kl_distill "
        "--teacher-temperature 2 --pooling cls --lora-keys query value --num-layers 1",
    ), plain=False),
    Case("embed-quantised", (
        f"train.py --model {{inputs}}/quantised --data {{inputs}}/rows.jsonl {RUN} {DROPOUT} --bidirectional "
        "--loss nt_xent --eval-steps 0",
        "export.py --adapter run/final --output exported --format mlx --skip-library-check",
    ), plain=False),
    Case("resumed", (
        f"train.py --data {{inputs}}/rows.jsonl {RUN} {DROPOUT} --stop-after 2",
        "train.py --config run/config.yaml --steps 2 --stop-after 0 --output again",
        "train.py --resume --output run",
    ), plain=False),
    Case("late", (
        f"train.py --task late --data {{inputs}}/rows.jsonl {RUN} {DROPOUT} --projection-dim 24 --skip-punctuation",
        f"embed.py --model run/final {QUERIES} --output queries.npy",
        "eval.py --model run/final --eval-tasks {inputs}/eval --output results.json",
        f"rerank.py --model run/final {RERANK}",
        "search.py index {inputs}/sources --model-path run/final",
        "search.py search '{query}' --json",
    )),
    Case("late-xtr", (
        f"train.py --task late --model {{inputs}}/bert --data {{inputs}}/negatives.jsonl {RUN} --loss xtr --xtr-k 40 "
        "--query-expansion 24 --impute 30 --train-type full",
        "export.py --adapter run/final --output exported",
    ), plain=False),
    Case("rerank-qwen3", (
        f"train.py --task rerank --model {{inputs}}/qwen3 --data {{inputs}}/negatives.jsonl {RUN} {DROPOUT} "
        "--max-length 200 --rerank-depth 8",
        f"rerank.py --model run/final {RERANK}",
        "eval.py --task rerank --model run/final --eval-tasks {inputs}/eval --first-stage bm25 --depth 6 "
        "--output results.json",
        "export.py --adapter run/final --output exported",
    )),
    Case("rerank-cross-encoder", (
        f"train.py --task rerank --model {{inputs}}/cross --data {{inputs}}/negatives.jsonl {RUN} --train-type full "
        "--max-length 120 --rerank-depth 8 --random-negatives 2",
        f"rerank.py --model run/best {RERANK}",
        "eval.py --task rerank --model run/final --eval-tasks {inputs}/eval --first-stage gemma-3-tiny-mlx --depth 6 "
        "--output results.json",
        "export.py --adapter run/final --output exported",
    )),
    Case("rerank-fresh-head", (
        f"train.py --task rerank --model {{inputs}}/bert --data {{inputs}}/scored.jsonl {RUN} {DROPOUT} --loss ranknet "
        "--max-length 120 --rerank-depth 8 --eval-steps 0",
        f"train.py --task rerank --model {{inputs}}/bert --data {{inputs}}/scored.jsonl {RUN} --loss margin_mse "
        "--train-type dora --max-length 120 --eval-steps 0 --skip-eval-init --output margin",
    ), plain=False),
    Case("rerank-listwise", (
        f"train.py --task rerank --model {{inputs}}/listwise --data {{inputs}}/negatives.jsonl {RUN} {DROPOUT} "
        "--max-length 120 --rerank-depth 8 --random-negatives 2",
        f"rerank.py --model run/final {RERANK}",
        "eval.py --task rerank --model run/final --eval-tasks {inputs}/eval --first-stage bm25 --depth 6 "
        "--output results.json",
    )),
    Case("chat-lora", (
        f"train.py --task chat --data {{inputs}}/chat --mask-prompt {DROPOUT} --batch-size 6 --seed 7 --lora-rank 4 "
        "--gradient-accumulation-steps 2 --steps 4 --eval-steps 2 --save-steps 2 --steps-per-report 1 --output run",
    )),
    Case("chat-dora", (
        "train.py --task chat --model {inputs}/llama --data {inputs}/chat --train-type dora --grad-checkpoint "
        "--num-layers 1 --steps 3 --eval-steps 0 --steps-per-report 1 --output dora",
        "train.py --task chat --model {inputs}/quantised --data {inputs}/chat --max-length 24 --steps 3 --output four",
        "train.py --task chat --model {inputs}/llama --data {inputs}/chat --train-type full --epochs 1 "
        "--learning-rate 1e-3 --output full",
    )),
    Case("backbones", ("{inputs}/backbones.py {inputs}",)),
    Case("notebook", ("{inputs}/notebook.py {inputs}",)),
    Case("export", (
        f"train.py --model {{inputs}}/llama --data {{inputs}}/rows.jsonl {RUN} --pooling last --eval-steps 0 "
        "--skip-eval-init",
        "export.py --adapter run/final --output st --gguf-ready",
        "export.py --adapter run/final --output four --format mlx --quantize 4",
        "export.py --model {inputs}/t5 --task embed --output t5 --dtype float16 --skip-library-check",
        "embed.py --model st --input {inputs}/eval/queries.jsonl --output st.npy",
    ), plain=False),
    Case("mine-code", ("mine.py code {inputs}/sources --output pairs.jsonl --min-lines 1",), plain=False),
    Case("mine-negatives", (
        f"mine.py negatives {MINED} --model gemma-3-tiny-mlx --by both --take 3 --scores --output both.jsonl",
        f"mine.py negatives {MINED} --by bm25 --take 2 --sampling random --seed 5 --output bm25.jsonl",
        f"mine.py negatives {MINED} --model gemma-3-tiny-mlx --reranker {{inputs}}/cross --range-max 8 --skip 1 "
        "--relative-margin off --max-length 64 --output reranked.jsonl",
        "mine.py score --data {inputs}/negatives.jsonl --teacher {inputs}/cross --output scored.jsonl",
        "mine.py score --data {inputs}/negatives.jsonl --teacher gemma-3-tiny-mlx --output by-vectors.jsonl",
    ), plain=False),
    Case("search", (
        "search.py index {inputs}/sources --model-path gemma-3-tiny-mlx --chunk-size 600 --overlap 60",
        "search.py index {inputs}/sources --model-path gemma-3-tiny-mlx --chunk-size 600 --overlap 60",
        "search.py search 'write a header' --json",
        "search.py search 'write a header' --bm25 --json --top 20",
        "search.py search 'write a header' --hybrid --weight 0.3",
        "search.py search 'write a header' --rerank {inputs}/cross --rerank-depth 9 --json",
        "search.py index {inputs}/eval --model-path gemma-3-tiny-mlx --index corpus",
        "search.py eval {inputs}/eval --index corpus --output results.json",
    ), plain=False),
)  # fmt: skip
