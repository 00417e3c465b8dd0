# shellcheck shell=bash
# Paths and launcher are those of ../miniplm_pile_qwen, so that both examples share one tokenized corpus.
# shellcheck source=examples/miniplm_pile_qwen/paths.sh
source examples/miniplm_pile_qwen/paths.sh
# shellcheck disable=SC2034 # the steps read it
HERE="examples/vanilla_kd_pile_qwen"
