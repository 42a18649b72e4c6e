#!/usr/bin/env bash
# The four stages, in order, as plain commands. Run again after an interruption, it goes on where it stopped.
# A stage for which the corpus has no data is left out, with a line that says so.
#
#   bash recipes/pipeline.sh                                     the demo: a tiny model from scratch on the sample corpus
#   CORPUS=../my_sources RUN=runs/mine bash recipes/pipeline.sh  the same on your own files
#   CONFIG=baichuan2_7b MODEL=checkpoints/Baichuan2-7B-Base RUN=runs/7b LAUNCH="torchrun --nproc-per-node 8" \
#     CORPUS=../my_sources bash recipes/pipeline.sh              a real checkpoint on eight GPUs
set -euo pipefail

recipes=$(dirname "${BASH_SOURCE[0]}")    # this folder
CONFIG=${CONFIG:-demo}                    # folder of recipes/configs
CORPUS=${CORPUS:-$recipes/sample_corpus}   # folder of sources
RUN=${RUN:-runs/demo}                     # everything is written here
MODEL=${MODEL:-$RUN/base}                 # base model; the default is made from scratch
# EXAM=path/to/PediaBench/data            an exam to sit; of the sample corpus, questions on its facts
# JUDGE=judge.toml                        an OpenAI-compatible endpoint that compares answers; see recipes/judge.py
PYTHON=${PYTHON:-python}
LAUNCH=${LAUNCH:-$PYTHON}               # how a training recipe is started
[ "$CORPUS" != "$recipes/sample_corpus" ] || EXAM=${EXAM:-$recipes/sample_exam}
EXAM=${EXAM:-}
configs=$recipes/configs/$CONFIG
train=$RUN/corpus/train heldout=$RUN/corpus/heldout

# Threads that wait leave their core to others: a little slower on an idle machine, much faster on a busy one.
export OMP_WAIT_POLICY=${OMP_WAIT_POLICY:-PASSIVE}

# A stage that was stopped by Ctrl-C or SIGTERM ends with 128 + the signal, after it has saved a checkpoint.
trap '[ $? -lt 128 ] || echo "stopped; the same command goes on from here" >&2' EXIT
trap 'exit 130' INT # also if Ctrl-C killed a stage that was only starting

say() { if [ -t 1 ]; then printf '\n\033[1m== %s\033[0m\n' "$*"; else printf '\n== %s\n' "$*"; fi; }
present() { # present FOLDER...: those that the corpus has, into the array `found`
  found=()
  for folder; do if [ -d "$folder" ]; then found+=("$folder"); fi; done
}
evaluate() { # evaluate STAGE MODEL [more settings]: unless done since the stage finished
  local finished=$RUN/$1/done.json
  present "$heldout/tasks" "$heldout/text" "$heldout/preferences"
  [ ${#found[@]} != 0 ] || return 0 # no row was held out
  [ -f "$finished" ] || finished=$MODEL/config.json
  [ "$RUN/evaluation/$1.json" -nt "$finished" ] || $PYTHON "$recipes/evaluate.py" --config "$configs/evaluate.toml" \
    --model "$2" --heldout "$heldout" --output "$RUN/evaluation/$1.json" \
    --answers "$RUN/answers/$1.jsonl" "${@:3}"
}
pretrain() { # pretrain STAGE [more settings]
  $LAUNCH "$recipes/continued_pretrain.py" --config "$configs/cpt.toml" --model "$MODEL" --output "$RUN/$1" \
    --corpus "$RUN/corpus" "${@:2}"
  evaluate "$1" "$RUN/$1/model"
}
left_out() { say "Stage $1 is left out: the corpus holds no $2"; }

say "Corpus"
$PYTHON "$recipes/build_corpus.py" --source "$CORPUS" --output "$RUN/corpus"
present "$train/text/pediatric" "$train/text/general_medical"; text=${#found[@]}
present "$train/generalist" "$train/tasks"; instructions=("${found[@]}")
present "$train/text"

if [ "$MODEL" = "$RUN/base" ]; then
  say "Tokenizer and untrained model"
  [ -f "$MODEL/tokenizer.json" ] || $PYTHON "$recipes/init_model.py" --config "$configs/base.toml" --output "$MODEL" \
    --text "${found[@]}" --instructions "${instructions[@]}"
fi
evaluate base "$MODEL"

if [ "$CONFIG" = demo ] && [ "$text" != 0 ]; then
  say "Stage 1: continued pre-training, text only, for comparison"
  pretrain cpt_text --instruction_share 0
fi
tuned=$RUN/cpt/model # the newest model
if [ "$text" != 0 ] && [ ${#instructions[@]} != 0 ]; then
  say "Stage 1: continued pre-training, hybrid"
  pretrain cpt
elif [ "$text" != 0 ]; then
  say "Stage 1: continued pre-training on text, since the corpus holds no instructions"
  pretrain cpt --instruction_share 0
elif [ ${#instructions[@]} != 0 ]; then
  say "Stage 1: continued pre-training on instructions, since the corpus holds no text on medicine"
  pretrain cpt --instruction_share 1
else
  left_out 1 "text on medicine and no instructions"
  tuned=$MODEL
fi

present "$train/generalist" "$train/tasks_sample"; instructions=("${found[@]}")
if [ ${#instructions[@]} != 0 ]; then
  say "Stage 2: full supervised fine-tuning"
  present "$heldout/generalist"
  $LAUNCH "$recipes/full_finetune.py" --config "$configs/sft.toml" --model "$tuned" --output "$RUN/sft" \
    --instructions "${instructions[@]}" --heldout_instructions "${found[@]}"
  tuned=$RUN/sft/model
  evaluate sft "$tuned"
else
  left_out 2 instructions
fi
aligned=$tuned

if [ -d "$train/preferences" ]; then
  say "Stage 3: direct following preference optimization"
  present "$heldout/preferences"
  $LAUNCH "$recipes/dfpo.py" --config "$configs/dfpo.toml" --model "$tuned" --output "$RUN/dfpo" \
    --preferences "$train/preferences" --heldout_preferences "${found[@]}"
  aligned=$RUN/dfpo/model
  evaluate dfpo "$aligned" --reference "$tuned"
else
  left_out 3 "preference pairs"
fi

present "$train/tasks" "$train/generalist/general_medical"; instructions=("${found[@]}")
if [ ${#instructions[@]} != 0 ]; then
  say "Stage 4: mixture of universal-specific experts"
  present "$heldout/tasks"
  $LAUNCH "$recipes/expert_finetune.py" --config "$configs/experts.toml" --model "$aligned" --output "$RUN/experts" \
    --instructions "${instructions[@]}" --heldout_instructions "${found[@]}"
  evaluate experts "$aligned" --adapter "$RUN/experts/adapter" --reference "$tuned"
else
  left_out 4 "rows of the pediatric tasks or of general medicine"
fi

experts=$RUN/experts/adapter compared=("$RUN/answers/sft.jsonl" "$RUN/answers/experts.jsonl")
if [ -d "$experts" ] && [ -n "$EXAM" ]; then
  say "Exam"
  for old in "$RUN/exam_answers/experts.jsonl"{,.part}; do # answers of an earlier training
    [ ! "$RUN/experts/done.json" -nt "$old" ] || rm -f "$old"
  done
  $PYTHON "$recipes/answer.py" --exam "$EXAM" --adapter "$experts" --output "$RUN/exam_answers/experts.jsonl" \
    --max_new_tokens 32
  $PYTHON "$recipes/exam.py" --exam "$EXAM" --answers "$RUN/exam_answers/experts.jsonl" --adapter "$experts" \
    --corpus "$train" --output "$RUN/exams/$(basename "$EXAM").json"
fi
if [ -f "${compared[0]}" ] && [ -f "${compared[1]}" ]; then
  say "Pages for two doctors, who compare answers of stages 2 and 4 without knowing whose they are"
  if [ -f "$RUN/doctors/doctor2.html" ]; then
    echo "they are there already, and the doctors may have them; for new ones, move $RUN/doctors away"
  else
    $PYTHON "$recipes/doctors.py" --answers "${compared[@]}" --raters doctor1 doctor2 --limit 20 \
      --output "$RUN/doctors"
  fi
  [ -z "${JUDGE:-}" ] || $PYTHON "$recipes/judge.py" --answers "${compared[@]}" --endpoint "$JUDGE" --check_judge true \
    --output "$RUN/judge/judge.json"
fi

say "Report"
$PYTHON "$recipes/report.py" --run "$RUN"
