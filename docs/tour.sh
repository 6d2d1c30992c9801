#!/usr/bin/env bash
# Every documented first-day task on the tiny family, in a new folder inside FOLDER: bash docs/tour.sh [FOLDER].
# The blocks of docs/quickstart.md that are marked <!-- tour --> run as they stand there; then what its pages lead to.
set -euo pipefail
docs=$(cd "$(dirname "$0")" && pwd)
folder=$(mktemp -d -p "${1:-${TMPDIR:-/tmp}}" tour.XXXXXX)
cd "$folder"
python=${PYTHON:-python3}
PYTHONPATH="$docs/..${PYTHONPATH:+:$PYTHONPATH}"
export PYTHONPATH

fluid-eval() { # exit code 3: done, but a health gate of these small models is over its threshold
    echo "+ fluid-eval $*"
    "$python" -m fluid_eval "$@" || [ $? -eq 3 ]
}

# 1) the quickstart, as it stands
eval "$(awk '/<!-- tour -->/ { marked = 1; next } marked && /^```/ { if (inside) { marked = inside = 0 } else inside = 1; next } inside' "$docs/quickstart.md")"

# 2) what can be named
fluid-eval models
fluid-eval decoders > /dev/null
fluid-eval settings decoder.confidence
fluid-eval tasks 'mini_gsm8k*' > /dev/null

# 3) names that lm-eval's users know
fluid-eval run --tasks mini_gsm8k_1 --model tiny-ar --num_fewshot 0 --batch_size 4 --limit 2 --log_samples --output_path runs/theirs
fluid-eval runs --json > runs.json

# 4) a look inside: one answer, the K-head, other extractors
fluid-eval trace --model tiny-fluid --prompt 'Question: Tom has 3 apples and buys 2. How many?\nAnswer:' --max-new-tokens 16
fluid-eval khead runs/fluid
cat > last-number.toml << 'END'
about = "the last number of the answer"
[tasks.mini_gsm8k_1]
source = "this tour"
[tasks.mini_gsm8k_1.extractor]
about = "the last number"
metric_list = [{ metric = "exact_match", aggregation = "mean", higher_is_better = true, regexes_to_ignore = ["(?s).*#### "] }]
[[tasks.mini_gsm8k_1.extractor.filter_list]]
name = "last"
filter = [{ function = "regex", group_select = -1, regex_pattern = '(-?[0-9]+)' }, { function = "take_first" }]
END
fluid-eval rescore runs/ar --profile last-number.toml

# 5) for a paper
fluid-eval report runs/ar runs/fluid -o paper.html --markdown appendix.md --latex scores.tex
fluid-eval report sweeps/gamma

# 6) from Python
"$python" - << 'END'
import fluid_eval

result = fluid_eval.load_run("runs/fluid")
print(result.row("mini_gsm8k_1").score, result.samples[0].tokens_per_forward)
print(fluid_eval.compare("runs/ar", result))
END

for file in report.html runs.json paper.html appendix.md scores.tex sweeps/gamma/frontier.csv; do
    [ -s "$file" ] || { echo "the tour left no $file" >&2; exit 1; }
done
echo "the tour is done: $folder"
