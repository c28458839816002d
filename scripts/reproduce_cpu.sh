#!/usr/bin/env bash
# The records in results/cpu: the bundled pair on a CPU, GovReport and PG-19, standard against SpecExtend.
#   bash scripts/reproduce_cpu.sh [folder that holds govreport/ and pg19/, default data]
# Resumes where it stopped. Long prompts get fewer samples: a 16K prompt costs a CPU minutes.
set -euo pipefail
cd "$(dirname "$0")/.."
data=${1:-data}
python=${PYTHON:-.venv/bin/python}
paper="--nodes 50 --max_depth 10 --threshold 0.7"

measure() { # folder, data set, samples, new tokens, lengths, flags of the method
    local folder=$1 set=$2 samples=$3 new=$4 lengths=$5 name=$6
    shift 6
    "$python" eval_classic.py --data_dir "$data/$set" -n "$samples" -r 1 -max "$new" --lengths $lengths \
        --output_file "results/cpu/$folder/${set}_$name.json" "$@"
}

for set in govreport pg19; do
    # the tree for a CPU (the bundled pair's default there): speed
    for part in "4 512 1K 2K" "3 4K 8K" "2 16K"; do
        measure cpu_tree "$set" "${part%% *}" 256 "${part#* }" specextend --use_specextend
        measure cpu_tree "$set" "${part%% *}" 256 "${part#* }" standard
    done
    # the paper's tree: accepted drafts per round, greedy and sampled
    for temperature in 0 0.8; do
        for part in "4 512 1K 2K" "3 4K 8K" "2 16K"; do
            measure paper_tree "$set" "${part%% *}" 128 "${part#* }" "specextend_t$temperature" $paper --temperature "$temperature" --use_specextend
            measure paper_tree "$set" "${part%% *}" 128 "${part#* }" "standard_t$temperature" $paper --temperature "$temperature"
        done
    done
done
"$python" scripts/measure_prefill_memory.py --use_specextend
"$python" scripts/make_tables.py --readme README.md
"$python" scripts/plot_results.py
