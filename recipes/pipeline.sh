#!/usr/bin/env bash
# The four stages, in order, as plain commands. Run again after an interruption, it goes on where it stopped.
#
#   bash recipes/pipeline.sh                                     the demo: a tiny model from scratch on the sample corpus
#   CORPUS=../my_sources RUN=runs/mine bash recipes/pipeline.sh  the same on your own files
#   CONFIG=baichuan2_7b MODEL=checkpoints/Baichuan2-7B-Base RUN=runs/7b LAUNCH="torchrun --nproc-per-node 8" \
#     CORPUS=../my_sources bash recipes/pipeline.sh              a real checkpoint on eight GPUs
set -euo pipefail

CONFIG=${CONFIG:-demo}                  # folder of recipes/configs
CORPUS=${CORPUS:-recipes/sample_corpus} # folder of sources
RUN=${RUN:-runs/demo}                   # everything is written here
MODEL=${MODEL:-$RUN/base}               # base model; the default is made from scratch
LAUNCH=${LAUNCH:-python}                # how a training recipe is started
PYTHON=${PYTHON:-python}
configs=recipes/configs/$CONFIG
train=$RUN/corpus/train heldout=$RUN/corpus/heldout

# Threads that wait leave their core to others: a busy machine slows the stages down, but not by a multiple.
export OMP_WAIT_POLICY=${OMP_WAIT_POLICY:-PASSIVE}

say() { printf '\n\033[1m== %s\033[0m\n' "$*"; }
evaluate() { # evaluate STAGE MODEL [more settings]: unless done since the stage finished
  local finished=$RUN/$1/done.json
  [ -f "$finished" ] || finished=$MODEL/config.json
  [ "$RUN/evaluation/$1.json" -nt "$finished" ] || $PYTHON recipes/evaluate.py --model "$2" \
    --heldout "$heldout" --output "$RUN/evaluation/$1.json" "${@:3}"
}

say "Corpus"
$PYTHON recipes/build_corpus.py --source "$CORPUS" --output "$RUN/corpus"

if [ "$MODEL" = "$RUN/base" ]; then
  say "Tokenizer and untrained model"
  [ -f "$MODEL/tokenizer.json" ] || $PYTHON recipes/init_model.py --config "$configs/base.toml" --output "$MODEL" \
    --text "$train/text" --instructions "$train/generalist" "$train/tasks"
fi
evaluate base "$MODEL"

if [ "$CONFIG" = demo ]; then
  say "Stage 1: continued pre-training, text only, for comparison"
  $LAUNCH recipes/continued_pretrain.py --config "$configs/cpt.toml" --model "$MODEL" --output "$RUN/cpt_text" \
    --instruction_share 0 --text "$train/text/pediatric.jsonl" "$train/text/general_medical.jsonl" \
    --general_text "$train/text/general.jsonl" --heldout_text "$heldout/text/pediatric.jsonl"
  evaluate cpt_text "$RUN/cpt_text/model"
fi

say "Stage 1: continued pre-training, hybrid"
$LAUNCH recipes/continued_pretrain.py --config "$configs/cpt.toml" --model "$MODEL" --output "$RUN/cpt" \
  --text "$train/text/pediatric.jsonl" "$train/text/general_medical.jsonl" --general_text "$train/text/general.jsonl" \
  --instructions "$train/generalist" "$train/tasks" --heldout_text "$heldout/text/pediatric.jsonl"
evaluate cpt "$RUN/cpt/model"

say "Stage 2: full supervised fine-tuning"
$LAUNCH recipes/full_finetune.py --config "$configs/sft.toml" --model "$RUN/cpt/model" --output "$RUN/sft" \
  --instructions "$train/generalist" --heldout_instructions "$heldout/generalist"
evaluate sft "$RUN/sft/model"

say "Stage 3: direct following preference optimization"
$LAUNCH recipes/dfpo.py --config "$configs/dfpo.toml" --model "$RUN/sft/model" --output "$RUN/dfpo" \
  --preferences "$train/preferences.jsonl" --heldout_preferences "$heldout/preferences.jsonl"
evaluate dfpo "$RUN/dfpo/model" --reference "$RUN/sft/model"

say "Stage 4: mixture of universal-specific experts"
$LAUNCH recipes/expert_finetune.py --config "$configs/experts.toml" --model "$RUN/dfpo/model" --output "$RUN/experts" \
  --instructions "$train/tasks" "$train/generalist/general_medical.jsonl" --heldout_instructions "$heldout/tasks"
evaluate experts "$RUN/dfpo/model" --adapter "$RUN/experts/adapter" --reference "$RUN/sft/model"

say "Report"
$PYTHON recipes/report.py --run "$RUN"
